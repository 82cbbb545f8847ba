"""How likely images are under a trained pipeline, as a whole and place by place.

An image is unusual if its codes take more bits than the priors expected before they saw each (a
simple image takes few, but few are expected too), and by its worst place: one that takes many bits,
or is badly reconstructed (what no code shows), or changes much when the priors draw it anew.
benchmarks/anomaly.py chose how these are joined.

Letters: B images, L levels, h w a level's code grid, H W pixels, N classes.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from prior.base import Prior
from prior.probes import nats_per_position, rows_for
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.pictures import to_pil
from vqvae2.common.torch_settings import exact_convolutions
from vqvae2.model import VQVAE2

ALL = "all"  # labels: every class in turn
BATCH = 32  # images scored at once
TYPICAL_ERROR = 0.02  # where it is not known what held-out images had
HEALED = 12.0  # where the unusual map is above, without a calibration, codes are drawn anew
REDRAWN = 9.0  # where the unusual map is above, or close to it, `redraws` look at the image again
NORMAL_NAME = "normal.json"  # in a pipeline's folder: how unusual normal images are


@dataclass(frozen=True)
class Scores:
    """What `pipeline.score` returns, on the CPU."""

    score: Tensor  #: (B,) float64: how unusual the image is, to compare with other images
    bits: Tensor  #: (B, L) float64: -log2 p of each level's codes, given the coarser ones
    expected_bits: Tensor  #: (B, L) float64: what the priors expected of these: their entropies
    png_bits: Tensor  #: (B,) float64: the image as a PNG file: its complexity without any model
    bits_map: tuple[Tensor, ...]  #: (B, h, w) per level: the bits of each code
    excess_map: tuple[Tensor, ...]  #: (B, h, w) per level: the bits beyond the expected ones
    reconstruction_error: Tensor  #: (B, H, W): squared, in [-1, 1], the mean over channels
    unusual_map: Tensor  #: (B, H, W): all levels' bits, the error and what redraws change, joined
    bits_by_label: Tensor | None = None
    """(B, N) float64: all levels' bits under each class, for `labels="all"`; the other fields are
    then those of the class that explains the image best (`argmin`)."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The scores of several batches as one's."""
        return cls(**_by_field(parts, torch.cat))

    def columns(self, class_names: Sequence[str]) -> dict[str, np.ndarray]:
        """What a table says of the images: column -> `(B,)`."""
        total = self.bits.sum(dim=1)
        values = {"score": self.score, "bits": total}
        values["bits_per_code"] = total / self.codes_per_image
        values |= {f"bits_{level}": column for level, column in enumerate(self.bits.T)}
        values["excess_bits"] = total - self.expected_bits.sum(dim=1)
        values["bits_per_png_bit"] = total / self.png_bits
        values["error"] = self.reconstruction_error.mean(dim=(1, 2))
        columns = {name: column.numpy() for name, column in values.items()}
        if self.bits_by_label is not None:
            columns["best_label"] = np.array(self.best_labels(class_names))
            for name, column in zip(class_names, self.bits_by_label.T, strict=True):
                columns[f"bits_of_{name}"] = column.numpy()
        return columns

    def best_labels(self, class_names: Sequence[str]) -> list[str]:
        """The class that explains each image best, for `labels="all"`."""
        if self.bits_by_label is None:
            raise ValueError("these are not the scores of all classes")
        return [class_names[place] for place in self.bits_by_label.argmin(dim=1).tolist()]

    @property
    def codes_per_image(self) -> int:
        """Of all levels."""
        return sum(grid[0].numel() for grid in self.bits_map)

    @property
    def cell(self) -> int:
        """The side of a cell of the finest grid, in pixels."""
        return self.unusual_map.shape[1] // self.bits_map[-1].shape[1]


def _by_field(parts: Sequence[Scores], join: Any) -> dict[str, Any]:
    """Each field of the parts, joined (level by level)."""
    joined: dict[str, Any] = {}
    for field in fields(Scores):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], tuple):
            joined[field.name] = tuple(join(level) for level in zip(*values, strict=True))
        elif values[0] is not None:
            joined[field.name] = join(values)
    return joined


