"""The patch discriminator, and the pair that is trained with it (Esser et al. 2021, VQGAN)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vqvae2.code_noise import CodeNoise
from vqvae2.config import DiscriminatorConfig
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantized

RAMP = 500  # steps over which the weight of fooling it rises from 0 to its own


class PatchDiscriminator(nn.Sequential):
    """One logit for each patch of an image, high for real ones (Isola et al. 2017, section 3.2).

    With group instead of batch normalisation, so that a logit depends neither on what else is in
    the batch nor on how a batch is split over processes.
    """

    def __init__(self, in_channels: int, config: DiscriminatorConfig) -> None:
        base, halvings = config.hidden_channels, config.num_layers
        widths = [base * min(2**i, 8) for i in range(halvings + 1)]
        first = nn.Conv2d(in_channels, base, kernel_size=4, stride=2, padding=1)
        layers: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < halvings else 1
            layer = nn.Conv2d(before, after, kernel_size=4, stride=stride, padding=1, bias=False)
            layers += [layer, nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class AdversarialOutput(NamedTuple):
    """What the pair makes of a batch of images; the logits are `(B, 1, h', w')`."""

    reconstruction: Tensor
    """`(B, C, H, W)`."""
    levels: tuple[Quantized, ...]
    """What each level was quantized to, coarse to fine."""
    fooling: Tensor | None
    """Logits of the reconstruction; their gradient reaches the autoencoder alone. None as long as
    they do not count."""
    fake: Tensor
    """The same logits; their gradient reaches the discriminator alone."""
    real: Tensor
    """Logits of the images."""
    ramp: Tensor
    """`()`, the share of their weight with which they count."""


class AdversarialPair(nn.Module):
    """An autoencoder and its discriminator as one module to train; it saves the autoencoder.

    The discriminator learns from the first batch on. The autoencoder is to fool it after
    `start_step`, and then more and more over `RAMP` steps: a sudden new pull makes Adam leap and
    the codebooks collapse. `num_parts` forward passes make a step.
    """

    num_forwards: Tensor

    def __init__(
        self, autoencoder: VQVAE2 | CodeNoise, config: DiscriminatorConfig, num_parts: int = 1
    ) -> None:
        super().__init__()
        self.config, self.autoencoder = config, autoencoder
        self.start, self.ramp = (config.start_step - 1) * num_parts, RAMP * num_parts
        self.number: int | None = None  # of forward passes so far; read from the device once
        self.discriminator = PatchDiscriminator(autoencoder.config.image.channels, config)
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> AdversarialOutput:
        """Images `(B, C, H, W)` in [-1, 1] to reconstructions and logits."""
        # Whether it is to be fooled already.
        self.number = int(self.num_forwards) if self.number is None else self.number + 1
        ramp = ((self.num_forwards - self.start) / self.ramp).clamp(0, 1).to(images.dtype)
        self.num_forwards += 1
        reconstruction, levels = self.autoencoder(images)
        fooling = None
        if self.number > self.start:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            fooling = functional_call(self.discriminator, frozen, (reconstruction,))
            fooling = fooling.to(images.dtype)

        # What it makes of both.
        both = torch.cat([reconstruction.detach().to(images.dtype), images])  # (2B, C, H, W)
        fake, real = self.discriminator(both).to(images.dtype).chunk(2)
        return AdversarialOutput(reconstruction, levels, fooling, fake, real, ramp)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the autoencoder's networks (torch.compile, in place)."""
        self.autoencoder.compile(*args, **kwargs)

    def parameter_groups(self) -> Sequence[Mapping[str, Any]]:
        """The optimizer's groups: the discriminator learns by AdamW, at its own rate."""
        rate, betas = self.config.learning_rate_factor, self.config.adam_betas
        own = {"rate": rate, "betas": betas, "muon": False}
        discriminator = {"params": list(self.discriminator.parameters()), **own}
        return [{"params": list(self.autoencoder.parameters())}, discriminator]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the autoencoder as a folder."""
        self.autoencoder.save_pretrained(save_directory)
