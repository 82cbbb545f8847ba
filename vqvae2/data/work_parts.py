"""Jobs that read every image once and write shards of them: preparation and extraction.

Which images are in which part, and in which order, depends on the data alone: not on the number of
processes, nor on what was done before. A shard is done when a note beside it names its bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.state import PartialState
from torch import Tensor

from vqvae2.common.artifact import content_hash
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, read_json, write_json
from vqvae2.common.loading import ordered
from vqvae2.common.messages import progress_bar
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.common.vocabulary import SPLITS
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import Choice, decode
from vqvae2.data.dataset import ImageDataset, split_table, stream_facts
from vqvae2.data.decoding import BadImage
from vqvae2.data.open_arrays import PythonImages
from vqvae2.data.open_source import open_source
from vqvae2.data.splits import check_labelled, check_no_class_lost, is_held_out
from vqvae2.data.stream import ImageStream
from vqvae2.data.table import ImageTable
from vqvae2.data.vectors import read_vector


class Item(NamedTuple):
    """An image of a part."""

    split: str
    id: str
    label: int | None
    pixels: Callable[[Choice], Tensor]
    """Reads it: `(C, H, W)`, changed as chosen for its size. Raises BadImage."""
    vector: np.ndarray | None = None
    """Its condition `(V,)`, if images have any."""


class ReadItem(NamedTuple):
    """An image that was read, or why it could not be."""

    item: Item
    pixels: list[Tensor]
    error: BadImage | None


@dataclass(frozen=True)
class Part:
    """A fixed part of the images, of one split or (a shard of a stream) of both."""

    number: int
    splits: tuple[str, ...]
    items: Callable[[], Iterator[Item]]
    num_items: int | None
    """How many images, where that is known before they are read."""

    def path(self, output_dir: Path, split: str) -> Path:
        """Where the shard of this part and split is written."""
        return output_dir / split / f"{self.number:05d}.parquet"


@dataclass(frozen=True)
class Parts:
    """All images in parts, in order."""

    parts: tuple[Part, ...]
    source: str
    facts: Mapping[str, str]
    """What a run that continues must find again."""
    labelled: bool
    class_names: tuple[str, ...] | None
    """None for a stream, whose classes are the numbers that occur."""
    vector_size: int = 0
    """Length of the condition vectors, if there are any."""
    vector_names: tuple[str, ...] = ()
    """Of attributes, what the places of a vector stand for."""

    def number(self) -> int:
        """How many images there are in all; of a stream, how many parts."""
        return sum(1 if part.num_items is None else part.num_items for part in self.parts)

    def paths(self, output_dir: Path, split: str) -> list[Path]:
        """The shards of a split, in order."""
        return [part.path(output_dir, split) for part in self.parts if split in part.splits]

    def classes(self, shards: Iterable[Path]) -> tuple[str, ...]:
        """The classes' names; of a stream, the numbers from 0 to the highest in these shards."""
        if self.class_names is not None:
            return self.class_names
        return tuple(map(str, range(max(self.labels(shards), default=-1) + 1)))

    def labels(self, shards: Iterable[Path]) -> set[int]:
        """The labels that occur in these shards."""
        found: set[int] = set()
        for path in shards if self.labelled else ():
            found |= set(pq.read_table(path, columns=["label"])["label"].unique().to_pylist())
        return found

    def refuse_lost_classes(self, shards: Sequence[Path]) -> None:
        """Raises UserError: all images of a class were skipped: it is no empty class."""
        skipped = {name for name, _ in skipped_images(shards)}
        if not (skipped and self.class_names):
            return
        items = (item for part in self.parts for item in part.items() if item.id in skipped)
        lost = {item.label for item in items if item.label is not None}
        check_no_class_lost(lost - self.labels(shards), self.class_names, self.source)


