"""The pictures that trainings and commands leave behind."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image

from pipelines.belonging import refuse_mismatches
from prior.base import Prior
from prior.config import TrainPriorConfig
from prior.manifest import CodeDataset, parse_level, read_manifest
from prior.probes import rows_of
from prior.sampling import image_seeds
from vqvae2.common.accelerate import processes
from vqvae2.common.fit import Draw
from vqvae2.common.loading import some_rows
from vqvae2.common.pictures import in_rows, num_columns, sheet, to_pil
from vqvae2.model import VQVAE2


def make_sample_drawer(config: TrainPriorConfig, vqvae: str) -> Draw:
    """For `fit`: draws samples of one level's prior, in place of that level in up to 32 held-out
    rows, or if there are none, original ones of the training, whose other levels stay. Raises a
    `UserError` if another autoencoder made the codes."""
    folder = Path(config.codes)
    manifest = read_manifest(folder)
    model = VQVAE2.from_pretrained(vqvae).to(processes().device)
    refuse_mismatches(model, (), manifest)
    level = parse_level(config.level, manifest.num_levels)
    split = "validation" if manifest.num_validation else "train"

    @cache
    def real_rows() -> dict[str, Any]:
        # Opened when the first picture is due, by the process that draws: by then the training has
        # decoded what it reads itself, if that is too large for memory.
        where = config.codes_cache and Path(config.codes_cache)
        rows = CodeDataset(folder, manifest, split, cache_dir=where or None)
        originals = np.arange(len(rows)) if rows.views is None else np.flatnonzero(rows.views == 0)
        return rows.__getitems__(originals[some_rows(len(originals), 32)].tolist())

    def draw(prior: Prior) -> Image.Image:
        batch = send_to_device(real_rows(), prior.device)
        codes, rows = list(batch["codes"]), rows_of(prior.config, batch)
        seeds = image_seeds(0, 0, len(codes[0]))
        codes[level] = prior.sample(len(seeds), rows.condition, rows.labels, seeds=seeds)
        with torch.no_grad():
            return sample_sheet(to_pil(model.decode_codes(codes)))

    return draw


MOST_NAMES = 20  # that a sheet has rows of


def sample_sheet(
    images: Sequence[Image.Image],
    names: Sequence[str] = (),
    front: Mapping[str, Image.Image] | None = None,
) -> Image.Image:
    """Samples in whole rows, at most eight wide: those of each name (a class) together, if there
    are names, of the first `MOST_NAMES`. `front`: what begins every row, by its name."""
    groups: dict[str, list[Image.Image]] = {}
    for image, name in zip(images, names or [""] * len(images), strict=True):
        groups.setdefault(name, []).append(image)
    groups, front = dict(islice(groups.items(), MOST_NAMES)), front or {}
    number = min(map(len, groups.values()))
    columns, rows, titles = num_columns(number, len(groups), 8 - len(front)), [], []
    for name, group in groups.items():
        for row in in_rows(group[: number // columns * columns], columns):
            rows.append([*front.values(), *row])
            what = name if len(groups) > 1 else "samples"
            titles.append(", ".join([*front, what]) if front else name)
    return sheet(rows, titles if any(titles) else ())


def embedded(caption: str, picture: Image.Image) -> str:
    """HTML of a picture, below its caption, that needs no file beside it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">\n'
