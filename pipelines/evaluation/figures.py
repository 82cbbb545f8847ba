"""What is measured against what: samples, reconstructions and real images against real ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.metrics import (
    at_infinity,
    bootstrap,
    classifier_score,
    frechet_distance,
    kernel_distance,
    neighbours,
)
from pipelines.evaluation.sets import Seen
from vqvae2.codebook_stats import level_name, perplexity
from vqvae2.common.errors import UserError
from vqvae2.common.loading import some_rows
from vqvae2.inspection import Inspection, make_figures, make_verdicts
from vqvae2.model import VQVAE2

MOST_NEIGHBOURS = 10_000  # images of a set whose neighbours are looked for
FEWEST, MANY = 20, 500  # images of a class or set that say anything, and much

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)  # of the candidates that rejection keeps

Figures = dict[str, Any]


def refuse_too_few(name: str, number: int) -> None:
    """Raise a `UserError` for a source of so few training images that they say nothing."""
    if number < 2 * FEWEST:
        what = f"{name} has {number} training images, too few to compare with"
        raise UserError(f"{what}: give at least {2 * FEWEST}.")


def compare(real: Seen, fake: Seen) -> Figures:
    """All figures of a set beside a real one. Those with a list are: value and standard error
    (kernel, score) or the fit's (at infinity), or value and the ends of its 95 % interval."""
    # Distances of the distributions.
    number = len(fake.features)
    half = fake.choose(torch.tensor(some_rows(number, number // 2))).moments
    limit, limit_error = at_infinity(real.moments, fake.features)
    figures: Figures = {
        "count": fake.moments.count,
        "reference count": real.moments.count,
        "distance": frechet_distance(real.moments, fake.moments),
        f"distance of {half.count}": frechet_distance(real.moments, half),
        "distance at infinity": [limit, limit_error],
        "kernel distance": list(kernel_distance(real.features, fake.features)),
    }

    # Who lies among whom.
    near = neighbours(_some(real.features), _some(fake.features))
    for name, values in near._asdict().items():
        figures[name] = [values.mean().item(), *bootstrap(values)]
    if fake.probabilities is not None:
        figures["score"] = list(classifier_score(fake.probabilities))
    return figures


def compare_briefly(real: Seen, fake: Seen) -> Figures:
    """The figures that a table of many rows shows: of a class, or of a setting."""
    near = neighbours(_some(real.features), _some(fake.features))
    return {
        "count": len(fake.features),
        "distance": frechet_distance(real.moments, fake.moments),
        "kernel distance": kernel_distance(real.features, fake.features)[0],
        **{name: values.mean().item() for name, values in near._asdict().items()},
    }


def _some(features: Tensor) -> Tensor:
    return features[some_rows(len(features), MOST_NEIGHBOURS)]


def by_class(
    real: Seen, sets: Mapping[str, Seen], class_names: Sequence[str]
) -> tuple[Figures, dict[str, int]]:
    """Class -> name of a set -> figures, for classes of which all sets have enough images; and how
    many the smallest set has of each other class."""
    found: Figures = {}
    few: dict[str, int] = {}
    if real.labels is None or any(other.labels is None for other in sets.values()):
        return found, few
    for label, name in enumerate(class_names):
        own, others = real.of_class(label), {key: s.of_class(label) for key, s in sets.items()}
        if (number := min(len(part.rows) for part in (own, *others.values()))) >= FEWEST:
            found[name] = {key: compare_briefly(own, other) for key, other in others.items()}
        else:
            few[name] = number
    return found, few


def stage_1(model: VQVAE2, found: Inspection, lpips: float | None) -> Figures:
    """What `vqvae2 inspect` measures, bits per pixel, and LPIPS if it was measured."""
    # Bits, as all codes alike would need, and by how often each occurs.
    number, config = model.config.num_levels, model.config
    names = [level_name(level, number) for level in range(number)]
    height, width = config.image.height_width
    flat = entropy = 0.0
    for counts, (rows, columns) in zip(found.counts, config.grids, strict=True):
        share = rows * columns / (height * width)
        flat += share * math.log2(len(counts))
        entropy += share * math.log2(perplexity(counts))

    # Beside the rest.
    figures: Figures = make_figures(names, found)
    quality = figures["Reconstruction"]["all levels"]
    quality |= {"bits per pixel": flat, "bits per pixel by frequency": entropy}
    if lpips is not None:
        quality["LPIPS"] = lpips
    return {**figures, "verdicts": make_verdicts(names, found)}


def rejection(real: Seen, samples: Seen) -> list[Figures]:
    """Samples that a classifier finds likeliest to be of their class: figures for each share that
    is kept, always of as many images."""
    assert samples.labels is not None
    assert samples.probabilities is not None
    own = samples.probabilities.gather(1, samples.labels[:, None])[:, 0]
    rows = []
    for share in SHARES:
        kept: list[Tensor] = []
        for label in samples.labels.unique():
            places = (samples.labels == label).nonzero()[:, 0]
            number = round(SHARES[-1] * len(places))
            candidates = places[: round(number / share)]
            kept.append(candidates[own[candidates].argsort(descending=True, stable=True)[:number]])
        chosen = samples.choose(torch.cat(kept).sort().values)
        if len(chosen.rows) < 5 * FEWEST:  # of so few nothing can be said
            return []
        rows.append({"keep": share, **compare_briefly(real, chosen)})
    return rows
