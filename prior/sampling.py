"""Drawing codes from logits: temperature, top-k, top-p, and random numbers that belong to an image rather than to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits `(B, K)` to the probabilities `(B, K)`, in float64, that codes are drawn with; temperature 0 is not for here."""
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    result = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        ordered, order = result.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of the codes more likely than this one
        dropped = torch.zeros_like(result, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        result = result.masked_fill(dropped, 0)
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
    return torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


def uniforms(seeds: Sequence[int], level: int, num_positions: int) -> Tensor:
    """Uniform numbers in [0, 1), `(B, num_positions)` float64: a function of (image's seed, level, position) alone.

    They come from NumPy's counter-based generator Philox, so an image gets the same numbers in any batch, order or process.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, level])).random(num_positions) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def image_seeds(seed: int, first: int, number: int) -> list[int]:
    """A seed for each of `number` images from index `first` on: a function of (seed, index) alone."""
    return [int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) for index in range(first, first + number)]
