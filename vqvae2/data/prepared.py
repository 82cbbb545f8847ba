"""`vqvae2 prepare`: images decoded and resized once, then read at the speed of memory.

    prepared.json   train/00000.parquet ...   validation/00000.parquet ...

A row is an image: `id`, `pixels` (a fixed-size list of C*H*W values, uint8, or float32 in [-1, 1])
`label` where there are classes, and `vector` (fixed-size lists) where images have conditions.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vqvae2.common.accelerate import check_same_images, on_main_process, processes
from vqvae2.common.artifact import content_hash
from vqvae2.common.config import added, check, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, read_json, whole_file, write_json
from vqvae2.common.loading import ordered
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.runs import RunRecord, last_names
from vqvae2.common.vocabulary import SPLITS
from vqvae2.config import PrepareConfig, PreprocessingConfig
from vqvae2.data import work_parts
from vqvae2.data.decoding import readable
from vqvae2.data.open_source import PREPARED, UNFINISHED
from vqvae2.data.sources import Sources
from vqvae2.data.survey import Survey
from vqvae2.data.table import ImageTable, PreparedPictures, load_parquet
from vqvae2.data.vectors import Vectors
from vqvae2.data.work_parts import Part, Parts, ReadItem, note_path

logger = logging.getLogger(__name__)
ROW_GROUP = 256  # rows that are written, and held in memory, at once


@dataclass(frozen=True, kw_only=True)
class PreparedShard:
    """What the manifest says of a shard; `name` is its path in the folder, train/00000.parquet."""

    name: str
    rows: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        is_name = re.fullmatch(r"(train|validation)/[0-9]+\.parquet", self.name) is not None
        check(is_name, "name", self.name, "a Parquet file in train/ or validation/")

    def is_in(self, folder: Path) -> bool:
        """Whether the shard is there, every byte of it as it was written."""
        path = folder / self.name
        same_size = path.is_file() and path.stat().st_size == self.num_bytes
        return same_size and file_hash(path) == self.sha256


@dataclass(frozen=True, kw_only=True)
class PreparedManifest:
    """What the shards hold. Written last: a folder without it is unfinished."""

    source: str
    """Where the images came from."""
    image: PreprocessingConfig
    """How they were prepared."""
    class_names: tuple[str, ...]
    """Names of the classes that labels number, or empty."""
    has_labels: bool
    num_train: int
    """Rows in train/; so for validation/."""
    num_validation: int
    num_skipped: int
    """Images that could not be read; skipped.jsonl lists them."""
    shards: tuple[PreparedShard, ...] = ()
    """All shards. (Folders of earlier versions do not list them.)"""
    content_hash: str = ""
    """SHA-256 of all the rest. (Earlier versions have none.)"""
    vector_size: int = added(0)
    """Length of the condition vectors; 0 without any."""
    vector_names: tuple[str, ...] = added(())
    """Of attributes, what the places of a vector stand for."""
    condition_column: str = added("")
    """Where the vectors were read."""

    def with_hash(self) -> "PreparedManifest":
        """With its `content_hash` as it must be."""
        return replace(self, content_hash=content_hash(replace(self, content_hash=""), ()))


# Reading


def open_prepared(folder: Path, condition_column: str | None = None) -> Sources:
    """The prepared images of a folder, split as they were when they were prepared.

    Raises UserError: a broken manifest, missing or broken shards, or other conditions."""
    # Every byte is what was written: looking at 1 GiB takes a core a second, and there are many.
    manifest = _read_manifest(folder)
    made_with = manifest.condition_column or condition_column  # earlier versions do not say it
    if condition_column is not None and condition_column != made_with:
        what = f"{folder} was prepared with the condition column {made_with!r}"
        raise UserError(f"{what}, not {condition_column!r}: leave it out, or prepare it again.")
    sound = ordered(
        lambda shard: shard.is_in(folder), manifest.shards, num_threads=os.cpu_count() or 1
    )
    bar = progress_bar(
        sound, f"verifying {folder}", len(manifest.shards), unit="shard", delay=3, leave=False
    )
    for shard, is_sound in zip(manifest.shards, bar, strict=True):
        if not is_sound:
            path = folder / shard.name
            raise UserError(f"{path} is missing or was changed: run vqvae2 prepare again.")
    train = _open_split(folder, manifest, "train", manifest.num_train)
    return Sources(train, _open_split(folder, manifest, "validation", manifest.num_validation))


def _read_manifest(folder: Path) -> PreparedManifest:
    path = folder / PREPARED
    manifest = from_dict(PreparedManifest, read_json(path), str(path))
    if manifest.content_hash and manifest != manifest.with_hash():
        raise UserError(f"{path} was changed: run vqvae2 prepare again.")
    return manifest


def _open_split(folder: Path, manifest: PreparedManifest, split: str, number: int) -> ImageTable:
    # Rows, ids and labels; an empty split has no shard to open.
    image, names = manifest.image, [shard.name for shard in manifest.shards]
    files = [folder / name for name in names if name.startswith(split)]
    files = files if manifest.shards else sorted((folder / split).glob("*.parquet"))
    length = expected = image.channels * image.height_width[0] * image.height_width[1]
    ids: list[str] = []
    labels: list[int] = []
    values = np.zeros((0, manifest.vector_size), np.float32)
    rows: Any = None
    if number:
        what_to_do = "run vqvae2 prepare again, or set HF_HOME to a place with more room"
        with readable(str(folder / split), "read", what_to_do):
            size = 1 if image.value_range == (0, 255) else 4
            table = load_parquet(files, number * expected * size)
            ids, labels = list(table["id"]), list(table["label"])
            rows = table.select_columns(["pixels"]).with_format("arrow")  # numpy's widens to int64
            length = table.features["pixels"].length
            if manifest.vector_size:
                values = np.array(table.with_format("numpy")["vector"], np.float32)

    # They are what the manifest says.
    classes = set(range(len(manifest.class_names))) if manifest.has_labels else {None}
    shapes = (len(ids), length), values.shape
    wanted = (number, expected), (number if manifest.vector_size else 0, manifest.vector_size)
    if shapes != wanted or not set(labels) <= classes:
        what = f"{folder / split} does not hold the {number} images that {PREPARED} describes"
        raise UserError(f"{what}: run vqvae2 prepare again.")
    name = str(folder if split == "train" else folder / split)
    given = labels if manifest.has_labels else None
    vectors = Vectors(values, manifest.vector_names) if manifest.vector_size else None
    cells = PreparedPictures(image, rows)
    return ImageTable(name, ids, cells, given, manifest.class_names, files, vectors)


# Writing


@writes_output
def prepare_command(config: PrepareConfig) -> None:
    """Write the prepared images; continue, or do nothing if they are finished.

    Raises:
        UserError: bad images, or an output folder that holds another run.
    """
    # The run that the folder holds is this one; a finished folder is looked through again.
    output_dir, state = Path(config.output_dir), processes()
    found = work_parts.find_parts(config.data, config.image, config.shard_size)
    check_same_images(found.facts, found.number())
    run = RunRecord("prepare", config, UNFINISHED, facts=found.facts)
    run.check(output_dir)
    state.wait_for_everyone()

    def begin() -> None:
        run.write(output_dir)
        if (output_dir / PREPARED).exists():
            shards: tuple[PreparedShard, ...] = ()
            with suppress(UserError):  # where the manifest is broken, all shards are written anew
                shards = _read_manifest(output_dir).shards
            notes = {output_dir / shard.name: to_dict(shard) for shard in shards}
            work_parts.reopen(output_dir / PREPARED, notes)

    on_main_process(state, begin)

    # Shards, then the manifest.
    began, skip = time.perf_counter(), config.data.on_error == "skip"
    write = partial(_write_part, output_dir, config.image, found.vector_size)
    survey = Survey(config.image)
    choices = {split: [survey.choose] for split in SPLITS}
    options: Any = {"description": "preparing", "num_threads": config.num_threads}
    work_parts.write_parts(found, output_dir, write, choices, state, skip=skip, **options)
    survey.report(found.source, shared=True)
    state.wait_for_everyone()
    on_main_process(state, lambda: _finish(output_dir, config, found, time.perf_counter() - began))


def _write_part(
    output_dir: Path,
    image: PreprocessingConfig,
    vector_size: int,
    part: Part,
    rows: Iterator[ReadItem],
    skipped: Mapping[str, list],
) -> None:
    """Write a part's shards, each whole or not at all."""
    height, width = image.height_width
    kind = pa.uint8() if image.value_range == (0, 255) else pa.float32()
    pixels = pa.list_(kind, image.channels * height * width)
    columns = {"id": pa.string(), "label": pa.int64(), "pixels": pixels}
    if vector_size:
        columns["vector"] = pa.list_(pa.float32(), vector_size)
    schema = pa.schema(columns)
    waiting: dict[str, list[ReadItem]] = {split: [] for split in part.splits}
    with ExitStack() as stack:
        # A file per split, beside its place until it is whole.
        writers: dict[str, pq.ParquetWriter] = {}
        for split in reversed(part.splits):
            aside = stack.enter_context(_noted_file(part.path(output_dir, split)))
            options = {"compression": "zstd", "compression_level": 1}
            writer = pq.ParquetWriter(aside, schema, use_dictionary=["id", "label"], **options)
            writers[split] = stack.enter_context(writer)

        # Rows, a few at a time.
        for row in rows:
            split = row.item.split
            waiting[split].append(row)
            if len(waiting[split]) == ROW_GROUP:
                _write_rows(writers[split], waiting[split])
                waiting[split] = []
        for split, last in waiting.items():
            if last:
                _write_rows(writers[split], last)
            writers[split].add_key_value_metadata({"skipped": json.dumps(skipped[split])})


