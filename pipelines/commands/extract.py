"""`vqvae2 extract`: images to a code dataset, one row per image and view, in input order.

A *view* is the image itself (original), or mirrored or cropped in a way that its name says. A
*part* is a fixed share of the images; its rows make one *shard* (a file) per split, and a *note*
beside the shard says what it holds until the manifest does. So the rows are the same for any number
of processes, and a killed job goes on with the shards that are missing.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.config import ExtractConfig
from pipelines.encoding import LANES, encode_lanes
from prior.manifest import MANIFEST_NAME, Manifest, is_complete, read_manifest, write_manifest
from prior.shards import ShardRecord, smallest_type, write_shard
from vqvae2.codebook_stats import warn_of_few
from vqvae2.common.accelerate import (
    check_same_images,
    on_main_process,
    processes,
)
from vqvae2.common.config import from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.loading import ordered
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import warn_if_unfinished
from vqvae2.common.runs import RunRecord, last_names, versions
from vqvae2.common.threads import OwnCpus, one_thread_each, set_threads
from vqvae2.common.torch_settings import (
    exact_convolutions,
    settings_restored,
    use_deterministic_algorithms,
)
from vqvae2.common.vocabulary import EXTRACTION_RECORD, ORIGINAL, SPLITS
from vqvae2.data import PythonImages, work_parts
from vqvae2.data.augmentation import Choice, check_views, no_change, view_change
from vqvae2.data.work_parts import Part, Parts, ReadItem, note_path
from vqvae2.model import VQVAE2
from vqvae2.training_record import read_training, same_place

logger = logging.getLogger(__name__)
MOST_PIXELS_APART = 128 * 128  # of an image up to which each CPU encodes lanes of its own
Batch = tuple[str, Tensor]
"""A split, and pixels `(B, C, H, W)` of it."""


@settings_restored()
@writes_output
def extract(config: ExtractConfig, *, images: PythonImages | None = None) -> None:
    """Write the code dataset; continue it, or do nothing if it is finished.

    Args:
        images: see `vqvae2.data.load_images`; instead of what `config.data.path` names.

    Raises:
        UserError: bad images, no such model, or an output folder that holds another run.
    """
    # The autoencoder and the images must be those of the run that the folder holds. What can be
    # compared before the images are looked through is compared first.
    check_views(config.views)
    output_dir, state = Path(config.output_dir), processes()
    set_threads(config.num_threads)
    model = VQVAE2.from_pretrained(config.vqvae)
    run = RunRecord(
        "extract", config, EXTRACTION_RECORD, facts={"encoder_hash": model.content_hash()}
    )
    run.check(output_dir)
    warn_if_unfinished(Path(config.vqvae).expanduser())
    training = read_training(config.vqvae)
    if training:
        _refuse_other_split(config, training)
    source = config.data if images is None else images
    found = work_parts.find_parts(source, model.config.image, config.shard_size)
    check_same_images(found.facts, found.number())
    run = replace(run, facts={**run.facts, **found.facts})
    run.check(output_dir)
    state.wait_for_everyone()  # all have looked before the first one writes

    # Of a finished dataset with lost or damaged shards, only these are written again.
    def begin() -> bool:
        if is_complete(output_dir):
            work_parts.tidy(output_dir)
            return False
        run.write(output_dir)
        if (output_dir / MANIFEST_NAME).exists():
            work_parts.reopen(output_dir / MANIFEST_NAME, _notes(output_dir))
        if training and training.get("image_names_hash") != found.facts["image_names_hash"]:
            logger.warning(
                "%s was trained on other images than these, or with other names or labels. "
                "Images of the same name are held out alike; it may have been trained on any other "
                "one that is held out here, which makes the priors look better than they are.",
                config.vqvae,
            )
        return True

    if not on_main_process(state, begin):
        logger.info("%s: all codes are extracted already.", output_dir)
        return

    # Shards, then the manifest.
    model.to(state.device)
    on_cpu, size = state.device.type == "cpu", math.prod(model.config.image.height_width)
    apart = on_cpu and size <= MOST_PIXELS_APART
    own_cpus = OwnCpus(bind=on_cpu and not apart)

    def encode(batch: Batch) -> tuple[str, list[Tensor]]:
        if not apart:
            own_cpus.warn()
        with own_cpus:
            codes = encode_lanes(model, batch[1], bf16=config.mixed_precision == "bf16")
        return batch[0], codes

    if config.mixed_precision == "bf16" and state.is_main_process:
        _report_changes(model, found.parts[0])
    views = {"train": config.views, "validation": (ORIGINAL,)}  # held-out images stay as they are
    choices: dict[str, list[Choice]] = {}
    for split, names in views.items():
        choices[split] = [partial(view_change, view, model.config.image) for view in names]
    options: Any = {"description": "extracting", "skip": config.data.on_error == "skip"}
    threads = one_thread_each() if apart else nullcontext(0)
    with threads as number, exact_convolutions():
        use_deterministic_algorithms(config.deterministic)
        encode_all = partial(ordered, encode, num_threads=number, ahead=2 * number)
        write = partial(_write_part, output_dir, model, encode_all, views, found)
        work_parts.write_parts(found, output_dir, write, choices, state, **options)
    state.wait_for_everyone()  # all shards are there
    on_main_process(state, partial(_finish, output_dir, config, model, found))


def _refuse_other_split(config: ExtractConfig, training: Mapping[str, Any]) -> None:
    """What the autoencoder's training held out is held out here: it validates the priors."""
    path, validation_path = training["data"]["path"], training["data"].get("validation_path")
    given = config.data.validation_path
    if same_place(path, config.data.path) and not same_place(validation_path, given):
        what = f"--data.validation-path is {given!r}, but {config.vqvae} was trained with"
        why = "else images that trained the autoencoder would validate the priors"
        raise UserError(f"{what} {validation_path!r}: give the same, {why}.")


