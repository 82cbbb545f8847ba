"""What every source of images becomes: a table of rows, or a stream, and what is held out of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqvae2.common.errors import UserError
from vqvae2.data import splits
from vqvae2.data.stream import ImageStream
from vqvae2.data.table import ImageTable
from vqvae2.data.vectors import read_vectors


class Sources(NamedTuple):
    """Images, and those of them that are held out explicitly or by the source's own split."""

    train: ImageTable | ImageStream
    held_out: ImageTable | ImageStream | None


def make_table(
    name: str,
    ids: Sequence[str],
    cells: Any,
    *,
    labels: tuple[Sequence[Any], str, Sequence[str] | None] | None = None,
    row_splits: Sequence[str] = (),
    files: Sequence[Path] = (),
    conditions: Sequence[Any] | None = None,
) -> Sources:
    """A table of these rows, split in two where each names its split (train, or held out).

    Args:
        labels: the arguments of `number_classes`.
        conditions: what `read_vectors` takes.

    Raises:
        UserError: a name occurs twice, a row has no class or condition, or no row trains.
    """
    if not ids:
        raise UserError(f"{name} holds no image: check data.path.")
    splits.check_names(ids, name)
    splits.check_names(map(os.path.normpath, ids), name)
    numbers, class_names = splits.number_classes(*labels) if labels is not None else (None, ())
    vectors = read_vectors(conditions, name) if conditions is not None else None
    table = ImageTable(name, ids, cells, numbers, class_names, files, vectors)
    trains = [splits.split_of(str(split)) == "train" for split in row_splits]
    if all(trains):
        return Sources(table, None)
    if not any(trains):
        raise UserError(f"{name}: no row has the split 'train': give some.")
    train = [i for i, is_train in enumerate(trains) if is_train]
    held_out = [i for i, is_train in enumerate(trains) if not is_train]
    return Sources(table.choose(train), table.choose(held_out))


def numbered(number: int) -> list[str]:
    """Names for so many pictures that have none."""
    return [f"{i:09d}" for i in range(number)]