def find_parts(data: ImagesConfig | PythonImages, config: PreprocessingConfig, size: int) -> Parts:
    """Cut each split of a table into parts of `size` images; of a stream every shard is a part.
    Raises UserError: see `open_source`."""
    opened = open_source(data, config)
    train, held_out = opened
    if isinstance(train, ImageTable):
        found = split_table(opened, config)
        if train.labelled > found.validation.source.labelled and len(found.validation):
            what = f"{found.validation.source.name} has no labels for the classes of {train.name}"
            what_to_do = "name the training images alone, or add --data.label-column none"
            raise UserError(f"{what}: {what_to_do}.")
        other, number = found.validation.source, len(found.validation)
        if train.vectors is not None and number and other.vectors is None:
            what = f"{other.name} has no condition vectors, but {train.name} has"
            raise UserError(f"{what}: prepare both with --data.condition-column.")
        parts = [part for split, images in found.items() for part in _cut(split, images, size)]
        facts, vectors = found.facts(), train.vectors
        all_found = Parts(tuple(parts), train.name, facts, train.labelled, train.class_names)
        if vectors is None:
            return all_found
        tables = [table.vectors for table in opened if isinstance(table, ImageTable)]
        named = [(str(i), torch.from_numpy(v.values)) for i, v in enumerate(tables) if v]
        facts["conditions_hash"] = content_hash(list(vectors.names), named)
        return replace(all_found, vector_size=vectors.size, vector_names=vectors.names)

    # A stream: without a held-out set, each shard holds images of both splits.
    both = held_out is None and config.validation_fraction > 0
    parts = _shards(train, SPLITS if both else SPLITS[:1], config, train.vector_size)
    labelled = train.labelled
    if held_out is not None:
        check_labelled(held_out.labelled, labelled, held_out.name)
    if isinstance(held_out, ImageStream):
        parts += _shards(held_out, SPLITS[1:], config, train.vector_size)
    elif held_out is not None:
        known, size_of_all = held_out.vectors, train.vector_size
        if size_of_all and not (known and known.size == size_of_all and not known.names):
            what = f"{held_out.name} has no condition vectors of {size_of_all} values"
            raise UserError(f"{what}, but {train.name} has: give the same column to both.")
        parts += _cut(SPLITS[1], ImageDataset(held_out, range(len(held_out)), config), size)
    facts = stream_facts(opened, config)
    return Parts(tuple(parts), train.name, facts, labelled, None, vector_size=train.vector_size)


def _cut(split: str, images: ImageDataset, size: int) -> list[Part]:
    def items(rows: range) -> Iterator[Item]:
        for i in rows:
            name = images.source.ids[images.indices[i]]
            pixels = partial(images.changed, i)
            yield Item(split, name, images.label(i), pixels, images.vector(i))

    parts = []
    for number, first in enumerate(range(0, len(images), size)):
        rows = range(first, min(first + size, len(images)))
        parts.append(Part(number, (split,), partial(items, rows), len(rows)))
    return parts


def _shards(
    stream: ImageStream, splits: tuple[str, ...], config: PreprocessingConfig, vector_size: int
) -> list[Part]:
    def items(number: int) -> Iterator[Item]:
        for row in stream.rows(number):
            held_out = len(splits) > 1 and is_held_out(row.id, config.validation_fraction)
            cell, vector = row.cell, None
            try:
                vector = read_vector(row.condition, row.id) if vector_size else None
                if vector is not None and len(vector) != vector_size:
                    what = f"it has a condition of {len(vector)} values"
                    raise UserError(f"{what}, but others have {vector_size}: correct it.")
            except UserError as error:  # which is raised, or skipped, when its picture is read
                cell = cell if isinstance(cell, UserError) else error
            pixels = partial(decode, stream.name, row.id, cell, config)
            yield Item(splits[held_out], row.id, row.label, pixels, vector)

    return [Part(i, splits, partial(items, i), None) for i in range(len(stream))]


