"""Which kind of source a path names, and its pictures."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vqvae2.common.accelerate import say
from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig
from vqvae2.data.arrays import ARRAY_SUFFIXES, open_arrays
from vqvae2.data.files import LIST_SUFFIXES, open_folder, open_list, pictures_below
from vqvae2.data.prepared import MANIFEST_NAME as PREPARED_NAME
from vqvae2.data.prepared import RECORD_NAME as PREPARE_RECORD
from vqvae2.data.prepared import open_prepared
from vqvae2.data.source import (
    HELD_OUT_NAMES,
    Columns,
    ImageSource,
    SourcePair,
    refuse_shared,
    say_unused,
    split_files,
)
from vqvae2.data.tables import open_tables
from vqvae2.data.tars import open_tars

KINDS = "an image folder, a list (.txt, .csv, .tsv, .jsonl), .parquet, .arrow or .tar files, a .npy or .npz file, or a Hub dataset id"
SAVED_NAMES = ("state.json", "dataset_dict.json")  # what datasets.save_to_disk leaves
STRAY = 10  # pictures beside shards that are a banner or a preview; more are a dataset of their own
PATTERN = re.compile(r"[*?\[\]{}]")


def open_source(path: str, data: ImagesConfig, channels: int) -> SourcePair:
    """The source at a path, pattern of paths or Hub id, and its own held-out part if it has one.

    Raises:
        UserError: there is none, or none of a known kind.
    """
    if "://" in path:
        raise UserError(
            f"{path} is a URL: add --data.streaming to read it as it comes, or copy it to this machine first."
        )
    columns = Columns(data.image_column, data.label_column)
    local = Path(path).expanduser()
    if not local.exists() and PATTERN.search(path):
        return _open_files(path, expand(path), columns)
    if local.is_dir():
        if (local / PREPARED_NAME).exists():
            return open_prepared(local)
        if any((local / name).exists() for name in SAVED_NAMES):
            return open_tables(path, saved=True, columns=columns)
        if (local / PREPARE_RECORD).exists():
            raise UserError(f"{path} holds unfinished prepared images: run vqvae2 prepare again.")
        shards = find_shards(local)
        beside = list(islice(pictures_below(local), STRAY + 1)) if shards else []
        if len(beside) > STRAY:
            raise UserError(
                f"{path} holds pictures and {shards[0].relative_to(local)}: move one kind out, or name the files of the other by a pattern."
            )
        if beside:
            say(
                f"{path}: pictures beside the shards, such as {beside[0].relative_to(local)}, are not used."
            )
        return _open_files(path, shards, columns) if shards else open_folder(local)
    if local.is_file():
        if local.suffix in LIST_SUFFIXES:
            return open_list(local, columns)
        if local.suffix in ARRAY_SUFFIXES:
            return replace(open_arrays(local, channels), files=[local]), None
        return _open_files(path, [local], columns)
    if looks_like_path(path):
        raise UserError(f"{path} does not exist: check data.path ({KINDS}).")
    return open_tables(path, columns=columns)


def open_held_out(
    data: ImagesConfig, channels: int, train: str, files: Iterable[Path]
) -> ImageSource | None:
    """The explicit held-out set, if there is one.

    Args:
        train: the training images' name.
        files: the files behind them.

    Raises:
        UserError: it is a URL, is split itself, or shares files with the training images.
    """
    if data.validation_path is None:
        return None
    if "://" in data.validation_path:
        raise UserError(
            f"{data.validation_path} is a URL, but held-out images are read at once: copy them to this machine first."
        )
    source, rest = open_source(data.validation_path, data, channels)
    if rest is not None and len(rest):
        raise UserError(
            f"{data.validation_path} is split into training and held-out images itself: name the held-out part alone."
        )
    if len(source.files) != len(source):  # single pictures are compared where they are split
        refuse_shared(files, source.files, train)
    return source


def is_local(path: str) -> bool:
    """Whether a path or pattern names files of this machine that are there."""
    return "://" not in path and (
        Path(path).expanduser().exists()
        or (PATTERN.search(path) is not None and Path(expand_ranges(path)[0]).parent.exists())
    )


def expand(pattern: str) -> list[Path]:
    """The local files of a pattern with *, ?, [...] or {000..127}, in order of their names.

    Raises:
        UserError: none.
    """
    files: list[Path] = []
    for one in expand_ranges(pattern):
        where = Path(one).expanduser()
        parts = where.parts
        fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
        files += (
            sorted(Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))))
            if fixed < len(parts)
            else [where]
        )
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(
            f"{pattern}: {missing[0] if missing else 'no file'} {'does not exist' if missing else 'is of this pattern'}: check data.path."
        )
    return list(dict.fromkeys(files))


def expand_ranges(pattern: str) -> list[str]:
    """A pattern with {000..127} as the 128 names that it stands for; without one, itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [
        name
        for number in numbers
        for name in expand_ranges(pattern[: found.start()] + number + pattern[found.end() :])
    ]


def find_shards(folder: Path) -> list[Path]:
    """The Parquet, Arrow or tar files of a folder (perhaps in folders of splits), if it holds such."""
    for suffix in ("parquet", "arrow", "tar"):
        found = sorted([*folder.glob(f"*.{suffix}"), *folder.glob(f"*/*.{suffix}")])
        if found:
            return found
    return []


def _open_files(path: str, files: Sequence[Path], columns: Columns) -> SourcePair:
    suffixes = {file.suffix for file in files}
    if suffixes == {".tar"}:
        parts = split_files(files)
        held_out = next(
            (name for name in HELD_OUT_NAMES if name in parts and "train" in parts), None
        )
        first = parts.get("train", files)
        say_unused(path, held_out, set(parts) - {"train", held_out} if "train" in parts else ())
        return open_tars(path, first), open_tars(
            f"{path} ({held_out})", parts[held_out]
        ) if held_out is not None else None
    if suffixes in ({".parquet"}, {".arrow"}):
        return open_tables(path, files, columns=columns)
    raise UserError(f"{path} is of an unknown kind ({', '.join(sorted(suffixes))}): give {KINDS}.")