@torch.no_grad()
@exact_convolutions()
def score_batch(
    vqvae: VQVAE2,
    priors: Sequence[Prior],
    images: Tensor,
    tried: Sequence[Tensor],
    usual_error: float,
) -> list[Scores]:
    """The scores of images `(B, C, H, W)` in [-1, 1] under each of the labels `(B,)` that are tried
    (priors without classes leave them alone), by an autoencoder with this error on held-out images.
    """
    # How far the reconstruction is from the image.
    images = images.to(vqvae.device)
    codes = [level.codes for level in vqvae.encode(images)]
    decoded = vqvae.decode_codes(codes).float().clamp(-1, 1)
    error = reduce((decoded - images).square(), "b c h w -> b h w", "mean").cpu()
    png = torch.tensor([png_bits(image) for image in to_pil(images)], dtype=torch.float64)

    facts = vqvae.config.codebook_size_per_level, error, png, usual_error
    return [score_codes(priors, codes, labels, *facts) for labels in tried]


@torch.no_grad()
def score_codes(
    priors: Sequence[Prior],
    codes: Sequence[Tensor],
    labels: Tensor,
    codebook_sizes: Sequence[int],
    error: Tensor,
    png: Tensor,
    usual_error: float,
) -> Scores:
    """The scores of codes under labels; the images' errors `(B, H, W)` and bits as PNG files `(B,)`
    are known."""
    # How surprising each code is.
    bits: list[Tensor] = []
    expected: list[Tensor] = []
    for prior in priors:
        both = nats_per_position(prior, rows_for(prior, codes, labels))
        for grids, nats in zip((bits, expected), both, strict=True):
            grids.append(nats.cpu() / math.log(2))
    excess = tuple(own - most for own, most in zip(bits, expected, strict=True))

    # Both brought to pixels: the mean over the levels of bits as a share of what random codes take,
    # around each place as far as the next cells; and the error, in a cell, by what is usual.
    size, share = error.shape[1:], torch.zeros_like(error)
    for grid, number in zip(bits, codebook_sizes, strict=True):
        large = F.interpolate(grid[:, None], size, mode="bilinear")[:, 0]
        share += large / math.log2(number) / len(bits)
    cell = size[0] // bits[-1].shape[1]
    near = around(error, cell // 2) / (2 * usual_error)
    unusual = 8 * around(share, cell) + 2 * near.sqrt()

    total, most = (
        torch.stack([grid.double().sum(dim=(1, 2)) for grid in of], dim=1)
        for of in (bits, expected)
    )
    codes_per_image = sum(grid[0].numel() for grid in bits)
    score = overall(total - most, codes_per_image, unusual)
    return Scores(score, total, most, png, tuple(bits), excess, error, unusual)


def overall(excess: Tensor, codes_per_image: int, unusual: Tensor) -> Tensor:
    """Excess bits of images `(B, L)`, and their worst place `(B, H, W)`, in one score `(B,)`; its
    constants fit how far both spread over normal images, here of Fashion-MNIST."""
    worst = unusual.double().amax(dim=(1, 2)).clamp(min=1e-9)
    return excess.sum(dim=1) / codes_per_image**0.5 / 4 + 8 * worst.log()


def to_redraw(scores: Scores) -> Tensor:
    """Where images are unusual enough to be drawn anew, and around it: bool `(B, H, W)`."""
    unusual = (scores.unusual_map > REDRAWN).float()
    reach = scores.cell // 2
    return F.max_pool2d(unusual[:, None], 2 * reach + 1, 1, reach)[:, 0].bool()


def with_redraws(scores: Scores, images: Tensor, drawn: Tensor, usual_error: float) -> Scores:
    """The scores of images `(B, C, H, W)`, to whose maps is added how far their redraws
    `(N, B, C, H, W)` are from them, on average."""
    changed = reduce((drawn - images).square(), "n b c h w -> n b h w", "mean")
    near = torch.stack([around(maps, scores.cell // 4) for maps in changed]) / (2 * usual_error)
    unusual = scores.unusual_map + near.sqrt().mean(dim=0)
    score = overall(scores.bits - scores.expected_bits, scores.codes_per_image, unusual)
    return replace(scores, unusual_map=unusual, score=score)


def around(maps: Tensor, reach: int) -> Tensor:
    """The mean of maps `(B, H, W)` over the square that reaches so far from each pixel."""
    mean = F.avg_pool2d(maps[:, None], 2 * reach + 1, 1, reach, count_include_pad=False)
    return mean[:, 0]


def typical_error(trainings: Mapping[str, Any]) -> float:
    """The autoencoder's mean squared error on held-out images, if its training recorded it."""
    with suppress(LookupError, TypeError, ValueError):
        return float(trainings["vqvae"]["held_out"]["mse"])
    return TYPICAL_ERROR


def png_bits(picture: Any) -> int:
    """The size of a picture as a PNG file, in bits."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return 8 * file.tell()


def best_label(tried: Sequence[Scores]) -> Scores:
    """The scores under every class, in turn, as those of the best: see `Scores.bits_by_label`."""
    by_label = torch.stack([scores.bits.sum(dim=1) for scores in tried], dim=1)
    best, every = by_label.argmin(dim=1), torch.arange(len(by_label))
    chosen = _by_field(tried, lambda values: torch.stack(tuple(values))[best, every])
    return Scores(**chosen, bits_by_label=by_label)


@dataclass(frozen=True)
class Normal:
    """How unusual unseen normal images are, and how unusual their most unusual place:
    of a new normal image, either is among the highest k of n + 1 with probability k / (n + 1)
    (conformal prediction)."""

    labels: str | None  #: under which they were scored
    pipeline_hash: str
    scores: tuple[float, ...]
    places: tuple[float, ...]
    redraws: int = 0  #: with which they were scored

    @classmethod
    def load(cls, folder: Path, labels: str | None, redraws: int, pipeline_hash: str) -> Self:
        """What was stored in a pipeline's folder, or a `UserError` if there is nothing, or if it
        is of another pipeline or was scored otherwise."""
        path = folder / NORMAL_NAME
        if not path.exists():
            what = f"{folder} does not know how unusual normal images are"
            raise UserError(f"{what}: run vqvae2 score --calibrate on some it was not trained on.")
        stored = from_dict(cls, read_json(path), str(path))
        if stored.pipeline_hash != pipeline_hash:
            what = f"{path} is of other weights of the pipeline"
            raise UserError(f"{what}: run vqvae2 score --calibrate again.")
        if (stored.labels, stored.redraws) != (labels, redraws):
            what = f"{path} is of {stored.settings}"
            raise UserError(f"{what}: give these, or run vqvae2 score --calibrate again.")
        return stored

    @property
    def settings(self) -> str:
        """How images are scored that may be compared with these, in words."""
        return f"labels = {self.labels!r} and redraws = {self.redraws}"

    def save(self, folder: Path) -> None:
        """Store it in a pipeline's folder."""
        write_json(folder / NORMAL_NAME, asdict(self))

    def thresholds(self, rate: float) -> tuple[float, float]:
        """What scores and places must exceed to be marked, so that of normal images at most this
        share is. Raises a `UserError` if that takes more images than there are."""
        rank = math.floor(rate * (len(self.scores) + 1) + 1e-9)
        if rank < 1:
            number = math.ceil(1 / rate) - 1
            what = f"a false-alarm rate of {rate:g} takes {number} normal images"
            least = math.ceil(1e4 / (len(self.scores) + 1)) / 1e4
            given = f"{len(self.scores)} were given to --calibrate"
            raise UserError(f"{what}, but {given}: give more, or a rate of at least {least:g}.")
        return sorted(self.scores)[-rank], sorted(self.places)[-rank]

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """The smallest rate at which each score would be marked, `(B,)`."""
        higher = len(self.scores) - np.searchsorted(np.sort(self.scores), scores, side="left")
        return (1 + higher) / (len(self.scores) + 1)
