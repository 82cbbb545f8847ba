"""Picture files: a folder of them, or a list that names them."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vqvae2.common.accelerate import say
from vqvae2.common.errors import UserError
from vqvae2.data.preprocessing import Picture, first_line, read_picture
from vqvae2.data.source import (
    HELD_OUT_NAMES,
    PICTURE_SUFFIXES,
    Columns,
    ImageSource,
    SourcePair,
    number_classes,
    refuse_duplicates,
    say_unused,
)

LIST_SUFFIXES = {".txt", ".csv", ".tsv", ".jsonl"}


def open_folder(root: Path) -> SourcePair:
    """A folder of pictures, with class folders or without, or with train/ and validation/ in it.

    Raises:
        UserError: no picture, or folders of which it is unclear whether they are classes or splits.
    """
    folders = {
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    }
    held_out = next((name for name in HELD_OUT_NAMES if name in folders), None)
    if "train" not in folders:
        return _folder_source(root), None
    if held_out is None or not folders <= {"train", *HELD_OUT_NAMES}:
        raise UserError(
            f"{root} holds the folders {', '.join(sorted(folders))}, of which 'train' is no class: "
            f"name {root / 'train'} as data.path, and the held-out folder as data.validation_path."
        )
    say_unused(str(root), held_out, folders - {"train", held_out})
    return _folder_source(root / "train"), _folder_source(root / held_out)


def _folder_source(root: Path) -> ImageSource:
    named = sorted((path.relative_to(root).as_posix(), path) for path in pictures_below(root))
    if not named:
        raise UserError(
            f"{root} holds no image ({', '.join(sorted(PICTURE_SUFFIXES))}): check the folder."
        )
    ids, paths = [name for name, _ in named], [path for _, path in named]
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if all("/" in name for name in ids):  # every image is in a sub-folder: these are the classes
        labels, class_names = number_classes([name.split("/")[0] for name in ids], str(root))
    elif any("/" in name for name in ids):
        say(
            f"{root}: no classes, because {next(name for name in ids if '/' not in name)} lies in no class folder."
        )
    return ImageSource(
        str(root),
        ids,
        partial(_read_file, paths),
        partial(_length, paths),
        labels,
        class_names,
        files=paths,
    )


def pictures_below(root: Path) -> Iterator[Path]:
    """All picture files, through links too, but into no folder that holds the present one: such a link would have no end."""
    for parent, folders, names in os.walk(root, followlinks=True):
        here = Path(parent)
        above = {os.path.realpath(p) for p in (here, *here.parents)}
        folders[:] = [
            f
            for f in folders
            if not f.startswith(".")
            and not ((here / f).is_symlink() and os.path.realpath(here / f) in above)
        ]
        yield from (
            here / name
            for name in names
            if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith(".")
        )


def open_list(path: Path, columns: Columns) -> SourcePair:
    """A list of picture files, relative to the list's own folder: a path a line (.txt), or with the columns path, label and split
    (.csv, .tsv, .jsonl). Rows whose split is not train are held out.

    Raises:
        UserError: a broken line, a missing file, or a missing column.
    """
    rows = _read_rows(path)
    image = columns.image or next(
        (name for name in ("path", "file_name", "file", "image", "filename") if name in rows[0]),
        None,
    )
    label = columns.label or ("label" if "label" in rows[0] else None)
    for column in (image, label):
        if column is not None and any(row.get(column) is None for row in rows):
            raise UserError(
                f"{path}: not every row has the column {column!r} (the first has {list(rows[0])}): fill it in."
            )
    if image is None:
        raise UserError(
            f"{path} has the columns {list(rows[0])}, but none of files: name it 'path', or say which with --data.image-column."
        )
    names = [str(row[image]) for row in rows]
    refuse_duplicates([os.path.normpath(name) for name in names], str(path))
    paths = [path.parent / Path(name).expanduser() for name in names]
    missing = next((p for p in paths if not p.exists()), None)
    if missing is not None:
        raise UserError(
            f"{path} names {missing}, which does not exist: paths are relative to the list's folder."
        )
    labels, class_names = (
        number_classes([row[label] for row in rows], f"{path}: the column {label!r}")
        if label is not None
        else (None, ())
    )
    held_out = [i for i, row in enumerate(rows) if row.get("split", "train") != "train"]
    training = [i for i, row in enumerate(rows) if row.get("split", "train") == "train"]

    def part(chosen: Sequence[int]) -> ImageSource:
        files = [paths[i] for i in chosen]
        some = labels and [labels[i] for i in chosen]
        return ImageSource(
            str(path),
            [names[i] for i in chosen],
            partial(_read_file, files),
            partial(_length, files),
            some,
            class_names,
            files=files,
        )

    if not training:
        raise UserError(f"{path}: no row has the split 'train': give some.")
    return part(training), part(held_out) if held_out else None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".txt":
                rows: list[dict[str, Any]] = [
                    {"path": line.strip()} for line in file if line.strip()
                ]
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as a list ({first_line(error)}): check the file."
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows with columns: put one image on each line.")
    return rows


def _read_file(
    paths: Sequence[Path], index: int
) -> Picture:  # of the module, so that loader processes receive it pickled
    return read_picture(paths[index])


def _length(paths: Sequence[Path], index: int) -> int:
    return paths[index].stat().st_size if paths[index].exists() else -1
