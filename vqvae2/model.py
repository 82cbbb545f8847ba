"""The VQ-VAE-2 network: any number of levels, coarse to fine (Razavi, van den Oord, Vinyals 2019, section 3.1).

Letters: B batch, C image channels, H W image, h w a level's code grid, E hidden width, R residual width, D code dimension.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vqvae2.common.artifact import Artifact, content_hash
from vqvae2.common.errors import UserError
from vqvae2.config import VQVAE2Config
from vqvae2.distributed import random_integers, rank, world_size
from vqvae2.quantizers import Quantized, Quantizer, make_quantizer


class VQVAE2Output(NamedTuple):
    """What the autoencoder makes of a batch of images."""

    reconstruction: Tensor
    """`(B, C, H, W)`."""
    levels: tuple[Quantized, ...]
    """What each level's quantizer said, coarse to fine."""


class ResidualBlock(nn.Sequential):
    """x + conv1x1(ReLU(conv3x3(ReLU(x)))): E -> R -> E channels."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels, residual_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(residual_channels, channels, kernel_size=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(B, E, h, w)` to the same shape."""
        return features + super().forward(features)


def _residual_stack(config: VQVAE2Config) -> list[nn.Module]:
    return [
        *(
            ResidualBlock(config.hidden_channels, config.residual_channels)
            for _ in range(config.num_residual_blocks)
        ),
        nn.ReLU(),
    ]


