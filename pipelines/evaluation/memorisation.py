"""Has it learned by heart? Whether samples are closer to training images than others are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipelines.editing import log_likelihood
from pipelines.evaluation.metrics import nearest
from pipelines.evaluation.sets import ImageSet
from prior.base import Prior
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
        size = [min(SIDE, side) for side in pixels.shape[2:]]
        rows.append(F.adaptive_avg_pool2d(pixels, size).flatten(1))
    return torch.cat(rows)


@torch.no_grad()
def codes_of(vqvae: VQVAE2, images: ImageSet) -> list[Tensor]:
    """The codes `(N, h, w)` int64 of every level."""
    batches = []
    for first in range(0, images.number, 100):
        pixels = images.pixels(range(first, min(first + 100, images.number)))
        encoded = vqvae.encode(to_images(pixels.to(vqvae.device)))
        batches.append([level.codes.cpu() for level in encoded])
    return [torch.cat(level) for level in zip(*batches, strict=True)]


def hamming(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest share of codes that differ, and where, both `(N, 1)`, of grids `(N, h, w)`."""
    one, other = (grids.flatten(1).to(torch.int16) for grids in (rows, others))
    distances, places = [], []
    for row in one:
        values, place = (other != row).sum(dim=1).min(dim=0)
        distances.append(values / one.shape[1])
        places.append(place)
    return torch.stack(distances)[:, None], torch.stack(places)[:, None]


def prior_gaps(
    priors: Sequence[Prior],
    training: tuple[Sequence[Tensor], Sequence[int]],
    held_out: tuple[Sequence[Tensor], Sequence[int]],
) -> dict[str, dict[str, float]]:
    """Level -> bits per code of training and of held-out images; each are codes and labels."""
    bits: list[list[float]] = []
    for codes, labels in (training, held_out):
        sums, number = torch.zeros(len(priors), dtype=torch.float64), min(MOST_RATED, len(codes[0]))
        for first in range(0, number, 50):
            batch = [grid[first : min(first + 50, number)] for grid in codes]
            own = labels if len(labels) < 2 else labels[first : first + len(batch[0])]
            sums += log_likelihood(priors, batch, own).sum(dim=0)
        nats = -sums / number / torch.tensor([prior.config.num_positions for prior in priors])
        bits.append((nats / torch.tensor(2.0).log()).tolist())
    gaps = {}
    for level, (known, new) in enumerate(zip(*bits, strict=True)):
        name = level_name(level, len(priors))
        gaps[name] = {"training": known, "held out": new, "gap": new - known}
    return gaps


def pairs_sheet(samples: ImageSet, training: ImageSet, figures: dict[str, Any]) -> Image.Image:
    """The closest pairs of `closeness`, each sample above its training image."""
    columns = num_columns(len(figures["places"]), 2)
    rows = []
    for first in range(0, len(figures["places"]) // columns * columns, columns):
        for images, key in ((samples, "places"), (training, "nearest")):
            rows.append(to_pil(to_images(images.pixels(figures[key][first : first + columns]))))
    return sheet(rows, ["sample", "nearest training"] * (len(rows) // 2))
