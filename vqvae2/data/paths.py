"""Which files a path, a pattern or a folder means."""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from fnmatch import filter as matching
from pathlib import Path
from unicodedata import normalize

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.data.decoding import PICTURE_SUFFIXES, readable
from vqvae2.data.stream import is_junk

logger = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # `datasets`', beside pictures
MAX_SHARDS = 1_000_000  # that a pattern may stand for
PATTERN = re.compile(r"[*?\[\]{}]")


def expand_url(pattern: str) -> list[str]:
    """The URLs of a pattern with *, ?, [...] or {000..127}, in order of their names."""
    import fsspec

    with readable(pattern, "listed", "check data.path"):
        system, _, names = fsspec.get_fs_token_paths(expand_ranges(pattern))
    return [system.unstrip_protocol(name) for name in dict.fromkeys(names)]


def expand(pattern: Path) -> list[Path]:
    """The same for files. What exists as it is written is no pattern."""
    folder = next(parent for parent in pattern.parents if parent.exists())
    found: list[Path] = []
    for name in expand_ranges(str(pattern.relative_to(folder))):
        matches = sorted(_matches(folder, Path(name).parts), key=str)
        found += matches or ([] if PATTERN.search(name) else [folder / name])
    for file in found or [pattern]:
        if not file.is_file():
            raise UserError(f"{pattern}: {file} is no file that exists: check data.path.")
    return list(dict.fromkeys(found))


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The files below a folder that a pattern names, part by part."""
    if not parts or not folder.is_dir():
        yield from () if parts else (folder,)
        return
    first, rest = parts[0], parts[1:]
    if (folder / first).exists():
        yield from _matches(folder / first, rest)
    elif first == "**":
        yield from _matches(folder, rest)
        for entry in scan(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _matches(folder / entry.name, parts)
    elif PATTERN.search(first):
        for name in matching([entry.name for entry in scan(folder)], first):
            yield from _matches(folder / name, rest)


def expand_ranges(pattern: str) -> list[str]:
    """A pattern with {000..127} as the 128 names that it stands for; without one, itself.

    Raises UserError: it stands for more than `MAX_SHARDS`."""
    pieces = re.split(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    names = [pieces[0]]
    for first, last, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if len(names) * len(numbers) > MAX_SHARDS:
            what = f"{shown(pattern)} stands for more than {MAX_SHARDS:,} files"
            raise UserError(f"{what}: give smaller ranges.")
        digits = [str(number).zfill(len(first)) for number in numbers]
        names = [name + number + after for name in names for number in digits]
    return names


def find_file(path: Path, listings: dict[Path, dict[str, str]]) -> Path:
    """The file of this name; or the one whose name differs in how its accents are composed.

    Args:
        listings: the folders that were read by then, for the next call.
    """
    if os.path.exists(path) or path.parent == path or len(path.parts) > 100:
        return path
    parent = find_file(path.parent, listings)
    if parent not in listings:
        names = os.listdir(parent) if os.path.isdir(parent) else []
        listings[parent] = {normalize("NFC", name): name for name in names}
    return parent / listings[parent].get(normalize("NFC", path.name), path.name)


def scan(
    folder: Path | str, wanted: Callable[[str], bool] = lambda name: True
) -> list[os.DirEntry]:
    """The folders in a folder and those files whose names are wanted, by name, but for what nobody
    made. Raises OSError: it cannot be read."""
    with os.scandir(folder) as entries:
        made = [entry for entry in entries if not is_junk(entry.name)]
    found = [entry for entry in made if entry.is_dir() or wanted(entry.name)]
    return sorted(found, key=lambda entry: entry.name)


def fault_of(file: Path) -> str | None:
    """Why a file cannot be read to its end, if that is known before it is opened."""
    try:
        return None if stat.S_ISREG(os.stat(file).st_mode) else "is no regular file"
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', error)})"


def is_regular(path: Path) -> bool:
    """Whether a file is none that is passed over, saying so. (A broken link is not: it is named as
    unreadable later.)"""
    special = not path.is_dir() and fault_of(path) == "is no regular file"
    if special:
        logger.info("%s is not used: it is no regular file.", path)
    return not (special or path.is_dir())


def is_used(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES or name in METADATA


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All picture and metadata files, through links too, but not into a folder that holds the
    present one. Raises OSError: a folder cannot be read."""
    above |= {os.path.realpath(folder)}
    for entry in scan(folder, is_used):
        if entry.is_dir():
            if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                yield from files_below(Path(entry.path), above)
        elif entry.is_file() or is_regular(Path(entry.path)):
            yield Path(entry.path)