def make_encoder(in_channels: int, stride: int, config: VQVAE2Config) -> nn.Sequential:
    """`(B, in_channels, s*h, s*w)` to `(B, E, h, w)`: one strided convolution per factor of two, the first to E/2 channels."""
    hidden = config.hidden_channels
    widths = [in_channels, hidden // 2, *[hidden] * (_halvings(stride) - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], hidden, kernel_size=3, padding=1))
    return nn.Sequential(*layers, *_residual_stack(config))


def make_decoder(
    in_channels: int, out_channels: int, stride: int, config: VQVAE2Config
) -> nn.Sequential:
    """`(B, in_channels, h, w)` to `(B, out_channels, s*h, s*w)`: one transposed convolution per factor of two, the last from E/2 channels."""
    hidden = config.hidden_channels
    halvings = _halvings(stride)
    widths = [*[hidden] * max(1, halvings - 1), *[hidden // 2] * (halvings > 1), out_channels]
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1),
        *_residual_stack(config),
    ]
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_upsampler(channels: int, stride: int) -> nn.Sequential:
    """`(B, channels, h, w)` to `(B, channels, s*h, s*w)` by transposed convolutions alone."""
    return nn.Sequential(
        *(
            nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
            for _ in range(_halvings(stride))
        )
    )


def _halvings(stride: int) -> int:
    return int(math.log2(stride))


class VQVAE2(Artifact, nn.Module):
    """A hierarchy of vector-quantized autoencoders.

    Going up, each level's encoder reads the features of the next finer level. Coming down, each level is quantized knowing what the
    coarser ones said. The "canvas" of a level is everything said so far, on that level's grid: its own embeddings and the coarser
    canvas upsampled. The image is decoded from the bottom's canvas.
    """

    config_class = VQVAE2Config
    num_forwards: Tensor

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__()
        self.config = config
        dims, hidden, coarser_strides = (
            config.code_dim_per_level,
            config.hidden_channels,
            config.strides[:-1],
        )
        canvas_channels = [
            sum(dims[: level + 1]) for level in range(config.num_levels)
        ]  # level -> channels of its canvas
        inputs = [*[hidden] * (config.num_levels - 1), config.image.channels]
        self.encoders = nn.ModuleList(
            make_encoder(i, stride, config)
            for i, stride in zip(inputs, config.strides, strict=True)
        )
        # What a quantizer reads: its level's features, and for all but the top what the coarser levels decode to.
        self.projections = nn.ModuleList(
            nn.Conv2d(hidden + (dims[level - 1] if level else 0), dim, kernel_size=1)
            for level, dim in enumerate(dims)
        )
        self.quantizers = nn.ModuleList(
            make_quantizer(config.quantizer, k, d)
            for k, d in zip(config.codebook_size_per_level, dims, strict=True)
        )
        # From each level but the bottom to the next finer grid.
        self.level_decoders = nn.ModuleList(
            make_decoder(channels, dim, stride, config)
            for channels, dim, stride in zip(canvas_channels, dims, coarser_strides, strict=False)
        )
        self.upsamplers = nn.ModuleList(
            make_upsampler(channels, stride)
            for channels, stride in zip(canvas_channels, coarser_strides, strict=False)
        )
        self.image_decoder = make_decoder(
            canvas_channels[-1], config.image.channels, config.strides[-1], config
        )
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout for convolutions, and a free view for the quantizers

    def forward(self, images: Tensor) -> VQVAE2Output:
        """Images `(B, C, H, W)` in [-1, 1] to their reconstruction and what each level said; in training mode the codebooks learn."""
        levels = self.encode(images)
        embeddings = [level.embeddings for level in levels]
        if self.training and self.config.level_dropout and self.config.num_levels > 1:
            embeddings = self._drop_finer_levels(embeddings)
        return VQVAE2Output(self.decode(embeddings), levels)

    def encode(self, images: Tensor) -> tuple[Quantized, ...]:
        """Images `(B, C, H, W)` in [-1, 1] to one `Quantized` per level, coarse to fine.

        Raises:
            UserError: the channels are not the model's, or the strides do not divide the size.
        """
        self._check(images)
        features = images.contiguous(memory_format=torch.channels_last)
        going_up: list[Tensor] = []
        for encoder in reversed(self.encoders):  # from the bottom to the top
            features = encoder(features)
            going_up.append(features)

        levels: list[Quantized] = []
        canvas = None
        for level, features in enumerate(reversed(going_up)):  # from the top to the bottom
            known = (
                features
                if canvas is None
                else torch.cat([self.level_decoders[level - 1](canvas), features], dim=1)
            )
            levels.append(self.quantizers[level](self.projections[level](known)))
            if level + 1 < len(self.quantizers):  # the bottom's canvas is the decoder's business
                canvas = self._extend(canvas, level, levels[-1].embeddings)
        return tuple(levels)

    def decode(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Embeddings `(B, D, h, w)` of every level, coarse to fine, to images `(B, C, H, W)`."""
        canvas = None
        for level, said in enumerate(embeddings):
            canvas = self._extend(canvas, level, said)
        return self.image_decoder(canvas)

    def decode_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes `(B, h, w)` of every level, coarse to fine, to images `(B, C, H, W)`."""
        return self.decode(
            [
                cast(Quantizer, quantizer).lookup(level)
                for quantizer, level in zip(self.quantizers, codes, strict=True)
            ]
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the convolutional networks (torch.compile, in place); the quantizers, which wait for data and for other processes, stay."""
        for network in (*self.encoders, *self.level_decoders, *self.upsamplers, self.image_decoder):
            network.compile(*args, **kwargs)

    @property
    def last_layer(self) -> nn.Parameter:
        """The kernel of the convolution that writes the image."""
        return cast(nn.Parameter, self.image_decoder[-1].weight)

    def content_hash(self) -> str:
        """A hash of all that decides which codes an image gets: configuration, preprocessing, encoders, codebooks; not the image decoder."""
        decoding = (
            ("image_decoder.", "upsamplers.") if self.config.num_levels < 3 else ("image_decoder.",)
        )
        return content_hash(
            self.config,
            [(name, t) for name, t in self.state_dict().items() if not name.startswith(decoding)],
        )

    def _drop_finer_levels(self, embeddings: list[Tensor]) -> list[Tensor]:
        """For a share of the images, zeros in place of the embeddings of all levels below a random one: nested dropout (Rippel et al. 2014).

        Which images and levels is a hash of (forward, place in the joint batch): one process or many choose the same.
        """
        batch = len(embeddings[0])
        draws = random_integers(self.num_forwards, 2 * batch * world_size()).view(-1, 2)[
            batch * rank() : batch * (rank() + 1)
        ]
        chosen = (draws[:, 0] % 2**20) < self.config.level_dropout * 2**20
        finest = draws[:, 1] % (
            self.config.num_levels - 1
        )  # of the levels that a chosen image keeps
        self.num_forwards += 1
        kept = [(~chosen | (level <= finest)) for level in range(self.config.num_levels)]
        return [
            e * k[:, None, None, None].to(e.dtype) for e, k in zip(embeddings, kept, strict=True)
        ]

    def _extend(self, canvas: Tensor | None, level: int, embeddings: Tensor) -> Tensor:
        """The canvas of `level`: the coarser canvas upsampled to its grid, and its embeddings."""
        embeddings = embeddings.contiguous(memory_format=torch.channels_last)
        return (
            embeddings
            if canvas is None
            else torch.cat([self.upsamplers[level - 1](canvas), embeddings], dim=1)
        )

    def _check(self, images: Tensor) -> None:
        stride = math.prod(self.config.strides)
        _, channels, height, width = images.shape
        if channels != self.config.image.channels:
            raise UserError(
                f"the images have {channels} channels, but the model was made for {self.config.image.channels}: convert them."
            )
        if height % stride or width % stride:
            raise UserError(
                f"images of {height} x {width} pixels cannot be encoded: both sides must be divisible by {stride}, the product of the strides."
            )
