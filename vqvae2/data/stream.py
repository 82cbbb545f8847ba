"""Tar and Parquet shards, on a disk or behind a URL, read from end to end: data of any size.

Rows of WebDataset tar shards are neighbours of the same name up to the first dot: a picture and
perhaps a label (.cls, or "label" in .json). Classes of a stream are numbers.
"""

import gzip
import json
import random
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.errors import UserError
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import Choice, no_change, random_change
from vqvae2.data.decoding import (
    PICTURE_SUFFIXES,
    BadImage,
    Picture,
    first_line,
    picture_size,
    read_cell,
    read_picture,
)
from vqvae2.data.splits import is_held_out, marked

AHEAD = 3  # batches that are decoded while one is trained on
MAX_CLASSES = 1 << 20
IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg", "jpeg", "webp")


class StreamRow(NamedTuple):
    """A row of a shard as it is met."""

    id: str
    label: int | None
    read: Callable[[], Picture]


@dataclass(frozen=True)
class ImageStream:
    """Tar or Parquet shards, in order; the columns are named in `data` where they must be."""

    name: str
    urls: tuple[str, ...]
    data: ImagesConfig

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def is_of_files(self) -> bool:
        """Whether each picture is a file of its own: never."""
        return False

    @property
    def files(self) -> list[Path]:
        """Those on this machine."""
        paths = [url.removeprefix("file://") for url in self.urls]
        return [Path(path) for path in paths if "://" not in path]

    def rows(self, number: int, *, contents: bool = True) -> Iterator[StreamRow]:
        """The rows of one shard, in order; without `contents` their names alone, read faster.

        Raises:
            UserError: the shard is absent or broken, or its labels are not numbers.
        """
        url = self.urls[number]
        with _opened(url) as file:
            if url.endswith(".parquet"):
                rows = _parquet_rows(file, url, self.data, contents)
            else:
                rows = _tar_rows(file, url, contents or "://" in url)
            for row in rows:
                label = row.label
                is_class = type(label) is int and 0 <= label < MAX_CLASSES
                if contents and label is not None and not is_class:
                    raise UserError(
                        f"{url} has the label {label!r}, but classes of a stream are numbers from "
                        f"0 to {MAX_CLASSES - 1:,}: number them in the shards."
                    )
                yield row

    def all_rows(self) -> Iterator[StreamRow]:
        """The rows of all shards, in order."""
        for number in range(len(self)):
            yield from self.rows(number)

    def labelled(self) -> bool:
        """Whether the first rows have labels; then all must."""
        return any(row.label is not None for row in islice(self.all_rows(), 64))

    def shard_names(self) -> list[str]:
        """The shards' names, which tell these images from others."""
        return [PurePosixPath(url).name for url in self.urls]

    def marks(self) -> list[int | None]:
        """The lengths of some local shards."""
        urls = [self.urls[i] for i in marked(len(self))]
        return [Path(url).stat().st_size if "://" not in url else None for url in urls]

    def decode(self, row: StreamRow, config: PreprocessingConfig, choice: Choice) -> np.ndarray:
        """A row's pixels `(C, H, W)`, changed as chosen for its size.

        Raises:
            BadImage: naming it and what is wrong with it.
        """
        try:
            picture = row.read()
            return choice(picture_size(picture)).apply(picture, config)
        except Exception as error:  # decoders raise many kinds
            raise BadImage(self.name, row.id, error) from None


def shard_stem(name: str) -> str:
    """What the names of a shard's rows begin with."""
    stem = PurePosixPath(name).name.removesuffix(".gz")
    return stem.removesuffix(".tar").removesuffix(".parquet").removesuffix(".arrow")


def row_ids(shard: str, number: int) -> list[str]:
    """Names for the rows of a shard that has none for them."""
    return [f"{shard_stem(shard)}/{i:06d}" for i in range(number)]


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    import fsspec

    try:
        file = fsspec.open(url, "rb").open()
    except Exception as error:  # each file system raises its own kinds
        raise UserError(
            f"{url} cannot be opened ({type(error).__name__}: {first_line(error)}): "
            f"check data.path and your access to it."
        ) from None
    with file:
        yield file


