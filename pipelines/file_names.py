"""Which file a command writes for each image: a sample's by its number, any other by its name."""

import hashlib
import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path, PurePosixPath

from vqvae2.data.decoding import PICTURE_SUFFIXES

LONGEST_NAME = 255  # bytes of a file's name, which most file systems allow


def file_names(names: Sequence[str], suffix: str) -> list[str]:
    """A file for each image, below one folder: cat/1.png for cat/1.jpg; where another image has
    that one, or has it but for capitals, cat/1.jpg.png or cat/1.jpg-2.png."""
    files: dict[str, str] = {}
    for name in below_their_folder(names):
        parts = Path(name).parts
        path = PurePosixPath(*(part for part in parts if part not in ("/", "..", "~")))
        stem = path.with_suffix("") if path.suffix.lower() in PICTURE_SUFFIXES else path
        tried = chain((stem, path), (f"{path}-{number}" for number in count(2)))
        made = (_of_legal_length(f"{new}{suffix}") for new in tried)
        file = next(new for new in made if new.casefold() not in files)
        files[file.casefold()] = file
    return list(files.values())


def below_their_folder(names: Sequence[str]) -> list[str]:
    """Names as they are; absolute paths relative to the folder that holds all of them."""
    if not all(map(os.path.isabs, names)):
        return [*names]
    root = os.path.commonpath(map(os.path.dirname, names))
    return [os.path.relpath(name, root) for name in names]


def _of_legal_length(file: str) -> str:
    """A path whose last name has at most 255 bytes: of a longer one, its ends and a hash."""
    folder, name = os.path.split(file)
    coded = os.fsencode(name)
    if len(coded) <= LONGEST_NAME:
        return file
    digest = hashlib.sha256(coded).hexdigest()[:8]
    start, end = (part.decode(errors="ignore") for part in (coded[:200], coded[-30:]))
    return os.path.join(folder, f"{start}-{digest}-{end}")


def sample_name(index: int) -> str:
    """The file of a sample, without a suffix: 000012."""
    return f"{index:06d}"


def sample_files(folder: Path) -> dict[int, Path]:
    """The samples that are in a set's folder, in order."""
    files = (folder / "images").glob(6 * "[0-9]" + "*")
    found = {int(file.stem): file for file in files if file.stem.isdecimal()}
    return dict(sorted(found.items()))