def _write_rows(writer: pq.ParquetWriter, rows: list[ReadItem]) -> None:
    pixels = torch.stack([row.pixels[0] for row in rows]).numpy()
    values = pa.array(pixels.reshape(-1))
    columns: dict[str, object] = {
        "id": [row.item.id for row in rows],
        "label": [row.item.label for row in rows],
        "pixels": pa.FixedSizeListArray.from_arrays(values, pixels[0].size),
    }
    if "vector" in writer.schema.names:
        columns["vector"] = [row.item.vector for row in rows]
    writer.write_table(pa.table(columns, schema=writer.schema))


@contextmanager
def _noted_file(path: Path) -> Iterator[Path]:
    """A file that is written aside, and noted before it appears."""
    with whole_file(path) as aside:
        yield aside
        shard = PreparedShard(
            name=f"{path.parent.name}/{path.name}",
            rows=pq.read_metadata(aside).num_rows,
            num_bytes=aside.stat().st_size,
            sha256=file_hash(aside),
        )
        write_json(note_path(path), to_dict(shard))


def _finish(output_dir: Path, config: PrepareConfig, found: Parts, seconds: float) -> None:
    """Write the manifest, which says that all shards are there."""
    paths = [path for split in SPLITS for path in found.paths(output_dir, split)]
    notes = [note_path(path) for path in paths]
    shards = [from_dict(PreparedShard, read_json(note), str(note)) for note in notes]
    numbers = dict.fromkeys(SPLITS, 0)
    for shard in shards:
        numbers[shard.name.split("/")[0]] += shard.rows
    if not numbers["train"]:
        raise UserError(f"{config.data.path}: no training image can be read: check data.path.")
    manifest = PreparedManifest(
        source=last_names(config.data.path),
        image=config.image,
        class_names=found.classes(paths),
        has_labels=found.labelled,
        num_train=numbers["train"],
        num_validation=numbers["validation"],
        num_skipped=len(work_parts.skipped_images(paths)),
        shards=tuple(shards),
        vector_size=found.vector_size,
        vector_names=found.vector_names,
        condition_column=config.data.condition_column or "",
    )
    write = partial(write_json, output_dir / PREPARED, to_dict(manifest.with_hash()))
    work_parts.finish(found, output_dir, paths, write)
    number, size = sum(numbers.values()), sum(shard.num_bytes for shard in shards) / 2**20
    logger.info("%s: %d images in %.1f MiB, %.0f s.", output_dir, number, size, seconds)
