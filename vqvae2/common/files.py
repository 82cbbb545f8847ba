"""Files appear whole or not at all: write beside the target, then rename. Torch-free."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vqvae2.common.errors import UserError

# What torch, safetensors and numpy say of a full disk without giving its number.
FULL = re.compile(
    r"no space left|os error (27|28|122)\b|quota exceeded|PytorchStreamWriter failed"
    r"|inline_container|\d requested and \d+ written",
    re.IGNORECASE,
)
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
LONGEST_TEXT = 1 << 28  # bytes of a file that is read as a whole


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file replaces `path` if the block raises no error.

    It lies in a new folder beside `path`, where libraries may leave what they like. Raises
    `OSError`, with `path` and the reason, if the disk is full, whatever a library makes of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = os.fsencode(path.name)[:40].decode(errors="ignore")  # names are of limited length
    folder = path.with_name(f".{start}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with _naming(path):
        folder.mkdir()
        try:
            aside = folder / f"new{path.suffix[:20]}"  # which decides formats
            yield aside
            with open(aside, "rb") as file:
                os.fchmod(file.fileno(), folder.stat().st_mode & 0o666)  # as the umask says
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give the errors of a full disk one form, an `OSError` that names the file."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if number is None and not isinstance(error, UserError) and FULL.search(str(error)):
            number = errno.ENOSPC
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text)


def append_text(path: Path, text: str) -> None:
    """Append all of a text or nothing. The file must be no link: a run may be a stranger's."""
    data = text.encode()
    with _naming(path), open(os.open(path, APPEND, 0o666), "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, "")


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
