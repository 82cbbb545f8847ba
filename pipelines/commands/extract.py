"""Images to a code dataset: one row per image and view, in input order, whatever the number of processes; continues after a kill."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.config import ExtractConfig
from prior.manifest import MANIFEST_NAME, Manifest, is_complete, read_manifest, write_manifest
from prior.shards import ShardRecord, file_hash, smallest_type, write_shard
from vqvae2.common.accelerate import processes
from vqvae2.common.config import check, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.runs import RunRecord, last_names, versions
from vqvae2.data import to_images
from vqvae2.data.arrays import PythonImages
from vqvae2.data.augmentation import ORIGINAL, known_views, view_change
from vqvae2.data.images import Choice
from vqvae2.data.parts import SPLITS, Item, Part, Parts, find_parts, read_items
from vqvae2.data.skipping import list_skipped, report_skipped
from vqvae2.model import VQVAE2
from vqvae2.training import read_training, same_place

RECORD_NAME = "extract_config.yaml"
LANES = 32  # images encoded at once, always: the last bits of a convolution depend on the batch size, and codes must not


def extract(config: ExtractConfig, *, images: PythonImages | None = None) -> None:
    """Write the code dataset; continue it, or do nothing if it is finished.

    Each shard holds a fixed part of the images, and process r of n writes the parts r, r + n, ...: which rows are where depends on nothing else.

    Args:
        images: {"images", "labels"} in memory, or an iterable of such rows, instead of what `config.data.path` names (see `array_source`).

    Raises:
        UserError: bad images, no such model, or an output folder that holds another run.
    """
    unknown = sorted(set(config.views) - set(known_views()))
    check(not unknown, "views", unknown, f"among {', '.join(known_views())}")
    output_dir = Path(config.output_dir)
    state = processes()
    model = VQVAE2.from_pretrained(config.vqvae)
    run = RunRecord("extract", config, RECORD_NAME, facts={"encoder_hash": model.content_hash()})
    run.check(output_dir)
    training = read_training(config.vqvae)
    if training:
        _refuse_other_split(config, training)
    found = find_parts(
        images if images is not None else config.data, model.config.image, config.shard_size
    )
    run = replace(run, facts={**run.facts, **found.facts})
    run.check(output_dir)
    finished = is_complete(output_dir)
    state.wait_for_everyone()
    if finished:
        state.print(f"{output_dir}: all codes are extracted already.")
        return
    if state.is_main_process:
        run.write(output_dir)
        _reopen(output_dir)
        print(_warning_of_other_images(config, training, found) if training else "", end="")
    state.wait_for_everyone()
    model.to(state.device)
    mine = found.parts[state.process_index :: state.num_processes]
    encode = partial(encode_lanes, model, bf16=config.mixed_precision == "bf16")
    if config.mixed_precision == "bf16" and state.is_main_process:
        print(_count_changes(model, found.parts[0]))
    sizes = [part.num_items for part in mine]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    with tqdm(
        total=total, desc="extracting", unit="image", disable=not state.is_main_process
    ) as bar:
        for part in mine:
            if all(_is_kept(part.path(output_dir, split)) for split in part.splits):
                bar.update(part.num_items or 0)
            else:
                _write_part(part, config, model, encode, bar, class_names=found.class_names)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(output_dir, config, model, found)
    state.wait_for_everyone()


def _refuse_other_split(config: ExtractConfig, training: Mapping[str, Any]) -> None:
    """The images that the autoencoder's training held out must be held out here: the priors are validated on them."""
    path, validation_path = training["data"]["path"], training["data"].get("validation_path")
    if same_place(path, config.data.path) and not same_place(
        validation_path, config.data.validation_path
    ):
        raise UserError(
            f"--data.validation-path is {config.data.validation_path!r}, but {config.vqvae} was trained with {validation_path!r}: "
            f"give the same, or images that trained the autoencoder would validate the priors."
        )


def _warning_of_other_images(
    config: ExtractConfig, training: Mapping[str, Any], found: Parts
) -> str:
    """A sentence where it is not certain that the same images are held out as in the training, or nothing."""
    if training.get("image_names_hash") == found.facts["image_names_hash"]:
        return ""
    return (
        f"warning: {config.vqvae} was trained on other images than these, or on the same by other names (from {training['data']['path']}). Images of "
        f"the same name are held out alike; any other that is held out here may have trained it, and make the priors look better than they are.\n"
    )


