"""The pictures that trainings and commands leave behind."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from pipelines.belonging import refuse_mismatches
from prior.base import Prior
from prior.config import TrainPriorConfig
from prior.manifest import CodeDataset, parse_level, read_manifest
from prior.sampling import image_seeds
from vqvae2.common.accelerate import processes
from vqvae2.common.fit import Draw
from vqvae2.common.pictures import sheet, to_pil
from vqvae2.model import VQVAE2


def make_sample_drawer(config: TrainPriorConfig, vqvae: str) -> Draw:
    """For `fit`: draws samples of one level's prior, in place of that level in up to 32 held-out
    rows, whose other levels stay. Raises a `UserError` if another autoencoder made the codes."""
    folder = Path(config.codes)
    manifest = read_manifest(folder)
    model = VQVAE2.from_pretrained(vqvae).to(processes().device)
    refuse_mismatches(model, (), manifest)
    level = parse_level(config.level, manifest.num_levels)
    rows = CodeDataset(folder, manifest, "validation" if manifest.num_validation else "train")
    number = min(32, len(rows))
    real = rows.__getitems__([i * len(rows) // number for i in range(number)])

    def draw(prior: Prior) -> Image.Image:
        codes = [grid.to(prior.device) for grid in real["codes"]]
        labels = real["labels"].to(prior.device) if prior.config.num_classes else None
        codes[level] = prior.sample(number, codes[:level], labels, seeds=image_seeds(0, 0, number))
        with torch.no_grad():
            return sheet(in_rows(to_pil(model.decode_codes(codes)), 8))

    return draw


def sample_sheet(
    images: Sequence[Image.Image], labels: Sequence[int], class_names: Sequence[str]
) -> Image.Image:
    """Samples by class, a row for each of the first 20 with its name; else in rows of eight."""
    if not class_names:
        return sheet(in_rows(images, 8))
    rows: dict[int, list[Image.Image]] = {}
    for image, label in zip(images, labels, strict=True):
        rows.setdefault(label, []).append(image)
    shown = list(rows)[:20]
    return sheet([rows[label] for label in shown], [class_names[label] for label in shown])


def in_rows(images: Sequence[Image.Image], columns: int) -> list[Sequence[Image.Image]]:
    """A list of images cut into rows."""
    return [images[first : first + columns] for first in range(0, len(images), columns)]
