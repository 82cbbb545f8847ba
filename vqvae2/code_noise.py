"""A decoder that tolerates wrong codes: in training, some are replaced before it reads them.

Letters: B batch, D code dimension, h w code grid, K codebook size, n neighbours.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqvae2.distributed import random_integers, rank, world_size
from vqvae2.model import VQVAE2, VQVAE2Output
from vqvae2.nearest import neighbours
from vqvae2.quantizers import Quantized

NEAR = 1 / 40  # share of a codebook that is near to a code (RobusTok: 100 of 4,096)


class CodeNoise(nn.Module):
    """An autoencoder whose image decoder learns to read codes that are wrong here and there, as
    those of priors are (Qiu et al. 2025, RobusTok); it saves the autoencoder.

    In a share of the images codes are replaced by near neighbours in the codebook: how many, from
    none to all, is drawn for each image (in the paper it falls from all to half, by epoch).
    Encoders, codebooks and commitment see the true codes; gradients pass straight through.

    Args:
        autoencoder: the model to train.
        share: of the images.
        decoder_only: only the image decoder learns. All that decides the codes stays as it is,
            counters too, so that codes and priors of this autoencoder remain valid.
    """

    num_forwards: Tensor

    def __init__(self, autoencoder: VQVAE2, share: float, *, decoder_only: bool = False) -> None:
        super().__init__()
        self.autoencoder, self.config = autoencoder, autoencoder.config
        self.share, self.decoder_only = share, decoder_only
        self._near: dict[nn.Module, Tensor] = {}  # what was found out of codebooks that stay
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        if decoder_only:
            autoencoder.requires_grad_(False)
            autoencoder.image_decoder.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation; codebooks that are to stay remain in evaluation."""
        super().train(mode)
        if self.decoder_only:
            self.autoencoder.eval()
        return self

    def forward(self, images: Tensor) -> VQVAE2Output:
        """Encode and decode images `(B, C, H, W)` in [-1, 1]."""
        levels = self.autoencoder.encode(images)
        embeddings = [level.embeddings for level in levels]
        if self.training:
            if self.share:
                added = zip(embeddings, self._noise(levels), strict=True)
                embeddings = [embedding + noise for embedding, noise in added]
            embeddings = self.autoencoder.drop_finer_levels(embeddings, self.num_forwards)
            self.num_forwards += 1
        return VQVAE2Output(self.autoencoder.decode(embeddings), levels)

    @torch.no_grad()
    def _noise(self, levels: Sequence[Quantized]) -> list[Tensor]:
        """What turns each level's embeddings `(B, D, h, w)` into those of the replaced codes."""
        # Random numbers of the joint batch: two for each image and one for each code. They are
        # counted below zero, where level dropout, which counts upwards, takes none.
        sizes = [level.codes[0].numel() for level in levels]
        shape = world_size(), len(levels[0].codes), 2 + sum(sizes)
        numbers = random_integers(-1 - self.num_forwards, shape[0] * shape[1] * shape[2])
        first, second, *others = numbers.view(shape)[rank()].split([1, 1, *sizes], dim=1)
        replaced = _uniform(second) * (_uniform(first) < self.share)  # share of the codes, (B, 1)

        # Each replaced code becomes one of its n neighbours.
        noise: list[Tensor] = []
        quantizers: Any = self.autoencoder.quantizers
        codebook_sizes = self.config.codebook_size_per_level
        together = zip(quantizers, levels, others, codebook_sizes, strict=True)
        for quantizer, level, number, size in together:
            near = self._neighbours(quantizer, size, number.device)
            codes = level.codes.flatten(start_dim=1)  # (B, h*w)
            neighbour = near[codes, (number >> 20) % near.shape[1]]
            codes = torch.where(_uniform(number) < replaced, neighbour, codes)
            new = quantizer.lookup(codes.view_as(level.codes))
            noise.append(new - quantizer.lookup(level.codes))
        return noise

    def _neighbours(self, quantizer: Any, size: int, device: torch.device) -> Tensor:
        """The neighbours `(K, n)` of each code; of codebooks that stay they are found once."""
        if quantizer in self._near:
            return self._near[quantizer]
        every = torch.arange(size, device=device)
        codebook = quantizer.lookup(every[None, None])[0, :, 0].T  # (K, D)
        near = neighbours(codebook, min(math.ceil(size * NEAR), size - 1))
        if self.decoder_only:
            self._near[quantizer] = near
        return near

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the autoencoder's networks (torch.compile, in place)."""
        self.autoencoder.compile(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the autoencoder as a folder."""
        self.autoencoder.save_pretrained(save_directory)


def _uniform(numbers: Tensor) -> Tensor:
    """Random integers' last 20 bits as numbers in [0, 1)."""
    return numbers % 2**20 / 2**20