def _reopen(output_dir: Path) -> None:
    """Make a finished dataset that lost shards an unfinished one: what its manifest says of the others is noted beside them again."""
    if not (output_dir / MANIFEST_NAME).exists():
        return
    manifest = read_manifest(output_dir)
    for split in SPLITS:
        for record in manifest.shards(split):
            write_json(_note_path(output_dir / split / record.name), to_dict(record))
    (output_dir / MANIFEST_NAME).unlink()


def _is_kept(path: Path) -> bool:
    """Whether a shard is there, and is the file that was noted when it was written."""
    if not (path.exists() and _note_path(path).exists()):
        return False
    try:
        return file_hash(path) == _read_note(path).sha256
    except UserError:  # a broken note
        return False


class _Rows:
    """The rows of one shard as they come; encoded whenever there are enough for the lanes."""

    def __init__(
        self, encode: Callable[[Tensor], list[Tensor]], codebook_sizes: Sequence[int]
    ) -> None:
        self.encode, self.kinds = encode, [smallest_type(size) for size in codebook_sizes]
        self.ids: list[str] = []
        self.views: list[str] = []
        self.labels: list[int | None] = []
        self.codes: list[list[np.ndarray]] = [[] for _ in codebook_sizes]
        self.waiting: list[np.ndarray] = []

    def add(self, item: Item, view: str, pixels: np.ndarray) -> None:
        self.ids.append(item.id)
        self.views.append(view)
        self.labels.append(item.label)
        self.waiting.append(pixels)
        if len(self.waiting) == LANES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            for kept, codes, kind in zip(
                self.codes,
                self.encode(torch.from_numpy(np.stack(self.waiting))),
                self.kinds,
                strict=True,
            ):
                kept.append(codes.numpy().astype(kind))
            self.waiting = []


def _write_part(
    part: Part,
    config: ExtractConfig,
    model: VQVAE2,
    encode: Callable[[Tensor], list[Tensor]],
    bar: tqdm,
    *,
    class_names: tuple[str, ...] | None,
) -> None:
    """Encode the images of a part and write its shards, each whole or not at all."""
    views = {"train": config.views, "validation": (ORIGINAL,)}  # held-out images are not changed
    sizes = model.config.codebook_size_per_level
    rows = {split: _Rows(encode, sizes) for split in part.splits}
    skipped: dict[str, list[tuple[str, str]]] = {split: [] for split in part.splits}
    choices = {split: [_choice(view, model) for view in names] for split, names in views.items()}
    labelled = bool(class_names)
    for item, pixels, error in read_items(
        part.items(),
        choices.__getitem__,
        skip=config.data.on_error == "skip",
        num_threads=os.cpu_count() or 1,
    ):
        if error is not None:
            skipped[item.split].append((error.name, error.reason))
        for view, image in zip(views[item.split], pixels, strict=False):
            rows[item.split].add(item, view, image)
        labelled = labelled or item.label is not None
        bar.update()
    for split, found in reversed(rows.items()):
        found.flush()
        grids = [height * width for height, width in model.config.grids]
        codes = [
            np.concatenate(level) if level else np.zeros((0, number), kind)
            for level, number, kind in zip(found.codes, grids, found.kinds, strict=True)
        ]
        path = part.path(Path(config.output_dir), split)
        labels = _labels_of(found, path) if labelled else None
        facts = {"skipped": json.dumps(skipped[split])}
        write_shard(
            path,
            ids=found.ids,
            codes=codes,
            codebook_sizes=sizes,
            labels=labels,
            views=found.views,
            facts=facts,
            note=_note_path(path),
        )


def _choice(view: str, model: VQVAE2) -> Choice | None:
    return None if view == ORIGINAL else partial(view_change, view, model.config.image)


def _labels_of(rows: _Rows, path: Path) -> np.ndarray:
    if None in rows.labels:
        raise UserError(
            f"{path}: {rows.ids[rows.labels.index(None)]} has no label, but others have one: give every image a label, or none."
        )
    return np.array(rows.labels, np.int32)


def _note_path(shard: Path) -> Path:
    """Where what the manifest will say of a shard waits until all shards are there."""
    return shard.with_name(f".{shard.stem}.json")


def _read_note(shard: Path) -> ShardRecord:
    return from_dict(ShardRecord, read_json(_note_path(shard)), str(_note_path(shard)))


