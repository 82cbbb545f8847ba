"""What a model's folder says of its training: on which images, and which of them it held out."""

import glob
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import read_record
from vqvae2.common.vocabulary import TRAINING_RECORD
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, held_out_images, open_source
from vqvae2.data.dataset import split_table
from vqvae2.data.paths import expand_ranges
from vqvae2.data.splits import not_held_out

logger = logging.getLogger(__name__)


def read_training(vqvae: str) -> dict[str, Any]:
    """The record of a model folder's training; empty without one (from the Hub, or imported)."""
    path = Path(vqvae).expanduser() / TRAINING_RECORD
    record = read_record(path) if path.exists() else {}
    data: Any = record.get("data", {"path": ""})
    if not (isinstance(data, dict) and isinstance(data.get("path"), str)):
        raise UserError(f"{path} is broken: its 'data' names no path; restore it, or remove it.")
    return record


def find_held_out(
    vqvae: str, data: ImagesConfig, config: PreprocessingConfig
) -> tuple[ImageDataset, bool]:
    """What a model's training held out of these images, and whether they are its images at all. If
    not, or if no record tells, a warning says that it may have been trained on any of them."""
    training = read_training(vqvae)
    data = with_recorded_split(data, training)
    images, facts = held_out_images(data, config)
    return images, are_its_images(vqvae, training, facts, data.path)


def with_recorded_split(data: ImagesConfig, training: Mapping[str, Any]) -> ImagesConfig:
    """The images, held out as in a training on them, as far as its record says."""
    recorded = training.get("data", {})
    if data.validation_path is None and same_place(recorded.get("path"), data.path):
        return replace(data, validation_path=recorded.get("validation_path"))
    return data


def are_its_images(
    name: str, training: Mapping[str, Any], facts: Mapping[str, str], path: str
) -> bool:
    """Whether images, opened at `path`, are those of a model's training; if not, or if there is no
    record of it, a warning says so."""
    recorded = training.get("image_names_hash")
    if recorded is None:  # of imported weights, or from the Hub
        text = "%s has no record of its training, so any image of %s may have been part of it."
        logger.warning(text, name, path)
        return False
    own = recorded == facts["image_names_hash"]
    if not own:
        logger.warning(
            "%s: these are not the images that %s was trained on, or not all of them, so it may "
            "have seen any: give its --data.path and --data.validation-path.",
            path,
            name,
        )
    return own


def trained_on(vqvae: str, images: ImageDataset, path: str) -> int | None:
    """How many of these images, opened at `path`, a model was trained on: by their files or, in
    other sources, their names. None where the training's own images are not at hand."""
    data, config = read_training(vqvae).get("data", {}), images.config
    path_then = os.path.expanduser(data.get("path", ""))
    if not any(glob.glob(one) or os.path.exists(one) for one in expand_ranges(path_then)):
        return None
    try:
        own = split_table(open_source(from_dict(DataConfig, data, vqvae), config), config).train
    except UserError:  # changed since, or a stream
        return None
    if images.source.is_of_files and own.source.is_of_files:
        files, known = ([of.source.files[i] for i in of.indices] for of in (images, own))
        number = not_held_out(files, known).count(False)
        return number or None  # none: they may be copies
    return len({*images.ids} & {*own.ids}) if same_place(data["path"], path) else None


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths (or URLs, or ids) name the same."""
    if one == other or one is None or other is None or "://" in one + other:
        return one == other
    one, other = (os.path.realpath(os.path.expanduser(path)) for path in (one, other))
    return one == other