def read_items(
    items: Iterable[Item],
    choices: Mapping[str, Sequence[Choice]],
    *,
    skip: bool,
    num_threads: int = 0,
) -> Iterator[ReadItem]:
    """The items in order, decoded ahead on several threads (0: one per core).

    Args:
        choices: split -> the changes that each image is wanted in.
        skip: whether a broken image is passed on with its error.

    Raises:
        BadImage: a broken one, unless they are skipped.
    """

    def read(item: Item) -> ReadItem:
        try:
            return ReadItem(item, [item.pixels(choice) for choice in choices[item.split]], None)
        except BadImage as error:
            if not skip:
                raise
            return ReadItem(item, [], error)

    return ordered(read, items, num_threads=num_threads or os.cpu_count() or 1)


def write_parts(
    found: Parts,
    output_dir: Path,
    write: Callable[[Part, Iterator[ReadItem], Mapping[str, list]], None],
    choices: Mapping[str, Sequence[Choice]],
    state: PartialState,
    *,
    description: str,
    skip: bool,
    num_threads: int = 0,
) -> None:
    """Write the shards that are not done; each process takes its share of the parts.

    Args:
        write: writes the shards of a part, with their notes, from its images as they are read; and
            into each the (name, reason) pairs of its split that were skipped by then, as JSON in
            the metadata `skipped`.

    Raises:
        UserError: a broken image, or some images with labels and some without.
    """

    def good(rows: Iterator[ReadItem], skipped: Mapping[str, list]) -> Iterator[ReadItem]:
        for row in rows:
            bar.update()
            if row.error is not None:
                skipped[row.item.split].append((row.error.name, row.error.reason))
                continue
            check_labelled(row.item.label is not None, found.labelled, row.item.id)
            yield row

    parts = found.parts[state.process_index :: state.num_processes]
    sizes = [part.num_items for part in parts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with progress_bar(desc=description, total=total, unit="image") as bar:
        for part in parts:
            if all(_is_done(part.path(output_dir, split)) for split in part.splits):
                bar.update(part.num_items or 0)
                continue
            rows = read_items(part.items(), choices, skip=skip, num_threads=num_threads)
            skipped: dict[str, list] = {split: [] for split in part.splits}
            write(part, good(rows, skipped), skipped)


# Resume


def note_path(shard: Path) -> Path:
    """Where what the manifest will say of a shard waits until all shards are there."""
    return shard.with_name(f".{shard.stem}.json")


def _is_done(shard: Path) -> bool:
    """Whether a shard is there, and is the file that was noted when it was written."""
    if not (shard.exists() and note_path(shard).exists()):
        return False
    try:
        return file_hash(shard) == read_json(note_path(shard)).get("sha256")
    except UserError:  # a broken note
        return False


def reopen(manifest: Path, notes: Mapping[Path, Mapping[str, Any]]) -> None:
    """Make a finished folder an unfinished one: what its manifest says of shards becomes notes."""
    for shard, note in notes.items():
        write_json(note_path(shard), dict(note))
    manifest.unlink()


def finish(
    found: Parts, output_dir: Path, shards: Sequence[Path], write_manifest: Callable[[], None]
) -> None:
    """List what was skipped, write the manifest, and remove the notes. Raises UserError: all images
    of a class were skipped."""
    list_skipped(output_dir, skipped_images(shards))
    found.refuse_lost_classes(shards)
    write_manifest()
    tidy(output_dir)
    report_skipped(output_dir)


def tidy(output_dir: Path) -> None:
    """Remove the notes of a finished folder, whose manifest replaces them."""
    for split in SPLITS:
        for note in (output_dir / split).glob(".[0-9]*.json"):
            note.unlink(missing_ok=True)


def skipped_images(shards: Iterable[Path]) -> list[tuple[str, str]]:
    """Names and reasons of the images that were skipped while these shards were written."""
    pairs = []
    for path in shards:
        metadata = pq.read_metadata(path).metadata or {}
        pairs += [(name, reason) for name, reason in json.loads(metadata.get(b"skipped", b"[]"))]
    return pairs