# Parquet


def find_columns(
    features: Mapping[str, Any],
    source: str,
    data: ImagesConfig,
    names: Sequence[str] = IMAGE_COLUMNS,
) -> tuple[str, str | None]:
    """The columns of pictures and of classes: those set in `data`, else by type or name.

    Raises:
        UserError: there is no such column, or none of pictures.
    """
    import datasets

    columns = f"{source} has the columns {list(features)}"
    for option, column in (("image", data.image_column), ("label", data.label_column)):
        if column is not None and column not in features:
            raise UserError(f"{columns}, but no {column!r}: correct --data.{option}-column.")
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    pictures += [name for name in names if name in features]
    if data.image_column is None and not pictures:
        raise UserError(f"{columns}, but none of images: set --data.image-column.")
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    classes = ["label"] if "label" in features else [name for name in classes if name != "split"]
    return data.image_column or pictures[0], data.label_column or next(iter(classes), None)


def _parquet_rows(
    file: BinaryIO, url: str, data: ImagesConfig, contents: bool
) -> Iterator[StreamRow]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Columns: a table that `datasets` wrote says which hold pictures and classes.
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        if "split" in schema.names:
            raise UserError(
                f"{url} has a column 'split', but a stream is held out by whole shards: "
                f"write each split to shards of its own."
            )
        typed = datasets.Features.from_arrow_schema(schema)
        image, label = find_columns({n: typed.get(n) for n in schema.names}, url, data)
        has_ids = "id" in schema.names
        columns = ["id"] * has_ids + ([image] if contents else []) + ([label] if label else [])

        # Rows, a few at a time; every one needs a name of its own.
        seen: set[str] = set()
        generated = iter(row_ids(url, table.metadata.num_rows))
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for cells in batch.to_pylist():
                name = cells["id"] if has_ids else next(generated)
                if name is None or str(name) in seen:
                    raise UserError(
                        f"{url} has the id {name!r} twice, or a row without one: "
                        f"give each image a name of its own, or rename the column."
                    )
                seen.add(str(name))
                yield StreamRow(str(name), cells.get(label), partial(read_cell, cells.get(image)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{url} cannot be read as Parquet ({first_line(error)}): restore or remove it."
        ) from None


# Tar


@dataclass
class _TarGroup:
    """The members of one key as they are met."""

    key: str
    members: list[str] = field(default_factory=list)
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    label: Any = None
    fault: str = ""

    def add(self, name: str, content: bytes, *, is_link: bool) -> None:
        """One member: a picture, a label, or something else."""
        base = PurePosixPath(name)
        self.members.append(f"{base.name}, a link" if is_link else base.name)
        if is_link:
            return
        if base.suffix.lower() in PICTURE_SUFFIXES:
            self.pictures.append((content, base.suffix))
        elif base.name.partition(".")[2].lower() == "cls":
            text = content.decode(errors="replace").strip()
            self.label = int(text) if text.isdecimal() else text
        elif base.name.partition(".")[2].lower() == "json":
            try:
                values = json.loads(content or b"{}")
            except (ValueError, RecursionError) as error:
                self.fault = f"{base.name} cannot be read as a label ({first_line(error)}): fix it."
                return
            if isinstance(values, dict):
                self.label = values.get("label", self.label)

    def row(self, shard: str) -> StreamRow:
        """The row, whose faults are raised when its picture is read."""
        names = ", ".join(self.members)
        fault = self.fault
        if not self.pictures:
            fault = f"it has no picture of a known kind (only {names}): convert it, or remove it."
        elif len(self.pictures) > 1:
            fault = (
                f"it has {len(self.pictures)} pictures ({names}; what follows the first dot is "
                f"the kind): keep one, or rename the others."
            )
        read = partial(_raise_fault, fault) if fault else partial(read_picture, *self.pictures[0])
        return StreamRow(f"{shard}/{self.key}", self.label, read)


def _raise_fault(fault: str) -> Picture:
    raise UserError(fault)


def _tar_rows(file: BinaryIO, url: str, contents: bool) -> Iterator[StreamRow]:
    """Rows whose ids begin with the shard's name, since keys may repeat from shard to shard."""
    shard, group, seen = shard_stem(url), _TarGroup(""), {""}
    try:
        if url.endswith(".gz"):
            file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        watched = _WatchedFile(file)
        mode = "r|" if contents or url.endswith(".gz") else "r:"  # r: jumps from header to header
        with tarfile.open(fileobj=cast(BinaryIO, watched), mode=mode) as archive:  # type: ignore[call-overload]
            for member in archive:
                # Pass over folders, hidden files, and links to what is neither picture nor label.
                base = PurePosixPath(member.name)
                is_link = member.islnk() or member.issym()
                known = base.suffix.lower() in {*PICTURE_SUFFIXES, ".cls", ".json"}
                if not (member.isfile() or (is_link and known)) or base.name.startswith("."):
                    continue

                # A new key begins a new row.
                key = str(base.parent / base.name.partition(".")[0])
                if key != group.key:
                    if group.key:
                        yield group.row(shard)
                    if key in seen:
                        raise UserError(
                            f"{url}: {member.name} comes apart from the row {key!r} that it "
                            f"belongs to: write a row's members side by side."
                        )
                    seen.add(key)
                    group = _TarGroup(key)
                content = b"" if is_link or not contents else _content(archive, member)
                group.add(member.name, content, is_link=is_link)
        watched.check_end(archive.offset)
        if group.key:
            yield group.row(shard)
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{url} cannot be read as a tar shard ({first_line(error)}): restore or remove it."
        ) from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    content = opened.read() if opened is not None else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name} is cut off")
    return content


