"""What every source of pictures becomes: named pictures that can be read in any order, each with a label or none."""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vqvae2.common.accelerate import say
from vqvae2.common.errors import UserError
from vqvae2.config import PreprocessingConfig
from vqvae2.data.preprocessing import Picture

PICTURE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".avif",
    ".heic",
    ".jp2",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".npy",
}
SAMPLED = 128  # pictures that are looked at to tell a source from another with the same names
HELD_OUT_NAMES = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table or list hold pictures and classes, where that is not to be guessed."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Prepared:
    """Pictures that `vqvae2 prepare` has brought into their final form."""

    config: PreprocessingConfig
    """How they were prepared."""
    pixels: Callable[[Sequence[int]], np.ndarray]
    """Pixels `(B, C, H, W)` of these rows: uint8, or float32 in [-1, 1]."""


@dataclass(frozen=True)
class ImageSource:
    """Named pictures, each with a label or none."""

    name: str
    ids: Sequence[str]
    """A name for each picture, relative to the source's root: it decides the split and goes into the code dataset."""
    read: Callable[[int], Picture]
    """One picture. What it raises for a broken one, of any kind, is reported with the picture's name."""
    mark: Callable[[int], int]
    """Something cheap that tells a picture from another of the same name: the length of its file, or a checksum of its values."""
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] = ()
    prepared: Prepared | None = None
    files: Sequence[Path] = ()
    """The files behind it, where they can be named: one for each picture, or shards of many."""

    def __post_init__(self) -> None:
        try:
            "".join(self.ids).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{self.name} holds a name that is not UTF-8 ({next(filter(_is_strange, self.ids))!r}): rename that image."
            ) from None

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self) -> list[int]:
        """Marks of some pictures from all over the source."""
        return [self.mark(i) for i in range(0, len(self), max(1, len(self) // SAMPLED))]

    def with_classes_of(self, train: "ImageSource") -> "ImageSource":
        """This source with its labels counted as in the training source.

        Raises:
            UserError: it has classes that the training source has not, or none where that has some.
        """
        if train.labels is None:
            return replace(self, labels=None, class_names=())
        if self.labels is None or not set(self.class_names) <= set(train.class_names):
            raise UserError(
                f"{self.name} has the classes {list(self.class_names)}, but {train.name} has {list(train.class_names)}: "
                f"the held-out images need the training images' classes."
            )
        labels = [train.class_names.index(self.class_names[label]) for label in self.labels]
        return replace(self, labels=labels, class_names=train.class_names)


SourcePair = tuple[ImageSource, ImageSource | None]
"""A source, and its own held-out part if it has one."""


def _is_strange(name: str) -> bool:
    return bool(re.search("[\ud800-\udfff]", name))


def split_files(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by split: their folder or the beginning of their name may say validation, val, valid or test; all others train."""
    parts: dict[str, list[Path]] = {}
    for path in files:
        words = {path.parent.name, re.split(r"[-_.]", path.name)[0]}
        parts.setdefault(
            next((name for name in HELD_OUT_NAMES if name in words), "train"), []
        ).append(path)
    return parts


def say_unused(name: str, held_out: str | None, unused: Iterable[str]) -> None:
    """Tell which splits of a source are neither trained on nor held out, if there are such."""
    rest = sorted(unused)
    if rest:
        say(
            f"{name}: {f'{held_out!r} is held out' if held_out is not None else 'no split is known as held out'}; not used: {', '.join(rest)}."
        )


def number_classes(
    values: Sequence[Any], name: str, names: Sequence[str] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers from 0 on, and the classes' names.

    Args:
        values: class names, or numbers; all of one kind.
        name: of the source and column, for messages.
        names: what the numbers mean; without it the sorted values are the classes.

    Raises:
        UserError: a value is missing, of another kind, or no number of a class.
    """
    kinds = {"empty" if value == "" else type(value) for value in values}
    if kinds not in ({int}, {str}) or (
        names is not None and not 0 <= min(values) <= max(values) < len(names)
    ):
        raise UserError(
            f"{name} does not give every row a class (found {sorted(map(str, kinds))}): fill it in, or remove it."
        )
    if names is not None:
        return list(values), tuple(names)
    known = sorted(set(values))
    number = {value: i for i, value in enumerate(known)}
    return [number[value] for value in values], tuple(map(str, known))


def shard_stem(name: str) -> str:
    """What the names of a shard's rows begin with."""
    return re.sub(r"\.(parquet|arrow|tar|tar\.gz)$", "", PurePosixPath(name).name)


def shared_file(some: Iterable[Path], others: Iterable[Path]) -> Path | None:
    """One of some files that is one of the others too, by whatever name (a link, another way to write it)."""
    known = {file_identity(path) for path in others}
    return next((path for path in some if file_identity(path) in known), None)


def file_identity(path: Path) -> object:
    """The same for all names of a file: links of both kinds."""
    try:
        status = os.stat(path)
    except OSError:
        return str(path)
    return status.st_dev, status.st_ino


def refuse_shared(train: Iterable[Path], held_out: Iterable[Path], name: str) -> None:
    """No file is trained on and held out.

    Raises:
        UserError: naming one that would be.
    """
    shared = shared_file(held_out, train)
    if shared is not None:
        raise UserError(
            f"{shared}, which is held out, is among the training images of {name} too, and would be trained on: keep them apart (look for links)."
        )


def refuse_duplicates(ids: Sequence[str], name: str) -> None:
    """Every picture needs a name of its own.

    Raises:
        UserError: naming one that occurs twice.
    """
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise UserError(
            f"{name} names {twice!r} more than once: each image needs a name of its own."
        )


def row_checksum(rows: np.ndarray, index: int) -> int:
    """A picture's mark, where its values are in memory."""
    return zlib.crc32(np.ascontiguousarray(rows[index]).tobytes())
