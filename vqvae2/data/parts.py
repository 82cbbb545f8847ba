"""Images in fixed parts, for what reads each of them once and writes a shard per part: preparation and extraction.

Which images are in which part, and in which order, depends on the data alone: not on the number of processes, nor on what was done before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqvae2.common.errors import UserError
from vqvae2.common.threads import ordered
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data.arrays import PythonImages
from vqvae2.data.images import BadImage, Choice, ImageDataset, is_held_out, load_images
from vqvae2.data.shards import Shards, find_stream
from vqvae2.data.source import ImageSource
from vqvae2.data.sources import open_held_out
from vqvae2.data.streams import decode, stream_facts

SPLITS = ("train", "validation")


class Item(NamedTuple):
    """An image of a part."""

    split: str
    id: str
    label: int | None
    pixels: Callable[[Choice | None], np.ndarray]
    """Reads it: `(C, H, W)`, changed as is chosen for its size, or not. Raises BadImage."""


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


def _with_raw_numbers(source: ImageSource) -> ImageSource:
    """A held-out source with its classes as the numbers that a stream has.

    Raises:
        UserError: they are names.
    """
    if source.labels is None:
        return source
    if not all(name.isdecimal() for name in source.class_names):
        raise UserError(
            f"{source.name} has the classes {list(source.class_names)}, but streamed classes are numbers from 0 on: number them alike."
        )
    return replace(source, labels=[int(source.class_names[label]) for label in source.labels])


def _refuse_half_labelled(shards: Shards, held_out: ImageSource) -> None:
    """Whether held-out images have labels as those of the stream have, judged by its first rows: not found out when all is done.

    Raises:
        UserError: they have and it has not, or the other way round.
    """
    rows = (row for number in range(len(shards)) for row in shards.rows(number))
    if {row.label is None for row in islice(rows, 64)} == {held_out.labels is not None}:
        with_labels, without = (
            (shards.name, held_out.name)
            if held_out.labels is None
            else (held_out.name, shards.name)
        )
        raise UserError(
            f"{with_labels} has labels, but {without} has none: give every image a label, or none."
        )


@dataclass(frozen=True)
class Parts:
    """All images of a configuration in parts, in order."""

    parts: tuple[Part, ...]
    source: str
    facts: Mapping[str, str]
    """What a run that continues must find again."""
    class_names: tuple[str, ...] | None
    """None if labels are met only as the images are read."""


def find_parts(data: ImagesConfig | PythonImages, config: PreprocessingConfig, size: int) -> Parts:
    """Cut each split into parts of `size` images; of a stream every shard is a part.

    Raises:
        UserError: see `load_images` and `find_stream`.
    """
    if isinstance(data, ImagesConfig) and data.streaming:
        shards = find_stream(data)
        held_out = open_held_out(data, config.channels, data.path, shards.files)
        both = held_out is None and config.validation_fraction > 0
        parts = [
            Part(
                i,
                SPLITS if both else SPLITS[:1],
                partial(_stream_items, shards, i, config, both),
                None,
            )
            for i in range(len(shards))
        ]
        if held_out is not None:
            _refuse_half_labelled(shards, held_out)
            parts += _cut(
                "validation",
                ImageDataset(
                    _with_raw_numbers(held_out), range(len(held_out)), config, cached=False
                ),
                size,
            )
        return Parts(tuple(parts), data.path, stream_facts(shards, held_out, config), None)
    images = load_images(data, config, check=False)
    parts = [part for split, dataset in images.items() for part in _cut(split, dataset, size)]
    return Parts(tuple(parts), images.train.source.name, images.facts(), images.class_names)


class ReadItem(NamedTuple):
    """An image that was read, or why it could not be."""

    item: Item
    pixels: list[np.ndarray]
    error: BadImage | None


def read_items(
    items: Iterable[Item],
    choices: Callable[[str], Sequence[Choice | None]],
    *,
    skip: bool,
    num_threads: int,
) -> Iterator[ReadItem]:
    """The items in order, with pixels `(C, H, W)` for each of the changes that are wanted of their split; decoded ahead on several threads.

    Args:
        skip: whether a broken image is passed on with its error.

    Raises:
        BadImage: a broken one, unless they are to be skipped.
    """

    def read(item: Item) -> ReadItem:
        try:
            return ReadItem(item, [item.pixels(choice) for choice in choices(item.split)], None)
        except BadImage as error:
            if not skip:
                raise
            return ReadItem(item, [], error)

    return ordered(read, items, num_threads=num_threads)


def _cut(split: str, images: ImageDataset, size: int) -> list[Part]:
    starts = range(0, len(images), size)
    ranges = [range(first, min(first + size, len(images))) for first in starts]
    return [
        Part(number, (split,), partial(_range_items, split, images, rows), len(rows))
        for number, rows in enumerate(ranges)
    ]


def _range_items(split: str, images: ImageDataset, rows: range) -> Iterator[Item]:
    for row in rows:
        index = images.indices[row]
        label = images.source.labels[index] if images.source.labels is not None else None
        yield Item(split, images.source.ids[index], label, partial(_pixels_of_row, images, row))


def _pixels_of_row(images: ImageDataset, row: int, choice: Choice | None) -> np.ndarray:
    return (images.pixels(row) if choice is None else images.changed(row, choice)).numpy()


def _stream_items(
    shards: Shards, number: int, config: PreprocessingConfig, both: bool
) -> Iterator[Item]:
    for row in shards.rows(number):
        split = SPLITS[both and is_held_out(row.id, config.validation_fraction)]
        yield Item(split, row.id, row.label, partial(decode, shards.name, row, config))
