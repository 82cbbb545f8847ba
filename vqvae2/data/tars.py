"""WebDataset tar shards: neighbours of the same name up to the first dot are one row, its picture and its label (.cls, or "label" in .json)."""

import gzip
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from vqvae2.common.errors import UserError
from vqvae2.data.preprocessing import Picture, first_line, read_picture
from vqvae2.data.source import (
    PICTURE_SUFFIXES,
    ImageSource,
    number_classes,
    refuse_duplicates,
    shard_stem,
)


class TarRow(NamedTuple):
    """A row of a shard: where its picture lies (or the bytes themselves, of a stream), and its label as it is written."""

    id: str
    picture: Any
    suffix: str
    label: str | int | None
    fault: str = ""
    """Why it has no picture; it is then treated as a broken one."""


@dataclass
class _Group:
    """The members of one key as they are met."""

    key: str
    members: list[str] = field(default_factory=list)
    pictures: list[tuple[Any, str]] = field(default_factory=list)
    label: str | int | None = None
    broken_label: str = ""

    def row(self, stem: str) -> TarRow:
        names, (picture, suffix) = (
            ", ".join(self.members),
            self.pictures[0] if self.pictures else (None, ""),
        )
        fault = self.broken_label
        if len(self.pictures) > 1:
            fault = f"it has {len(self.pictures)} pictures ({names}; what follows the first dot is the kind): keep one, or rename the others."
        elif not self.pictures:
            fault = f"it has no picture of a known kind (only {names}): convert it, or remove it."
        return TarRow(f"{stem}/{self.key}", picture, suffix, self.label, fault)


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
        raise UserError(
            f"{name} holds no image ({', '.join(sorted(PICTURE_SUFFIXES))}): check the shards."
        )
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    sound = [row.label for row in rows if not row.fault]
    if any(label is not None for label in sound):
        known, class_names = number_classes(sound, f"{name}: the label (.cls or .json)")
        rest = iter(known)
        labels = [
            0 if row.fault else next(rest) for row in rows
        ]  # a row without a picture is never read
    ids = [row.id for row in rows]
    refuse_duplicates(ids, name)
    places = list(zip(shards, rows, strict=True))
    return ImageSource(
        name,
        ids,
        partial(_read_member, list(paths), places),
        partial(_length, places),
        labels,
        class_names,
        files=list(paths),
    )


def tar_rows(file: BinaryIO, name: str, *, positions: bool = False) -> Iterator[TarRow]:
    """The rows of one shard in order. Their ids begin with the shard's name, since keys may repeat from shard to shard.

    Args:
        positions: of a file that can be sought in: give (offset, size) of the pictures instead of their bytes, and read none.

    Raises:
        UserError: the shard is broken.
    """
    stem = shard_stem(name)
    group: _Group | None = None
    met: set[str] = set()
    try:
        watched = _Watched(
            cast(BinaryIO, gzip.GzipFile(fileobj=file)) if name.endswith(".gz") else file
        )
        with tarfile.open(
            fileobj=cast(BinaryIO, watched), mode="r:" if positions else "r|"
        ) as archive:
            for member in archive:
                base = PurePosixPath(member.name)
                is_link = member.islnk() or member.issym()
                known = base.suffix.lower() in {*PICTURE_SUFFIXES, ".cls", ".json"}
                if not (member.isfile() or (is_link and known)) or base.name.startswith("."):
                    continue
                first, _, extension = base.name.partition(".")
                key = str(base.parent / first)
                if group is None or group.key != key:
                    if group is not None:
                        yield group.row(stem)
                    if key in met:
                        raise UserError(
                            f"{name}: {member.name} comes apart from the row {key!r} that it belongs to: write a row's members side by side."
                        )
                    met.add(key)
                    group = _Group(key)
                group.members.append(f"{base.name}, a link" if is_link else base.name)
                if is_link:
                    continue
                if base.suffix.lower() in PICTURE_SUFFIXES:
                    picture = (
                        (member.offset_data, member.size)
                        if positions
                        else _content(archive, member)
                    )
                    group.pictures.append((picture, base.suffix.lower()))
                elif extension.lower() in ("cls", "json"):
                    content = _content(archive, member)
                    try:
                        group.label = _label(content, extension.lower(), group.label)
                    except (ValueError, RecursionError) as error:
                        group.broken_label = (
                            f"{base.name} cannot be read as a label ({first_line(error)}): mend it."
                        )
        if watched.last.strip(
            b"\0"
        ):  # tarfile takes the end of the file for the end of the archive
            raise EOFError("it is cut off: the mark of its end is missing")
        watched.drain()
        if watched.end_of_data > archive.offset:
            raise ValueError(
                "it goes on after the mark of its end, as when shards were put together with cat"
            )
        if group is not None:
            yield group.row(stem)
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{name} cannot be read as a tar shard ({first_line(error)}): restore or remove it."
        ) from None


class _Watched:
    """A file that remembers the last bytes that were read of it, and how far those go that are not 0."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""
        self.position = self.end_of_data = 0

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.position = self.file.seek(position, whence)
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if content:
            self.last = content[-tarfile.BLOCKSIZE :]
            data = content.rstrip(b"\0")
            self.end_of_data = (
                max(self.end_of_data, self.position + len(data)) if data else self.end_of_data
            )
            self.position += len(content)
        return content

    def drain(self) -> None:
        """Read on to the end."""
        while self.read(1 << 20):
            pass


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    content = opened.read() if opened is not None else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name} is cut off")
    return content


def _label(content: bytes, extension: str, known: str | int | None) -> str | int | None:
    """The class as a number where it is one."""
    if extension == "json":
        data = json.loads(content)
        label = data.get("label", known) if isinstance(data, dict) else known
        return label if isinstance(label, int | str) else known
    text = content.decode().strip()
    return int(text) if text.isdecimal() else text


def _read_member(
    paths: Sequence[Path], places: Sequence[tuple[int, TarRow]], index: int
) -> Picture:
    shard, row = places[index]
    if row.fault:
        raise UserError(row.fault)
    offset, size = row.picture
    with open(paths[shard], "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise UserError("its tar shard is cut off: restore the shard.")
    return read_picture(content, row.suffix)


def _length(places: Sequence[tuple[int, TarRow]], index: int) -> int:
    _, row = places[index]
    return row.picture[1] if row.picture is not None else -1


def read_row(row: TarRow) -> Picture:
    """The picture of a row that has its bytes.

    Raises:
        UserError: it has none.
        Exception: of many kinds, for bytes that are no picture.
    """
    if row.fault:
        raise UserError(row.fault)
    return read_picture(row.picture, row.suffix)
