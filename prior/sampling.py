"""Drawing codes from logits: temperature, top-k, top-p, min-p, guidance; seeds of images.

Letters: B batch, h w code grid, T = h*w positions in raster order, K codebook size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from prior.config import PriorConfig
from vqvae2.common.config import Config, check, check_whole
from vqvae2.common.errors import UserError

# Of what the same seed gives. 1 inverted the cumulative distribution; since 3 some PixelSNAILs draw
# whole grids, and their logits have other last bits, as have those of grids of 32 x 32 and more on
# a GPU since 4, where they were compiled before.
SAMPLER_VERSION = 4


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How the codes of one level are drawn from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most likely code."""
    top_k: int | None = None
    """Only the k most likely codes."""
    top_p: float | None = None
    """After top_k, only the likeliest codes that together reach p (Holtzman et al. 2020)."""
    min_p: float | None = None
    """After top_p, only codes at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance (Ho and Salimans 2022): how far to go from the logits without the
    label to those with it; 1 is the prior itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("temperature", "guidance_scale"):
            check(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "0 or more")
        fits = self.temperature == 0 or self.temperature >= 1e-6
        check(fits, "temperature", self.temperature, "0, or at least 0.000001")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        check(self.min_p is None or 0 < self.min_p <= 1, "min_p", self.min_p, "in (0, 1]")

    @property
    def guided(self) -> bool:
        """Whether logits without the label are needed too."""
        return self.guidance_scale != 1

    @property
    def filters(self) -> bool:
        """Whether some codes are never drawn."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    @classmethod
    def per_level(cls, num_levels: int, **settings: Any) -> list[Self]:
        """One configuration per level, of settings that are one value or one per level; None, or
        no value, leaves the default. A `UserError` names a wrong value or number of values."""
        levels: list[dict[str, Any]] = [{} for _ in range(num_levels)]
        for name, value in settings.items():
            given = value.tolist() if isinstance(value, np.ndarray) else value
            is_one = isinstance(given, str) or not isinstance(given, Sequence)
            values = [given] if is_one else list(given)
            if len(values) == 1:
                values *= num_levels
            if values and len(values) != num_levels:
                number = (
                    f"{name} has {len(values)} values, but the number of levels is {num_levels}"
                )
                raise UserError(f"{number}: give one value, or one per level.")
            for level, of_level in zip(levels, values, strict=False):
                if of_level is not None:
                    level[name] = of_level
        return [cls(**level) for level in levels]


class Known(NamedTuple):
    """Codes of one level that are given rather than drawn."""

    codes: Tensor  #: (B, h, w) int64
    mask: Tensor  #: (B, h, w) bool: where the codes are given

    def spread(self, first: int, number: int) -> "Known":
        """The images from `first` on; for those that do not exist nothing is given."""
        rows = torch.arange(first, first + number)
        inside = (rows >= 0) & (rows < len(self.codes))
        rows = rows.clamp(0, len(self.codes) - 1)
        return Known(self.codes[rows], self.mask[rows] & inside[:, None, None].to(self.mask.device))


def check_inputs(
    config: PriorConfig,
    batch_size: int,
    condition: Any,
    labels: Any,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    known: Known | None,
) -> None:
    """Raise a `UserError` for what the prior cannot draw from: a wrong shape, type or value of the
    condition, labels, seeds or known codes, or guidance that it is not made for."""
    # The shapes of the condition, and the range of the labels.
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    classes, level = config.num_classes, config.level
    expected: list[Any] = [(batch_size, *grid) for grid in config.grids[:-1]]
    if config.vector_size:
        expected.append((batch_size, config.vector_size))
    shapes = [tuple(codes.shape) for codes in condition]
    if shapes != expected:
        raise UserError(f"the condition has shapes {shapes}, but level {level} expects {expected}.")
    if (labels is None) != (classes == 0):
        raise UserError(f"the prior has {classes} classes: give {'' if classes else 'no '}labels.")
    if labels is not None:
        check(labels.shape == (batch_size,), "labels' shape", tuple(labels.shape), f"{batch_size},")
        low, high = int(labels.min()), int(labels.max())
        highest = classes if config.label_dropout else classes - 1
        if low < 0 or high > highest:
            raise UserError(f"labels range from {low} to {high}, but must be from 0 to {highest}.")
    check_guidance(config, sampling)

    # Seeds and known codes.
    if len(seeds) != batch_size:
        raise UserError(f"there are {len(seeds)} seeds for {batch_size} images: give one each.")
    for seed in seeds:
        check_whole("a seed", seed, 0)
        check(seed < 2**64, "a seed", seed, "at most 2**64 - 1")
    if known is not None:
        _check_known(config, batch_size, known)