def _notes(output_dir: Path) -> dict[Path, dict[str, Any]]:
    """What the manifest of a finished dataset says of each shard."""
    manifest = read_manifest(output_dir)
    notes = {}
    for split in SPLITS:
        for record in manifest.shards(split):
            notes[output_dir / split / record.name] = to_dict(record)
    return notes


class _Rows:
    """The rows of one shard as they come, and their codes as they are encoded."""

    def __init__(self, model: VQVAE2) -> None:
        self.ids: list[str] = []
        self.views: list[str] = []
        self.labels: list[int | None] = []
        self.vectors: list[np.ndarray | None] = []
        self.waiting: list[Tensor] = []
        self.codes: list[list[np.ndarray]] = []  # per level; an empty array says what it would hold
        for (height, width), size in zip(
            model.config.grids, model.config.codebook_size_per_level, strict=True
        ):
            self.codes.append([np.zeros((0, height * width), smallest_type(size))])

    def add(self, row: ReadItem, views: Sequence[str]) -> None:
        for view, pixels in zip(views, row.pixels, strict=True):
            self.ids.append(row.item.id)
            self.views.append(view)
            self.labels.append(row.item.label)
            self.vectors.append(row.item.vector)
            self.waiting.append(pixels)

    def take(self) -> Tensor:
        """The pixels for the lanes that come first."""
        pixels, self.waiting = self.waiting[:LANES], self.waiting[LANES:]
        return torch.stack(pixels)


def _write_part(
    output_dir: Path,
    model: VQVAE2,
    encode: Callable[[Iterator[Batch]], Iterator[tuple[str, list[Tensor]]]],
    views: Mapping[str, Sequence[str]],
    found: Parts,
    part: Part,
    items: Iterator[ReadItem],
    skipped: Mapping[str, list],
) -> None:
    """Encode the images of a part and write its shards, each whole or not at all."""
    # Lanes of either split as soon as they are full, and what is left of them.
    rows = {split: _Rows(model) for split in part.splits}

    def batches() -> Iterator[Batch]:
        for row in items:
            split, shard = row.item.split, rows[row.item.split]
            shard.add(row, views[split])
            while len(shard.waiting) >= LANES:
                yield split, shard.take()
        for split, shard in rows.items():
            if shard.waiting:
                yield split, shard.take()

    # Their codes come in the same order.
    for split, levels in encode(batches()):
        for chunks, codes in zip(rows[split].codes, levels, strict=True):
            chunks.append(codes.numpy().astype(chunks[0].dtype))
    size = found.vector_size
    for split, shard in rows.items():
        path = part.path(output_dir, split)
        write_shard(
            path,
            ids=shard.ids,
            codes=[np.concatenate(chunks) for chunks in shard.codes],
            codebook_sizes=model.config.codebook_size_per_level,
            labels=np.array(shard.labels, np.int64) if found.labelled else None,
            vectors=np.array(shard.vectors, np.float32).reshape(-1, size) if size else None,
            class_names=found.class_names or (),
            views=shard.views,
            facts={"skipped": json.dumps(skipped[split])},
            note=note_path(path),
        )


def _finish(output_dir: Path, config: ExtractConfig, model: VQVAE2, found: Parts) -> None:
    """Write the manifest, which says that everything is there."""
    # What each shard was noted to hold.
    paths = [path for split in SPLITS for path in found.paths(output_dir, split)]
    records: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
    for path in paths:
        note = note_path(path)
        records[path.parent.name].append(from_dict(ShardRecord, read_json(note), str(note)))

    # What the codes mean.
    manifest = Manifest(
        encoder_hash=model.content_hash(),
        grids=model.config.grids,
        codebook_sizes=model.config.codebook_size_per_level,
        class_names=found.classes(paths),
        rows_hash=found.facts["image_names_hash"],
        preprocessing=to_dict(model.config.image),
        train=tuple(records["train"]),
        validation=tuple(records["validation"]),
        views=config.views,
        source=last_names(found.source),
        versions=versions(),
        vector_size=found.vector_size,
        vector_names=found.vector_names,
    )
    if not manifest.num_train:
        raise UserError(f"{found.source}: no training image can be read: check data.path.")
    write = partial(write_manifest, output_dir, manifest)
    work_parts.finish(found, output_dir, paths, write)
    warn_of_few(manifest.num_train // len(config.views), manifest.codebook_sizes)
    numbers = manifest.num_train, manifest.num_validation
    logger.info("%s: codes of %d training rows and %d held out.", output_dir, *numbers)


def _report_changes(model: VQVAE2, part: Part) -> None:
    """Log how many codes of some images differ in bf16."""
    items = islice(part.items(), 4 * LANES)
    choices = {split: [no_change] for split in SPLITS}
    pixels = [
        row.pixels[0] for row in work_parts.read_items(items, choices, skip=True) if row.pixels
    ]
    changed, total = [0] * model.config.num_levels, [0] * model.config.num_levels
    for first in range(0, len(pixels), LANES):
        batch = torch.stack(pixels[first : first + LANES])
        pairs = zip(encode_lanes(model, batch), encode_lanes(model, batch, bf16=True), strict=True)
        for level, (exact, rounded) in enumerate(pairs):
            changed[level] += int((exact != rounded).sum())
            total[level] += exact.numel()
    shares = [f"{c / max(t, 1):.2%}" for c, t in zip(changed, total, strict=True)]
    levels = ", ".join(f"{share} of level {level}" for level, share in enumerate(shares))
    logger.info(
        "bf16 changes these shares of the codes of %d images, against fp32: %s.",
        len(pixels),
        levels,
    )
