"""Lists that name picture files, and their classes, splits and conditions."""

import csv
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig
from vqvae2.data.decoding import readable
from vqvae2.data.paths import fault_of, find_file
from vqvae2.data.sources import Sources, make_table
from vqvae2.data.stream import find_columns
from vqvae2.data.table import ImageTable, open_parquet

logger = logging.getLogger(__name__)

FILE_COLUMNS = ("path", "file_name", "file", "image", "filename", "image_file_name")
LISTS = {".txt", ".csv", ".tsv", ".jsonl"}


def open_metadata(
    root: Path, found: Iterable[Path], ids: Sequence[str], data: ImagesConfig
) -> Sources | None:
    """What the metadata file of a folder lists; or that of folders of splits (then there are no
    `ids`), or those of its folders together, if they give a class to every picture."""
    # One for each folder.
    by_folder = {path.parent: path for path in sorted(found, key=str, reverse=True)}
    own = by_folder.get(root) if ids else None
    paths = [own] if own is not None else sorted(by_folder.values())
    if not paths:
        return None

    # The folder's own is used in any case.
    name = paths[0].relative_to(root)
    try:
        listed = open_list(paths, root, data)
    except UserError as error:
        if own is not None:
            raise
        logger.info("%s: %s is not used: %s", root, name, error)
        return None
    names = [name for table in listed if isinstance(table, ImageTable) for name in table.ids]
    for other in names:
        if os.path.isabs(other) or {"..", "~"} & {*Path(other).parts}:
            what = f"{paths[0]} names {shown(other)}, which lies outside of its folder"
            raise UserError(f"{what}: give the list itself as data.path, if it is yours.")
    number = len(ids) - len(names)
    if own is not None and number > 0:
        logger.info("%s: %d pictures are not in it, and not used.", own, number)
    elif own is None and (number > 0 or not (listed.train.labelled or data.condition_column)):
        logger.info("%s: %s is not used: it does not give each picture a class.", root, name)
        return None
    if not listed.train.labelled and len({*map(os.path.dirname, names)}) > 1:
        text = "%s: no classes: %s says nothing of them, so folders are none (add a column label)."
        logger.info(text, root, name)
    return listed


def open_list(paths: Sequence[Path], root: Path, data: ImagesConfig) -> Sources:
    """Lists of picture files, each relative to its own folder (`root`, or one below): a path a line
    (.txt), or with the columns path, label and split. Rows whose split is not train are held out.
    """
    # Rows.
    ids: list[str] = []
    values: list[Any] = []
    conditions: list[Any] | None = [] if data.condition_column else None
    row_splits: list[Any] = []
    listings: dict[Path, dict[str, str]] = {}
    files: list[Path] = []
    for path in paths:
        rows = _read_rows(path)
        columns = {name: cell for row in reversed(rows) for name, cell in row.items()}
        image, label = find_columns(columns, str(path), data, FILE_COLUMNS)
        for column in (image, label):
            if column is not None and any(row.get(column) is None for row in rows):
                raise UserError(f"{path}: a row has no {column!r}, but others have: fill it in.")
        for row in rows:
            file = find_file(path.parent / os.path.expanduser(str(row[image])), listings)
            if fault := fault_of(file):
                what = f"{path} names {shown(str(row[image]))}, which {fault}"
                raise UserError(f"{what}: paths start at the list.")
            files.append(file)
            prefix = "" if path.parent == root else f"{path.parent.relative_to(root).as_posix()}/"
            ids.append(prefix + str(row[image]))
            values.append(row[label] if label else None)
            if conditions is not None:
                conditions.append(row.get(str(data.condition_column)))
            row_splits.append(row.get("split", "train"))

    # A table of them.
    name = str(paths[0] if len(paths) == 1 else root)
    source = f"{name}: the column {label!r}"
    labels = (values, source, None) if any(value is not None for value in values) else None
    options: Any = {"row_splits": row_splits, "files": files, "conditions": conditions}
    return make_table(name, ids, files, labels=labels, **options)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a list, by the file's suffix; spaces around names and values do not count."""
    text = "" if path.suffix == ".parquet" else ", which must be UTF-8"
    with readable(str(path), "read as a list", f"check the file{text}"):
        if path.suffix == ".parquet":
            rows: list[Any] = open_parquet(path).read().to_pylist()
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                lines = ((i, line) for i, line in enumerate(file, start=1) if line.strip())
                if path.suffix == ".txt":
                    rows = [{"path": line} for _, line in lines]
                elif path.suffix == ".jsonl":
                    rows = [_parse_line(line, i) for i, line in lines]
                else:
                    separator = "\t" if path.suffix == ".tsv" else _separator(file.readline())
                    file.seek(0)
                    reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True)
                    rows = list(reader)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows with columns: put one image on each line.")
    if path.suffix in (".txt", ".csv", ".tsv"):
        for i, row in enumerate(rows):
            rows[i] = {
                str(k).strip(): v.strip() if isinstance(v, str) else v for k, v in row.items()
            }
    return rows


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None


def _separator(heading: str) -> str:
    """That of a .csv: where numbers have a decimal comma, spreadsheets write semicolons."""
    return ";" if ";" in heading and "," not in heading else ","