def _check_known(config: PriorConfig, batch_size: int, known: Known) -> None:
    shape, size = (batch_size, *config.grids[-1]), config.codebook_sizes[-1]
    for name, dtype, given in (
        ("codes", torch.int64, known.codes),
        ("mask", torch.bool, known.mask),
    ):
        found = (given.dtype, tuple(given.shape)) if isinstance(given, Tensor) else type(given)
        if found != (dtype, shape):
            raise UserError(f"known {name} are {found}, but must be a tensor {dtype} {shape}.")
    given = known.codes.where(known.mask, 0)
    if not bool(((given >= 0) & (given < size)).all()):  # waits for a GPU once
        low, high = int(given.min()), int(given.max())
        allowed = f"from 0 to {size - 1}"
        raise UserError(f"known codes range from {low} to {high}, but must be {allowed}.")


def check_guidance(config: PriorConfig, sampling: SamplingConfig) -> None:
    """Raise a `UserError` for guidance of a prior that knows no logits without label and vector."""
    if sampling.guided and not config.can_be_guided:
        conditional = config.num_classes or config.vector_size
        lacking = f"the prior of level {config.level} was trained without "
        lacking += "label dropout" if conditional else "classes"
        advice = "leave it at 1, or retrain with --label-dropout 0.1"
        raise UserError(f"guidance_scale is {sampling.guidance_scale}, but {lacking}: {advice}.")


def guide(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Guided logits `(B, ...)`, without label + scale * (with label - without label), of logits
    `(2B, ...)` with labels and then without; unguided ones `(B, ...)` stay as they are."""
    if not sampling.guided:
        return logits
    labelled, unlabelled = logits.chunk(2)
    return unlabelled + sampling.guidance_scale * (labelled - unlabelled)


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The probabilities of drawing each code, `(..., K)` float64, of logits `(..., K)`, at a
    temperature above 0."""
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        values, codes = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, codes, values)
    result = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        # A code is dropped if the more likely ones reach p without it.
        ordered, order = result.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(result, dtype=torch.bool)
        dropped = dropped.scatter(-1, order, before >= sampling.top_p)
        result = result.masked_fill(dropped, 0)
        result = result / result.sum(dim=-1, keepdim=True)
    if sampling.min_p is not None:
        least = sampling.min_p * result.amax(dim=-1, keepdim=True)
        result = result.masked_fill(result < least, 0)
        result = result / result.sum(dim=-1, keepdim=True)
    return result


def draw(logits: Tensor, noise: Tensor, sampling: SamplingConfig) -> Tensor:
    """One code for each row, `(...)` int64, of logits and Gumbel noise `(..., K)`: the argmax of
    their sum has the distribution that `probabilities` gives. The code of a row that holds NaN or
    an infinite logit is K."""
    scores = logits
    if sampling.temperature:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
        if sampling.filters:
            scores = scores.masked_fill(probabilities(logits, sampling) == 0, -torch.inf)
        scores = scores + noise
    best, codes = scores.max(dim=-1)
    return torch.where(best.isfinite(), codes, logits.shape[-1])


def image_seeds(seed: int, first: int, number: int) -> list[int]:
    """A seed for each of `number` images from index `first` on: a function of (seed, index)."""
    sequences = [np.random.SeedSequence([seed, i]) for i in range(first, first + number)]
    return [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]


def in_lanes(wanted: range, lanes: int) -> list[range]:
    """Cut the indices of images into batches that are sampled together, image i in lane i % lanes.

    The last bits of a matrix product depend on its shape. All lanes are always computed, whether an
    image was asked for or not, so that an image's bits depend on nothing but the image itself.
    """
    firsts = range(wanted.start // lanes * lanes, wanted.stop, lanes)
    return [range(max(i, wanted.start), min(i + lanes, wanted.stop)) for i in firsts]
