"""The VQ-VAE-2 network: any number of levels, coarse to fine (Razavi et al. 2019, section 3.1).

Letters: B batch, C image channels, H W image, h w a level's code grid, E width of the features, D
code dimension.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vqvae2 import paper, resnet
from vqvae2.common.artifact import Artifact, content_hash
from vqvae2.common.errors import UserError
from vqvae2.common.torch_settings import evaluating, exact_convolutions
from vqvae2.config import VQVAE2Config
from vqvae2.data import as_images
from vqvae2.distributed import random_integers, rank, world_size
from vqvae2.quantizers import Quantized, Quantizer, make_quantizer


class VQVAE2Output(NamedTuple):
    """The decoded images `(B, C, H, W)`, and what each level was quantized to, coarse to fine."""

    reconstruction: Tensor
    levels: tuple[Quantized, ...]


NETWORKS: dict[str, Any] = {"paper": paper, "resnet": resnet}  # each makes the same three parts


class VQVAE2(Artifact):
    """A hierarchy of vector-quantized autoencoders.

    Going up, each level's encoder reads the features of the next finer level. Coming down, each
    level is quantized conditioned on the decoded coarser levels. The *context* of a level is its
    embeddings beside the coarser context, upsampled to its grid; the bottom's becomes the image.
    """

    config_class = VQVAE2Config
    num_forwards: Tensor

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_channels, config.image.channels
        dims, network = config.code_dim_per_level, NETWORKS[config.network]
        context_dims = list(accumulate(dims))  # channels of each level's context

        # Each encoder reads the next finer level's features, the bottom's the image.
        self.encoders = nn.ModuleList()
        for level, read in enumerate([*[hidden] * (len(dims) - 1), channels]):
            self.encoders.append(network.make_encoder(read, level, config))

        # Each quantizer reads a projection of the decoded coarser context and its level's features.
        self.projections, self.quantizers = nn.ModuleList(), nn.ModuleList()
        for dim, decoded in zip(dims, [0, *dims[:-1]], strict=True):
            self.projections.append(nn.Conv2d(hidden + decoded, dim, kernel_size=1))
        for size, dim in zip(config.codebook_size_per_level, dims, strict=True):
            self.quantizers.append(make_quantizer(config.quantizer, size, dim))

        # From the context of each level but the bottom to the next finer grid, and to the image.
        self.level_decoders, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, (context_dim, dim) in enumerate(zip(context_dims[:-1], dims[:-1], strict=True)):
            self.level_decoders.append(network.make_decoder(context_dim, dim, level, config))
        for level, context_dim in enumerate(context_dims[:-1]):
            self.upsamplers.append(network.make_upsampler(context_dim, level, config))
        bottom = len(dims) - 1
        self.image_decoder = network.make_decoder(context_dims[-1], channels, bottom, config)

        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        # The faster layout for convolutions, and a free view for the quantizers.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> VQVAE2Output:
        """Encode and decode images `(B, C, H, W)` in [-1, 1]; in training the codebooks learn."""
        levels = self.encode(images)
        embeddings = [level.embeddings for level in levels]
        if self.training and self.config.level_dropout and self.config.num_levels > 1:
            embeddings = self.drop_finer_levels(embeddings, self.num_forwards)
            self.num_forwards += 1
        return VQVAE2Output(self.decode(embeddings), levels)

    def encode(self, images: Tensor) -> tuple[Quantized, ...]:
        """Images `(B, C, H, W)` in [-1, 1] to one `Quantized` per level, coarse to fine.

        Raises:
            UserError: these are no images, their channels are not the model's, or the strides do
                not divide their size.
        """
        if images.ndim != 4 or not images.is_floating_point() or images.shape[0] == 0:
            found = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"images are {found}, but must be (B, C, H, W) in [-1, 1].")
        _, channels, height, width = images.shape
        expected, stride = self.config.image.channels, math.prod(self.config.strides)
        if channels != expected:
            raise UserError(f"images have {channels} channels, the model {expected}: convert them.")
        if height % stride or width % stride:
            raise UserError(f"images of {height} x {width}: resize to sides divisible by {stride}.")

        # Going up, from the bottom to the top.
        features = images.to(self.last_layer.dtype).contiguous(memory_format=torch.channels_last)
        features_per_level: list[Tensor] = []  # (B, E, h, w) each, fine to coarse
        for encoder in reversed(self.encoders):
            features = encoder(features)
            features_per_level.append(features)

        # Coming down, from the top to the bottom, conditioned on the decoded coarser levels.
        levels: list[Quantized] = []
        context: Tensor | None = None
        for level, features in enumerate(reversed(features_per_level)):
            inputs = features
            if context is not None:
                decoded = self.level_decoders[level - 1](context)  # (B, D, h, w), on this grid
                inputs = torch.cat([decoded, features], dim=1)  # (B, D + E, h, w)
            levels.append(self.quantizers[level](self.projections[level](inputs)))
            if level + 1 < self.config.num_levels:  # the bottom's context is for decoding only
                context = self._extend(context, level, levels[-1].embeddings)
        return tuple(levels)

    @torch.no_grad()
    @exact_convolutions()
    def encode_images(self, images: Any) -> tuple[Tensor, ...]:
        """The codes `(B, h, w)` int64 per level, coarse to fine, of images as `as_images` takes
        and prepares them: PIL images, paths, arrays or tensors. Raises as `as_images`."""
        encoded = []
        with evaluating(self):  # in training, codebooks would learn from them
            for batch in as_images(images, self.config.image).split(32):
                encoded.append([level.codes for level in self.encode(batch.to(self.device))])
        return tuple(torch.cat(level) for level in zip(*encoded, strict=True))

    def decode(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Embeddings `(B, D, h, w)` of every level, coarse to fine, to images `(B, C, H, W)`."""
        context = None
        for level, level_embeddings in enumerate(embeddings):
            context = self._extend(context, level, level_embeddings)
        # The adaptive weight of a discriminator goes back through the last layer, twice; through
        # a compiled graph, which is whole or nothing, that would be slow, and spoil its buffers.
        return self.image_decoder[-1](self.image_decoder(context, -1))

    @exact_convolutions()
    def decode_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes `(B, h, w)` of every level, coarse to fine, to images `(B, C, H, W)`."""
        pairs = zip(self.quantizers, codes, strict=True)
        return self.decode([cast(Quantizer, quantizer).lookup(level) for quantizer, level in pairs])

    def _extend(self, context: Tensor | None, level: int, embeddings: Tensor) -> Tensor:
        """The context of `level`: the coarser context upsampled to its grid, and its embeddings."""
        embeddings = embeddings.to(self.last_layer.dtype)  # of a model in bf16, say
        embeddings = embeddings.contiguous(memory_format=torch.channels_last)
        if context is None:
            return embeddings
        return torch.cat([self.upsamplers[level - 1](context), embeddings], dim=1)

    def drop_finer_levels(self, embeddings: Sequence[Tensor], counter: Tensor) -> list[Tensor]:
        """Zero the levels finer than a random one, in some images: nested dropout (Rippel 2014).

        A hash of the counter `()` and the place in the joint batch decides: one process or many
        choose the same.
        """
        batch = len(embeddings[0])
        numbers = random_integers(counter, 2 * batch * world_size())
        first, second = numbers.view(world_size(), batch, 2)[rank()].unbind(dim=1)  # (B,) each
        whole = first % 2**20 >= self.config.level_dropout * 2**20  # images that keep all levels
        finest = second % max(1, self.config.num_levels - 1)  # the last level that the others keep
        levels = torch.arange(len(embeddings), device=finest.device)[:, None]
        keep = (whole | (levels <= finest))[..., None, None, None]  # (levels, B, 1, 1, 1)
        return [e * mask.to(e.dtype) for e, mask in zip(embeddings, keep, strict=True)]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the networks in place, but not the quantizers, which synchronise processes.

        Each for its own shapes, in training and evaluation. As all have the same `forward`, Dynamo
        counts their graphs together, and at its limit, 8, would leave the rest uncompiled.
        """
        torch._dynamo.config.recompile_limit = 64
        kwargs = {"dynamic": False, **kwargs}
        for network in (*self.encoders, *self.level_decoders, *self.upsamplers, self.image_decoder):
            network.compile(*args, **kwargs)

    @property
    def last_layer(self) -> nn.Parameter:
        """The kernel of the convolution that writes the image."""
        return cast(nn.Parameter, self.image_decoder[-1].weight)

    def content_hash(self) -> str:
        """A hash of all that decides which codes an image gets, and of the training's counters.

        What only decodes is left out: the image decoder, and the upsamplers of up to two levels
        (with three, the first of them also feeds a quantizer).
        """
        decoding = ["image_decoder."] + ["upsamplers."] * (self.config.num_levels < 3)
        weights = self.state_dict().items()
        chosen = [weight for weight in weights if not weight[0].startswith(tuple(decoding))]
        return content_hash(self.config, chosen)
