"""Has it memorised? Whether samples are closer to training images than others are."""

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipelines.editing import log_likelihood
from pipelines.evaluation.metrics import nearest
from pipelines.evaluation.sets import ImageSet, Seen
from pipelines.pipeline import VQVAE2Pipeline
from vqvae2.codebook_stats import level_name
from vqvae2.common.pictures import num_columns, sheet, to_pil
from vqvae2.data import to_images
from vqvae2.model import VQVAE2

CLOSE = 0.05  # of other images, the closest, are as close to a training image as chance brings them
SIDE = 16  # pixels of the images whose pixels are compared
MOST_TRAINING, MOST_OTHERS = 20_000, 1000  # images whose pixels and codes are compared
MOST_RATED = 500  # images whose codes the priors rate
SHOWN = 24

Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def closeness(
    training: Tensor, others: Tensor | None, samples: Tensor, search: Search = nearest
) -> dict[str, Any]:
    """Figures of one space: `closer` is the share of samples that are as close to a training image
    as the closest `CLOSE` of other images, and `expected` their share; `places` and `nearest`, of
    the samples with the closest training images, are for pictures.

    Args:
        others: images that were not trained on; None: nothing says what is close.
        search: gives the distances and places `(N, 1)` of the nearest training images.
    """
    # The closest pairs.
    distances, places = (values[:, 0] for values in search(samples, training))
    order = distances.argsort(stable=True)[:SHOWN]
    figures: dict[str, Any] = {
        "count": len(samples),
        "median distance": distances.double().median().item(),
        "places": order.tolist(),
        "nearest": places[order].tolist(),
    }
    if others is None:
        return figures

    # As close as few others are; more than twice as often, and more than chance explains.
    known = search(others, training)[0][:, 0]
    limit = known.double().quantile(CLOSE)
    closer, expected = ((d <= limit).double().mean().item() for d in (distances, known))
    pooled = (closer * len(distances) + expected * len(known)) / (len(distances) + len(known))
    error = (pooled * (1 - pooled) * (1 / len(distances) + 1 / len(known))) ** 0.5
    figures["median distance of others"] = known.double().median().item()
    figures |= {"closer": closer, "expected": expected}
    figures["memorised"] = closer > max(2 * expected, expected + 3 * error)
    return figures


def small_pixels(images: ImageSet) -> Tensor:
    """Images `(N, C * h * w)` in [-1, 1], reduced to at most `SIDE` pixels a side."""
    rows = []
    for first in range(0, images.number, 500):
        pixels = to_images(images.pixels(range(first, min(first + 500, images.number))))
        size = min(SIDE, pixels.shape[2]), min(SIDE, pixels.shape[3])
        rows.append(F.adaptive_avg_pool2d(pixels, size).flatten(1))
    return torch.cat(rows)


def memorised(
    vqvae: VQVAE2 | None, train: Seen, held_out: Seen | None, made: Seen | None, samples: Seen
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """How close samples are to training images, by space (features, pixels, codes of a level); and
    the closest pairs, by space. `made` are the held-out images as they are reconstructed."""
    # Blurred images are close to many, so samples are compared with equally blurred ones.
    new, training = made or held_out, train.images
    known = new.features if new else None
    found = {"features": closeness(train.features, known, samples.features)}
    pairs = {"features": (samples.images.choose(samples.rows), training.choose(train.rows))}

    # Pixels and codes of some.
    some, few = training.some(MOST_TRAINING), samples.images.some(MOST_OTHERS)
    known = small_pixels(new.images.some(MOST_OTHERS)) if new else None
    found["pixels"] = closeness(small_pixels(some), known, small_pixels(few))
    pairs["pixels"] = few, some
    if vqvae is not None:
        size = vqvae.config.num_levels
        own, sampled, others = codes_of(vqvae, some), codes_of(vqvae, few), None
        if held_out is not None:
            others = codes_of(vqvae, held_out.images.some(MOST_OTHERS))
        for level in range(size):
            known = others[level] if others else None
            figures = closeness(own[level], known, sampled[level], hamming)
            found[f"codes, {level_name(level, size)}"] = figures
    sheets = {name: pairs_sheet(*pair, found[name]) for name, pair in pairs.items()}
    for figures in found.values():
        del figures["places"], figures["nearest"]
    return found, sheets


@torch.no_grad()
def codes_of(vqvae: VQVAE2, images: ImageSet) -> list[Tensor]:
    """The codes `(N, h, w)` int64 of every level: kept ones, or those of the images."""
    if images.codes is not None:
        return images.codes(range(images.number))
    batches = []
    for first in range(0, images.number, 100):
        pixels = images.pixels(range(first, min(first + 100, images.number)))
        encoded = vqvae.encode(to_images(pixels.to(vqvae.device)))
        batches.append([level.codes.cpu() for level in encoded])
    return [torch.cat(level) for level in zip(*batches, strict=True)]


def hamming(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest share of codes that differ, and where, both `(N, 1)`, of grids `(N, h, w)`."""
    one, other = (grids.flatten(1).to(torch.int32) for grids in (rows, others))
    distances, places = [], []
    for row in one:
        values, place = (other != row).sum(dim=1).min(dim=0)
        distances.append(values / one.shape[1])
        places.append(place)
    return torch.stack(distances)[:, None], torch.stack(places)[:, None]


def prior_gaps(
    pipeline: VQVAE2Pipeline, training: ImageSet, held_out: ImageSet, *, same_classes: bool
) -> dict[str, dict[str, float]]:
    """Level -> bits per code of training and of held-out images. Without their classes the labels
    are hidden, and so are conditions; nothing if they cannot be."""
    bits: list[list[float]] = []
    positions = torch.tensor([prior.config.num_positions for prior in pipeline.priors])
    for images in (training.some(MOST_RATED), held_out.some(MOST_RATED)):
        codes, labels = codes_of(pipeline.vqvae, images), list(images.labels or [])
        if not (same_classes and labels):
            if pipeline.class_names and not pipeline.can_hide_labels:
                return {}
            labels = [len(pipeline.class_names)] * images.number if pipeline.class_names else []
        vectors = images.vectors_for(pipeline)
        if pipeline.vector_size and vectors is None and not pipeline.can_hide_all:
            return {}
        sums = torch.zeros(len(positions), dtype=torch.float64)
        for first in range(0, images.number, 50):
            part = slice(first, first + 50)
            batch = [grid[part] for grid in codes]
            own = vectors[part] if vectors is not None else None
            sums += log_likelihood(pipeline.priors, batch, labels[part], own).sum(dim=0)
        bits.append((-sums / images.number / positions / math.log(2)).tolist())
    gaps = {}
    for level, (known, new) in enumerate(zip(*bits, strict=True)):
        figures = {"training": known, "held out": new, "gap": new - known}
        gaps[level_name(level, len(positions))] = figures
    return gaps


def pairs_sheet(samples: ImageSet, training: ImageSet, figures: dict[str, Any]) -> Image.Image:
    """The closest pairs of `closeness`, each sample above its training image."""
    columns = num_columns(len(figures["places"]), 2)
    rows = []
    for first in range(0, len(figures["places"]) // columns * columns, columns):
        for images, key in ((samples, "places"), (training, "nearest")):
            rows.append(to_pil(to_images(images.pixels(figures[key][first : first + columns]))))
    return sheet(rows, ["sample", "nearest training"] * (len(rows) // 2))
