"""Drawing codes from logits: temperature, top-k, top-p, min-p, guidance, and random numbers that belong to an image rather than to a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.config import check


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the codes of one level are drawn from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most likely code."""
    top_k: int | None = None
    """Only the k most likely codes."""
    top_p: float | None = None
    """Only the smallest set of most likely codes whose probability reaches p (Holtzman et al. 2020), after top_k."""
    min_p: float | None = None
    """Only codes at least this share as likely as the most likely one (Nguyen et al. 2024), after top_p."""
    guidance_scale: float = 1.0
    """Classifier-free guidance (Ho and Salimans 2022): how far to go from the logits without the label to those with it; 1 is the prior itself."""

    def __post_init__(self) -> None:
        check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        check(self.min_p is None or 0 < self.min_p <= 1, "min_p", self.min_p, "in (0, 1]")
        check(
            0 <= self.guidance_scale < math.inf, "guidance_scale", self.guidance_scale, "0 or more"
        )

    @property
    def guided(self) -> bool:
        """Whether logits without the label are needed too."""
        return self.guidance_scale != 1


class Known(NamedTuple):
    """Codes of one level that are given rather than drawn."""

    codes: Tensor
    """`(B, h, w)` int64."""
    mask: Tensor
    """`(B, h, w)` bool: where the codes are known."""

    def instead_of(self, drawn: Tensor, position: int) -> Tensor:
        """The codes `(B,)` at a position: the known ones, else those drawn."""
        return torch.where(
            self.mask.flatten(1)[:, position], self.codes.flatten(1)[:, position], drawn
        )

    def spread(self, first: int, number: int) -> "Known":
        """The images `first` to `first + number`; where there are none (before 0, after the last), nothing is known."""
        rows = torch.arange(first, first + number)
        inside = (rows >= 0) & (rows < len(self.codes))
        rows = rows.clamp(0, len(self.codes) - 1).to(self.codes.device)
        return Known(self.codes[rows], self.mask[rows] & inside[:, None, None].to(self.mask.device))


def guide(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits `(2B, K)`, with labels and then without, to guided ones `(B, K)`: without + scale (with - without). Unguided ones stay as they are."""
    if not sampling.guided:
        return logits
    labelled, unlabelled = logits.chunk(2)
    return unlabelled + sampling.guidance_scale * (labelled - unlabelled)


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits `(B, K)` to the probabilities `(B, K)`, in float64, that codes are drawn with; temperature 0 is not for here."""
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        likeliest = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, likeliest.indices, likeliest.values
        )
    result = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        ordered, order = result.sort(dim=-1, descending=True, stable=True)
        before = (
            ordered.cumsum(dim=-1) - ordered
        )  # probability of the codes more likely than this one
        dropped = torch.zeros_like(result, dtype=torch.bool).scatter(
            -1, order, before >= sampling.top_p
        )
        result = result.masked_fill(dropped, 0)
        result = result / result.sum(dim=-1, keepdim=True)
    if sampling.min_p is not None:
        result = result.masked_fill(result < sampling.min_p * result.amax(dim=-1, keepdim=True), 0)
        result = result / result.sum(dim=-1, keepdim=True)
    return result


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """One code per row: the inverse of the cumulative distribution at a uniform number.

    Args:
        logits: `(B, K)`.
        uniforms: `(B,)` in [0, 1).

    Returns:
        `(B,)` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = probabilities(logits, sampling).cumsum(dim=-1)
    # Scaled by the last entry, which is 1 up to rounding, so that the drawn code always has a probability above zero.
    return torch.searchsorted(
        cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True
    )[:, 0]


def uniforms(seeds: Sequence[int], level: int, num_positions: int) -> Tensor:
    """Uniform numbers in [0, 1), `(B, num_positions)` float64: a function of (image's seed, level, position) alone.

    They come from NumPy's counter-based generator Philox, so an image gets the same numbers in any batch, order or process.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, level])).random(
            num_positions
        )
        for seed in seeds
    ]
    return torch.from_numpy(np.stack(rows))


def image_seeds(seed: int, first: int, number: int) -> list[int]:
    """A seed for each of `number` images from index `first` on: a function of (seed, index) alone."""
    return [
        int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        for index in range(first, first + number)
    ]
