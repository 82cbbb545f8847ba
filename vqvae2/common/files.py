"""Files appear whole or not at all: write beside the target, then rename. Torch-free."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vqvae2.common.errors import UserError

LONGEST_TEXT = 1 << 28  # bytes of a file that is read as a whole


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it replaces `path` if the block raises no error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # Libraries report a full disk without saying where.
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes. Raises a `UserError` for a pipe, a socket or a device, which
    might be read for ever, and an OSError as `open`."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe, a socket or a device, but must be a file: copy it.")
    return open(path, "rb")


def read_text(path: Path, longest: int = LONGEST_TEXT) -> str:
    """The text (UTF-8) of a file. Raises as `open_regular`, and a ValueError if it is longer than
    `longest` bytes, or no text."""
    with open_regular(path) as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise ValueError(f"it has more than {longest:,} bytes")
    return data.decode()


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, or a `UserError` if it is absent, broken or no mapping."""
    try:
        data = json.loads(read_text(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: check the folder's name, or make it with the earlier step."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore or remake it.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping of keys to values: restore or remake it.")
    return data


def looks_like_path(name: str) -> bool:
    """Whether a name is no Hub id: those are `namespace/name`, with no local folder `namespace`."""
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") != 1:
        return True
    return Path(name.split("/", maxsplit=1)[0]).exists()


def check_empty(folder: Path, expected: str) -> None:
    """Raise a `UserError` if there is something in a folder, naming what it could have held."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but --output-dir must be a folder: choose another.")
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and holds no {expected}: choose another --output-dir."
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it never appears half-removed under its own name."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
