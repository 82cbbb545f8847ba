"""Receipts: what decides the pixels of an image, kept in its file; of a whole set, receipt.json.

An image that `vqvae2 sample` draws is a function of what its receipt says. `vqvae2 verify` draws it
again and compares; `vqvae2 sample --receipt` makes a set again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.conditions import vectors_hash
from pipelines.config import DrawConfig, EditConfig, SetConfig
from pipelines.editing import keep_levels, known_outside
from pipelines.labels import Labels
from pipelines.pipeline import VQVAE2Pipeline
from prior.sampling import SAMPLER_VERSION, Known
from vqvae2.common.artifact import content_hash
from vqvae2.common.config import added, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import read_note
from vqvae2.data import read_picture_file
from vqvae2.model import VQVAE2

RECEIPT_NAME = "receipt.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What decides the pixels, besides the settings of `DrawConfig`."""

    pipeline_hash: str
    """Of the configurations and weights of all parts."""
    sampler_version: int
    known_hash: str | None
    """Of the codes that were given rather than drawn, in an edited image."""
    device: str
    """cpu or cuda; it may decide last bits, as does the version of torch."""
    torch: str

    def refuse_other(self, own: "Origin", where: str) -> None:
        """Raise a `UserError` if what is at hand, whose own origin is given, cannot redraw what
        this receipt, of the file `where`, is for."""
        given, here = (str(origin.known_hash)[:12] for origin in (self, own))
        if self.sampler_version != own.sampler_version:
            how = f"drawn by version {self.sampler_version} of the sampler, but this is version "
            how += f"{own.sampler_version}, which draws other images: use the vqvae2 that drew it"
        elif self.pipeline_hash != own.pipeline_hash:
            how = f"drawn by the pipeline {self.pipeline_hash[:12]}, but this pipeline is "
            how += f"{own.pipeline_hash[:12]}: give the one that drew it"
        elif self.known_hash == own.known_hash:
            return
        elif self.known_hash is None:
            how = "not edited: leave --init-image out"
        elif own.known_hash is None:
            how = f"edited, and its receipt holds only a hash of its given codes ({given}): "
            how += "add --init-image (and --mask or --keep-levels) as they were"
        else:
            how = f"drawn around the given codes {given}, but these are {here}: "
            how += "give the same picture, mask and --keep-levels"
        raise UserError(f"{where} was {how}.")

    def elsewhere(self, own: "Origin") -> str:
        """A clause that says where it was drawn, if that was not as here; or nothing."""
        there, here = (f"on {o.device} with torch {o.torch}" for o in (self, own))
        why = "where last bits, and so near ties between codes, may differ"
        return "" if there == here else f"drawn {there}, and here {here}, {why}"


@dataclass(frozen=True, kw_only=True)
class ImageReceipt(Origin, DrawConfig):
    """The receipt in an image's file."""

    index: int
    label: str | None
    """The name of its class; "none" if it is hidden, None without classes."""
    vector: tuple[float, ...] | None = added(None)
    """Its condition; None if it is hidden, or without any."""


@dataclass(frozen=True, kw_only=True)
class SetReceipt(Origin, SetConfig):
    """The receipt of a set: `receipt.json`."""

    conditions_hash: str | None = added(None)
    """Of the conditions that images take in turn; they are in `conditions.npy`."""


def converted(cls: type[T], source: Any, **others: Any) -> T:
    """A dataclass whose fields are those of the same name of another, but for these."""
    names = {field.name for field in fields(cls)} - others.keys()  # type: ignore[arg-type]
    return cls(**{name: getattr(source, name) for name in names}, **others)


def make_origin(pipeline: VQVAE2Pipeline, known: Sequence[Known | None] = ()) -> Origin:
    """What a pipeline draws here, now, around these given codes, has in common."""
    tensors = [(str(i), tensor) for i, level in enumerate(known) for tensor in level or ()]
    return Origin(
        pipeline_hash=pipeline.content_hash(),
        sampler_version=SAMPLER_VERSION,
        known_hash=content_hash({}, tensors) if known else None,
        device=pipeline.vqvae.device.type,
        torch=torch.__version__,
    )


def make_receipt(
    pipeline: VQVAE2Pipeline,
    settings: SetConfig,
    *,
    labels: Labels = None,
    vectors: Tensor | None = None,
    known: Sequence[Known | None] = (),
) -> SetReceipt:
    """The receipt of a set with these settings, labels (which replace those of the settings) and
    conditions, that is drawn here. Raises a `UserError` for unknown labels."""
    if vectors is not None:
        labels = pipeline.hidden_unless_given(labels)
    names, numbers = [*pipeline.class_names, "none"], pipeline.label_numbers(labels)
    own = to_dict(make_origin(pipeline, known))
    own["conditions_hash"] = vectors_hash(vectors)
    own["labels"] = tuple(names[number] for number in numbers) if labels is not None else ()
    return converted(SetReceipt, settings, num_threads=torch.get_num_threads(), **own)


def call_options(settings: DrawConfig) -> dict[str, Any]:
    """What a pipeline is called with, to draw images by these settings as a tensor."""
    options = {field.name: getattr(settings, field.name) for field in fields(DrawConfig)}
    del options["num_threads"]
    chosen = options.pop("compile")
    compiled = None if chosen == "auto" else chosen
    return {**options, "compiled": compiled, "output_type": "pt"}


def load_pipeline(config: EditConfig) -> VQVAE2Pipeline:
    """The pipeline that a command names as a whole or by its parts, or a `UserError`."""
    if config.pipeline is not None:
        return VQVAE2Pipeline.from_pretrained(config.pipeline)
    if config.vqvae is None or not config.priors:
        raise UserError("nothing to load: give --pipeline, or --vqvae and --priors (top first).")
    return VQVAE2Pipeline.from_parts(config.vqvae, config.priors)


def known_codes(config: EditConfig, model: VQVAE2) -> list[Known | None]:
    """The codes that an image to edit gives, by level; none without one."""
    if config.init_image is None:
        return []
    if config.mask is not None:
        return [*known_outside(model, config.init_image, config.mask)]
    number = 1 if config.keep_levels is None else config.keep_levels
    return keep_levels(model, config.init_image, number)


def read_receipt(path: Path) -> tuple[ImageReceipt, np.ndarray]:
    """The receipt and the pixels of an image. Raises a `UserError` if it has none, or a broken one,
    or is no picture."""
    picture = read_picture_file(str(path))
    try:
        data = json.loads(read_note(picture, path) or "")
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or "pipeline_hash" not in data:
        what = "holds no receipt: vqvae2 sample did not write it, or another program saved it again"
        raise UserError(f"{path} {what}; give a file that is as it was written.")
    if "num_images" in data:
        raise UserError(f"{path} shows a whole set: verify its images, or sample --receipt.")
    return from_dict(ImageReceipt, data, f"{path}: its receipt"), np.asarray(picture)