class _WatchedFile:
    """A file that remembers where its last byte other than 0 was read: `tarfile` takes any end of
    the file for the end of the archive, also that of a shard that was cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last_block = file, b""
        self.position = self.end_of_data = 0

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = self.file.seek(position, whence)
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if content:
            self.last_block = content[-tarfile.BLOCKSIZE :]
            data = content.rstrip(b"\0")
            if data:
                self.end_of_data = max(self.end_of_data, self.position + len(data))
            self.position += len(content)
        return content

    def check_end(self, archive_end: int) -> None:
        """The archive ends with its mark, and the file with the archive."""
        if self.last_block.strip(b"\0"):
            raise EOFError("it is cut off: the mark of its end is missing")
        while self.read(1 << 20):
            pass
        if self.end_of_data > archive_end:
            raise ValueError(
                "it goes on after the mark of its end, as when shards were joined with cat"
            )


# Training


class StreamedImages:
    """Shuffled batches of training images from any position of an endless stream: for `fit`.

    A batch is made of equal runs of rows from several *lanes*. Lane l reads the shards l, l + L,
    ... of an order drawn anew in every epoch, and draws its next row from a window of rows
    (`shuffle_buffer` over all lanes), which is emptied at a shard's end, so that a run that
    continues can pass over finished shards. Lanes belong to processes as rows of the batch do:
    the batches are the same for any number of processes.

    Args:
        batch_size: rows per batch over all processes.
        held_out_share: the share of images that is held out by name, and left out here.
        on_skipped: called once with (name, reason) of each skipped image. Another of the batch
            takes its place, so that all processes have as many rows.

    Raises:
        UserError: when it is read: a broken shard or image, or no training image.
    """

    def __init__(
        self,
        stream: ImageStream,
        data: DataConfig,
        config: PreprocessingConfig,
        batch_size: int,
        held_out_share: float,
        on_skipped: Callable[[str, str], None],
        *,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.stream, self.data, self.config, self.seed = stream, data, config, seed
        self.held_out_share, self.on_skipped = held_out_share, on_skipped
        most = min(batch_size, len(stream))
        self.num_lanes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
        self.rows_per_lane = batch_size // self.num_lanes
        share = batch_size // num_processes
        self.places = range(process_index * share, (process_index + 1) * share)
        self._sizes: dict[int, int] = {}
        self._skipped: set[str] = set()

    def start_at(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from the `index`-th on, without end."""
        numbers = sorted({place // self.rows_per_lane for place in self.places})
        lanes = {lane: self._lane(lane, index * self.rows_per_lane) for lane in numbers}
        waiting: deque[list[tuple[StreamRow, Future[np.ndarray]]]] = deque()
        with ThreadPoolExecutor(max(1, self.data.num_workers)) as pool:
            while True:
                while len(waiting) < AHEAD:
                    waiting.append(self._begin_batch(lanes, pool))
                yield self._finish_batch(waiting.popleft())

    def _begin_batch(
        self, lanes: Mapping[int, Iterator[tuple[StreamRow, int]]], pool: ThreadPoolExecutor
    ) -> list[tuple[StreamRow, Future[np.ndarray]]]:
        """Read a batch's rows, and have those of this process decoded."""
        rows = []
        for lane, stream in lanes.items():
            for place in range(lane * self.rows_per_lane, (lane + 1) * self.rows_per_lane):
                row, epoch = next(stream)
                if place in self.places:
                    augmentation = partial(random_change, self.data.augmentation, self.config)
                    choice = partial(augmentation, seed=self.seed, epoch=epoch, name=row.id)
                    rows.append((row, pool.submit(self.stream.decode, row, self.config, choice)))
        return rows

    def _finish_batch(
        self, rows: Sequence[tuple[StreamRow, Future[np.ndarray]]]
    ) -> dict[str, Tensor]:
        images: list[Tensor] = []
        for row, future in rows:
            try:
                images.append(torch.from_numpy(future.result()))
            except BadImage as error:
                if self.data.on_error == "stop":
                    raise
                if row.id not in self._skipped:
                    self._skipped.add(row.id)
                    self.on_skipped(error.name, error.reason)
        images = images or [self._stand_in]
        return {"images": torch.stack([images[i % len(images)] for i in range(len(rows))])}

    @cached_property
    def _stand_in(self) -> Tensor:
        """The first training image that can be read, for a batch of which none can."""
        for row in self.stream.all_rows():
            if self._trains(row):
                try:
                    return torch.from_numpy(self.stream.decode(row, self.config, no_change))
                except BadImage:
                    continue
        raise UserError(f"{self.stream.name}: no training image can be read: check data.path.")

    def _lane(self, lane: int, skip: int) -> Iterator[tuple[StreamRow, int]]:
        """The rows of a lane with their epoch, from the `skip`-th on, without end."""
        epoch = 0
        while True:
            order = list(range(len(self.stream)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            for number in order[lane :: self.num_lanes]:
                if skip and skip >= self._size(number):
                    skip -= self._size(number)
                    continue
                for row in self._shuffled(number, epoch):
                    if skip:
                        skip -= 1
                    else:
                        yield row, epoch
            if epoch == 0 and not any(self._size(number) for number in order):
                raise UserError(
                    f"{self.stream.name} holds no training image: "
                    f"check the shards, or lower image.validation_fraction."
                )
            epoch += 1

    def _shuffled(self, number: int, epoch: int) -> Iterator[StreamRow]:
        """The training rows of a shard, each drawn from a window of rows."""
        shard = PurePosixPath(self.stream.urls[number]).name
        generator = random.Random(f"{self.seed} {epoch} {shard}")
        size = max(1, self.data.shuffle_buffer // self.num_lanes)
        window: list[StreamRow] = []
        for row in filter(self._trains, self.stream.rows(number)):
            window.append(row)
            if len(window) > size:
                yield window.pop(generator.randrange(len(window)))
        generator.shuffle(window)
        yield from window

    def _trains(self, row: StreamRow) -> bool:
        return not is_held_out(row.id, self.held_out_share)

    def _size(self, number: int) -> int:
        """Training images in a shard."""
        if number not in self._sizes:
            rows = self.stream.rows(number, contents=False)
            self._sizes[number] = sum(map(self._trains, rows))
        return self._sizes[number]
