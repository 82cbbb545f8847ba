"""Tables with a column of encoded pictures: Parquet and Arrow files, saved `datasets`, the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqvae2.common.errors import UserError
from vqvae2.data.preprocessing import Picture, first_line, read_picture
from vqvae2.data.source import (
    HELD_OUT_NAMES,
    Columns,
    ImageSource,
    SourcePair,
    number_classes,
    refuse_duplicates,
    say_unused,
    shard_stem,
    split_files,
)

IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg", "jpeg", "webp")


def open_tables(
    path: str, files: Sequence[Path] = (), *, columns: Columns, saved: bool = False
) -> SourcePair:
    """Parquet or Arrow files, a folder that `datasets` saved, or (with neither) a Hub dataset. A column `split` divides a single table.

    Raises:
        UserError: no table, no column of pictures, or rows without a class.
    """
    import datasets

    names: dict[str, list[str]] = {}
    parts: dict[str, list[Path]] = {}
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
        elif files:
            parts = split_files(files)
            loaded = datasets.load_dataset(
                files[0].suffix.removeprefix("."),
                data_files={part: list(map(str, paths)) for part, paths in parts.items()},
            )
            if files[0].suffix == ".parquet":
                names = {
                    part: [i for p in paths for i in row_ids(shard_stem(p.name), _length(p))]
                    for part, paths in parts.items()
                }
        else:
            loaded = datasets.load_dataset(path)
    except (
        Exception
    ) as error:  # `datasets` and the hub client raise many kinds; the user needs one sentence
        raise UserError(
            f"{path} cannot be read as a dataset ({type(error).__name__}: {first_line(error)}): check data.path."
        ) from None
    tables = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    part = "train" if "train" in tables else next(iter(tables))
    train, ids = tables[part], names.get(part)
    other = next((name for name in HELD_OUT_NAMES if name in tables and name != part), None)
    say_unused(path, other, set(tables) - {part, other})
    files_behind = _files_behind(train, parts.get(part, []))
    source = replace(_table_source(path, train, ids, columns), files=files_behind)
    if other is not None:
        held_out = _table_source(path, tables[other], names.get(other), columns)
        return source, replace(held_out, files=_files_behind(tables[other], parts.get(other, [])))
    if "split" not in train.column_names:
        return source, None
    kind = train.features["split"]
    splits = np.array(
        kind.int2str(train["split"]) if isinstance(kind, datasets.ClassLabel) else train["split"]
    )
    if "train" not in splits:
        raise UserError(
            f"{path}: no row has the split 'train' (but {', '.join(sorted(set(map(str, splits))))}): give some."
        )
    sides = [np.flatnonzero(side).tolist() for side in (splits == "train", splits != "train")]
    sources = [
        _table_source(path, train.select(side), [source.ids[i] for i in side], columns)
        for side in sides
        if len(side)
    ]
    return replace(sources[0], files=files_behind), sources[1] if len(sources) > 1 else None


def row_ids(stem: str, number: int) -> list[str]:
    """Names for the rows of a file that has none for them."""
    return [f"{stem}/{i:06d}" for i in range(number)]


def find_column(features: Mapping[str, Any], path: str, image_column: str | None) -> str:
    """The column of pictures.

    Raises:
        UserError: there is none.
    """
    if image_column is not None and image_column not in features:
        raise UserError(
            f"{path} has the columns {list(features)}, but no {image_column!r}: correct --data.image-column."
        )
    found = image_column or next((name for name in IMAGE_COLUMNS if name in features), None)
    if found is None:
        raise UserError(
            f"{path} has the columns {list(features)}, but none of images: name it 'image', or say which with --data.image-column."
        )
    return found


def class_column(features: Mapping[str, Any], kind: Any) -> str | None:
    """The column of classes: one that is named so, or else one of that kind."""
    if "label" in features:
        return "label"
    return next(
        (
            name
            for name, feature in features.items()
            if name != "split" and isinstance(feature, kind)
        ),
        None,
    )


def _files_behind(table: Any, files: Sequence[Path]) -> list[Path]:
    """The given files, or those that a saved dataset lies in."""
    return list(files) or [Path(file["filename"]) for file in table.cache_files]


def read_cell(cell: Any) -> Picture:
    """An encoded picture: its bytes, or {"bytes", "path"} as `datasets` stores it.

    Raises:
        UserError: it is neither.
    """
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        return read_picture(cell["path"])
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return read_picture(cell["bytes"], Path(cell.get("path") or "").suffix)
    if isinstance(cell, bytes):
        return read_picture(cell)
    raise UserError(
        f"it is a {type(cell).__name__}, but encoded bytes are due: name the column of pictures with --data.image-column."
    )


def _length(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def _table_source(path: str, table: Any, ids: list[str] | None, columns: Columns) -> ImageSource:
    import datasets

    features = table.features
    typed = next(
        (name for name, feature in features.items() if isinstance(feature, datasets.Image)), None
    )
    image = find_column(features, path, columns.image or typed)
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    label = columns.label or class_column(features, datasets.ClassLabel)
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if label is not None:
        if label not in features:
            raise UserError(
                f"{path} has the columns {list(features)}, but no {label!r}: correct --data.label-column."
            )
        names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
        labels, class_names = number_classes(
            list(table[label]), f"{path}: the column {label!r}", names
        )
    if "id" in features:
        ids = list(map(str, table["id"]))
    ids = ids or [f"{i:09d}" for i in range(len(table))]
    refuse_duplicates(ids, path)
    pictures = table.select_columns([image])
    return ImageSource(
        path,
        ids,
        partial(_read_row, pictures, image),
        partial(_length_of_cell, pictures, image),
        labels,
        class_names,
    )


def _read_row(
    table: Any, column: str, index: int
) -> Picture:  # of the module, so that loader processes receive it pickled
    return read_cell(table[index][column])


def _length_of_cell(table: Any, column: str, index: int) -> int:
    cell = table[index][column]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(content) if isinstance(content, bytes) else -1