def _finish(output_dir: Path, config: ExtractConfig, model: VQVAE2, found: Parts) -> None:
    """Write the manifest, which says that everything is there, and tell the user."""
    paths = {
        split: [part.path(output_dir, split) for part in found.parts if split in part.splits]
        for split in SPLITS
    }
    all_paths = [path for split in SPLITS for path in paths[split]]
    class_names = found.class_names if found.class_names is not None else _classes_met(all_paths)
    grids, sizes = model.config.grids, model.config.codebook_size_per_level
    for path in all_paths:
        _agree_on_labels(path, model, labelled=bool(class_names))
    records = {split: tuple(_read_note(path) for path in paths[split]) for split in SPLITS}
    manifest = Manifest(
        encoder_hash=model.content_hash(),
        grids=grids,
        codebook_sizes=sizes,
        class_names=class_names,
        rows_hash=found.facts["image_names_hash"],
        preprocessing=to_dict(model.config.image),
        train=records["train"],
        validation=records["validation"],
        views=config.views,
        source=last_names(found.source),
        versions=versions(),
    )
    if not manifest.num_train:
        raise UserError(
            f"{found.source}: none of the training images can be read: check data.path."
        )
    skipped = [
        (name, reason)
        for path in all_paths
        for name, reason in json.loads(pq.read_schema(path).metadata[b"skipped"])
    ]
    list_skipped(output_dir, skipped)
    write_manifest(output_dir, manifest)
    for path in all_paths:
        _note_path(path).unlink(missing_ok=True)
    said = report_skipped(output_dir)
    print(
        f"{output_dir}: codes of {manifest.num_train} training rows and {manifest.num_validation} held out. {said}".strip()
    )


def _classes_met(paths: Sequence[Path]) -> tuple[str, ...]:
    """The classes of a stream, which has numbers only: from 0 to the highest that occurs."""
    labels = [
        pq.read_table(path, columns=["label"])["label"]
        for path in paths
        if "label" in pq.read_schema(path).names
    ]
    return tuple(
        map(
            str,
            range(1 + max((max(column.to_pylist(), default=-1) for column in labels), default=-1)),
        )
    )


def _agree_on_labels(path: Path, model: VQVAE2, *, labelled: bool) -> None:
    """All shards have a column of labels, or none has: one without rows is written anew.

    Raises:
        UserError: a shard with rows has labels where others have none, or none where others have some.
    """
    file = pq.ParquetFile(path)
    has_labels = "label" in file.schema_arrow.names
    if has_labels == labelled:
        return
    if file.metadata.num_rows:
        raise UserError(
            f"{path}: its images have {'' if has_labels else 'no '}labels, but others are different: give every image a label, or none."
        )
    sizes = model.config.codebook_size_per_level
    codes = [
        np.zeros((0, height * width), smallest_type(size))
        for (height, width), size in zip(model.config.grids, sizes, strict=True)
    ]
    facts = {"skipped": file.schema_arrow.metadata[b"skipped"].decode()}
    write_shard(
        path,
        ids=[],
        codes=codes,
        codebook_sizes=sizes,
        labels=np.zeros(0, np.int32) if labelled else None,
        facts=facts,
        note=_note_path(path),
    )


@torch.inference_mode()
def encode_lanes(model: VQVAE2, pixels: Tensor, *, bf16: bool = False) -> list[Tensor]:
    """Codes `(B, h*w)` of every level for at most `LANES` images `(B, C, H, W)`; the batch is filled up with black ones and cut again."""
    device = next(model.parameters()).device
    padding = pixels.new_zeros(LANES - len(pixels), *pixels.shape[1:])
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        levels = model.encode(to_images(torch.cat([pixels, padding]).to(device)))
    return [rearrange(level.codes[: len(pixels)], "b h w -> b (h w)").cpu() for level in levels]


def _count_changes(model: VQVAE2, part: Part) -> str:
    """How many codes of some images are others in bf16."""
    items = islice(part.items(), 4 * LANES)
    pixels = [
        row.pixels[0]
        for row in read_items(
            items, lambda split: [None], skip=True, num_threads=os.cpu_count() or 1
        )
        if row.pixels
    ]
    changed, total = [0] * model.config.num_levels, [0] * model.config.num_levels
    for first in range(0, len(pixels), LANES):
        batch = torch.from_numpy(np.stack(pixels[first : first + LANES]))
        for level, (exact, rounded) in enumerate(
            zip(encode_lanes(model, batch), encode_lanes(model, batch, bf16=True), strict=True)
        ):
            changed[level] += int((exact != rounded).sum())
            total[level] += exact.numel()
    shares = ", ".join(
        f"{c / max(t, 1):.2%} of level {level}"
        for level, (c, t) in enumerate(zip(changed, total, strict=True))
    )
    return (
        f"bf16 changes these shares of the codes of {len(pixels)} images, against fp32: {shares}."
    )
