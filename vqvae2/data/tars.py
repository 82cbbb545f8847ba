"""WebDataset tar shards: members of the same name up to the first dot are one row, its picture and its label (.cls, or "label" in .json)."""

import gzip
import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from vqvae2.common.errors import UserError
from vqvae2.data.preprocessing import Picture, first_line, read_picture
from vqvae2.data.source import PICTURE_SUFFIXES, ImageSource, number_classes, refuse_duplicates


class TarRow(NamedTuple):
    """A row of a shard: where its picture lies (or the bytes themselves, of a stream), and its label as it is written."""

    id: str
    picture: Any
    suffix: str
    label: str | int | None


def open_tars(name: str, paths: Sequence[Path]) -> ImageSource:
    """Local shards, of which only the headers are read until a picture is asked for.

    Raises:
        UserError: a broken shard, no picture, or rows without a label beside some with one.
    """
    rows: list[TarRow] = []
    shards: list[int] = []
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            found = list(tar_rows(file, str(path), positions=True))
        rows += found
        shards += [number] * len(found)
    if not rows:
        raise UserError(f"{name} holds no image ({', '.join(sorted(PICTURE_SUFFIXES))}): check the shards.")
    ids = [row.id for row in rows]
    refuse_duplicates(ids, name)
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if any(row.label is not None for row in rows):
        labels, class_names = number_classes([row.label for row in rows], f"{name}: the label (.cls or .json)")
    places = [(shard, *row.picture, row.suffix) for shard, row in zip(shards, rows, strict=True)]
    return ImageSource(name, ids, partial(_read_member, list(paths), places), labels, class_names)


def tar_rows(file: BinaryIO, name: str, *, positions: bool = False) -> Iterator[TarRow]:
    """The rows of one shard in order. Their ids begin with the shard's name, since keys may repeat from shard to shard.

    Args:
        positions: of a file that can be sought in: give (offset, size) of the pictures instead of their bytes, and read none.

    Raises:
        UserError: the shard is broken.
    """
    stem = PurePosixPath(name).name.split(".")[0]
    key, picture, suffix, label = None, None, "", None
    try:
        watched = _Watched(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if name.endswith(".gz") else file)
        with tarfile.open(fileobj=cast(BinaryIO, watched), mode="r:" if positions else "r|") as archive:
            for member in archive:
                base = PurePosixPath(member.name)
                if not member.isfile() or base.name.startswith("."):
                    continue
                first, _, extension = base.name.partition(".")
                extension = "." + extension.lower()
                if str(base.parent / first) != key:
                    if picture is not None:
                        yield TarRow(f"{stem}/{key}", picture, suffix, label)
                    key, picture, label = str(base.parent / first), None, None
                if extension in PICTURE_SUFFIXES:
                    picture, suffix = (member.offset_data, member.size) if positions else _content(archive, member), extension
                elif extension in (".cls", ".json"):
                    label = _label(_content(archive, member), extension, label)
        if watched.last.strip(b"\0"):  # tarfile takes the end of the file for the end of the archive
            raise EOFError("it is cut off: the mark of its end is missing")
        if picture is not None:
            yield TarRow(f"{stem}/{key}", picture, suffix, label)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{name} cannot be read as a tar shard ({first_line(error)}): restore or remove it.") from None


class _Watched:
    """A file that remembers the last bytes that were read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if content:
            self.last = content[-tarfile.BLOCKSIZE :]
        return content


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    content = opened.read() if opened is not None else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name} is cut off")
    return content


def _label(content: bytes, extension: str, known: str | int | None) -> str | int | None:
    """The class as a number where it is one."""
    if extension == ".json":
        data = json.loads(content)
        label = data.get("label", known) if isinstance(data, dict) else known
        return label if isinstance(label, int | str) else known
    text = content.decode().strip()
    return int(text) if text.isdecimal() else text


def _read_member(paths: Sequence[Path], places: Sequence[tuple[int, int, int, str]], index: int) -> Picture:
    shard, offset, size, suffix = places[index]
    with open(paths[shard], "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise UserError("its tar shard is cut off: restore the shard.")
    return read_picture(content, suffix)
