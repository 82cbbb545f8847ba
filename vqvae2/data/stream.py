"""Tar and Parquet shards, on a disk or behind a URL, read from end to end: data of any size.

Rows of WebDataset tar shards are neighbours of the same name up to the first dot: a picture and
perhaps a label (.cls, or "label" in .json) and a vector (.NAME.npy, or "NAME" in .json). Classes of
a stream are numbers.
"""

import gzip
import json
import logging
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from vqvae2.common.accelerate import use_cpu
from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ordered
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import decode, no_change, random_change
from vqvae2.data.decoding import PICTURE_SUFFIXES, BadImage, first_line, readable
from vqvae2.data.splits import check_names, few, is_held_out, marked
from vqvae2.data.vectors import read_vector

logger = logging.getLogger(__name__)

AHEAD = 3  # batches that are decoded while one is trained on
MOST_LANES = 256  # shards that are open at once; systems allow a thousand files
MAX_CLASSES = 1 << 20
NO_LABELS = "none"  # as data.label_column: leave labels alone

IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = ("label", "cls")
LIKE_CLASSES = re.compile("class|label|categor|target", re.IGNORECASE)
JUNK = {  # folders that nobody made
    *("__MACOSX", "__pycache__", "lost+found", "System Volume Information"),
    *("#recycle", "#snapshot", "RECYCLER", "RECYCLED", "$RECYCLE.BIN", "$Recycle.Bin"),
    *("@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp"),
}


def named_columns(data: ImagesConfig) -> dict[str, str]:
    """The columns of images and labels that are named, by "image" and "label"."""
    columns = {"image": data.image_column, "label": data.label_column}
    return {key: name for key, name in columns.items() if name and name != NO_LABELS}


class StreamRow(NamedTuple):
    """A row of a shard as it is met."""

    id: str
    label: Any
    cell: Any
    """The picture (see `decoding.read_cell`)."""
    condition: Any = None
    """What `read_vector` takes, of the column that is named."""


@dataclass(frozen=True)
class ImageStream:
    """Tar or Parquet shards, in order; the columns are named in `data` where they must be."""

    name: str
    urls: tuple[str, ...]
    data: ImagesConfig
    is_of_files = False  # as a table, whose pictures may each be a file

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def files(self) -> list[Path]:
        """Those on this machine."""
        paths = [url.removeprefix("file://") for url in self.urls]
        return [Path(path) for path in paths if "://" not in path]

    @property
    def names(self) -> list[str]:
        """The shards' names, which tell these images from others."""
        return [PurePosixPath(url).name for url in self.urls]

    @property
    def labelled(self) -> bool:
        """Whether the first rows have labels; then all must."""
        first = list(islice(self.all_rows(), 64))
        labelled = any(row.label is not None for row in first)
        folders = {PurePosixPath(row.id).parent.name for row in first if row.id.count("/") > 1}
        wanted = self.data.label_column != NO_LABELS
        if (
            len(folders) > 1
            and wanted
            and not labelled
            and self.urls[0].endswith((".tar", ".tar.gz"))
        ):
            text = "%s: no classes: the folders %s are not used (add a member .cls to each row)."
            logger.info(text, self.name, few(sorted(folders)))
        return labelled

    @cached_property
    def vector_size(self) -> int:
        """Length of the condition vector of the first row that has one; 0 without a column."""
        fault: UserError | None = None
        for row in islice(self.all_rows() if self.data.condition_column else (), 64):
            try:
                return len(read_vector(row.condition, row.id))
            except UserError as error:
                fault = fault or error
        if fault is not None:
            raise fault
        return 0

    def rows(self, number: int, *, contents: bool = True) -> Iterator[StreamRow]:
        """The rows of one shard, in order; without `contents` their names alone, read faster.
        Raises UserError: the shard is absent or broken, or its labels are not numbers."""
        url, column = self.urls[number], self.data.condition_column
        with _opened(url) as file:
            if url.endswith(".parquet"):
                rows = _parquet_rows(file, url, self.data, contents)
            else:
                rows = _tar_rows(file, url, contents or "://" in url, column)
            for row in rows:
                label = None if self.data.label_column == NO_LABELS else row.label
                is_class = isinstance(label, int) and 0 <= label < MAX_CLASSES
                if contents and label is not None and not is_class:
                    what = f"{url} has the label {shown(label)}, but classes of a stream are"
                    what += f" numbers below {MAX_CLASSES:,}"
                    raise UserError(f"{what}: number them, or add --data.label-column none.")
                yield row._replace(label=int(label) if isinstance(label, bool) else label)

    def all_rows(self) -> Iterator[StreamRow]:
        """The rows of all shards, in order."""
        for number in range(len(self)):
            yield from self.rows(number)

    def marks(self) -> list[int | None]:
        """The lengths of some local shards."""
        urls = [self.urls[i] for i in marked(len(self))]
        return [Path(url).stat().st_size if "://" not in url else None for url in urls]


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

    with readable(url, "opened", "check data.path and your access to it"):
        system = fsspec.filesystem("file")  # which takes a path as it is written, also a::b
        file = fsspec.open(url, "rb").open() if "://" in url else system.open(url, "rb")
    with file:
        yield file


# Parquet


def is_junk(name: str) -> bool:
    """Whether a file or folder is one that no person made."""
    return name.startswith(".") or name in JUNK


def find_columns(
    features: Mapping[str, Any],
    source: str,
    data: ImagesConfig,
    names: Sequence[str] = IMAGE_COLUMNS,
) -> tuple[str, str | None]:
    """The columns of pictures and of classes: those set in `data`, else by type or name.

    Raises UserError: there is no such column, or none of pictures."""
    import datasets

    # Pictures.
    columns, own = f"{source} has the columns {few(features)}", data.label_column
    named = {"image": data.image_column, "label": own, "condition": data.condition_column}
    for option, column in named.items():
        if column not in (None, *features) and (option, column) != ("label", NO_LABELS):
            raise UserError(f"{columns}, but no {column!r}: correct --data.{option}-column.")
    known = {name.lower(): name for name in reversed([*features])}
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    pictures += [known[name] for name in names if name in known]
    if data.image_column is None and not pictures:
        raise UserError(f"{columns}, but none of images: set --data.image-column.")
    image = data.image_column or pictures[0]

    # Classes, if they are wanted; else what might be some is named.
    classes = [known[name] for name in LABEL_COLUMNS[:1] if name in known]
    classes += [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    classes += [known[name] for name in LABEL_COLUMNS if name in known]
    label = own or next((name for name in classes if name not in ("split", image)), None)
    used = (*pictures, image, data.condition_column, "split", "id", "__key__")
    others = [name for name in features if name not in used]
    if label is None and others:
        _say_unused(data.path, tuple(sorted(others, key=lambda n: not LIKE_CLASSES.search(n))))
    return image, None if own == NO_LABELS else label


@lru_cache
def _say_unused(path: str, columns: Sequence[str]) -> None:
    """Once, since a stream opens many shards."""
    text = (
        "%s: no classes: the columns %s are not used (--data.label-column %s, if it names classes)."
    )
    logger.info(text, path, few(columns), shown(columns[0]).strip("'"))


def features_of(schema: Any) -> dict[str, Any]:
    """The columns of an Arrow schema; `datasets` writes into it which hold pictures and classes."""
    import datasets
    import pyarrow as pa

    typed_of = datasets.Features.from_arrow_schema
    unknown = suppress(ValueError, NotImplementedError)
    with unknown:
        typed = typed_of(schema)
        return {name: typed.get(name) for name in schema.names}

    # Some types, which are of no picture, it does not know: then each column by itself.
    known: dict[str, Any] = dict.fromkeys(schema.names)
    for field in schema:
        with unknown:
            known |= typed_of(pa.schema([field], schema.metadata))
    return known


def _parquet_rows(
    file: BinaryIO, url: str, data: ImagesConfig, contents: bool
) -> Iterator[StreamRow]:
    import pyarrow.parquet as pq

    with readable(url, "read as Parquet", "restore or remove it"):
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        if "split" in schema.names:
            what = f"{url} has a column 'split', but a stream is held out by whole shards"
            raise UserError(f"{what}: write each split to shards of its own.")
        image, label = find_columns(features_of(schema), url, data)
        has_ids = "id" in schema.names
        columns = ["id"] * has_ids + ([image] if contents else []) + ([label] if label else [])
        columns += [data.condition_column] if contents and data.condition_column else []

        # Rows, a few at a time; every one needs a name of its own.
        seen: set[str] = set()
        generated = iter(row_ids(url, table.metadata.num_rows))
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for cells in batch.to_pylist():
                name = cells["id"] if has_ids else next(generated)
                if type(name) not in (str, int) or str(name) in seen:
                    what = f"{url} has the id {shown(name)} twice, or one that is no name"
                    raise UserError(f"{what}: give each image a name, or rename the column.")
                seen.add(str(name))
                condition = cells.get(data.condition_column)
                yield StreamRow(str(name), cells.get(label), cells.get(image), condition)


# Tar


class _Member(NamedTuple):
    """A file in a tar, or a link: then its content is empty."""

    key: str
    path: PurePosixPath
    is_link: bool
    content: bytes


def _tar_rows(file: BinaryIO, url: str, contents: bool, column: str | None) -> Iterator[StreamRow]:
    """Rows whose ids begin with the shard's name, since keys may repeat from shard to shard."""
    seen: set[str] = set()
    with readable(url, "read as a tar shard", "restore or remove it"):
        for key, group in groupby(_members(file, url, contents), key=lambda member: member.key):
            members = list(group)
            if key in seen:
                what = f"{url}: {members[0].path} comes apart from the row {key!r} it belongs to"
                raise UserError(f"{what}: write a row's members side by side.")
            check_names([key], url)
            seen.add(key)
            yield _tar_row(f"{shard_stem(url)}/{key}", members, column)


def _members(file: BinaryIO, url: str, contents: bool) -> Iterator[_Member]:
    """Members of a tar, but for folders, hidden files and links to neither picture nor label."""
    if url.endswith(".gz"):
        file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    mode = "r|" if contents or url.endswith(".gz") else "r:"  # r: jumps from header to header
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for member in archive:
            path = PurePosixPath(member.name)
            is_link = member.islnk() or member.issym()
            known = path.suffix.lower() in {*PICTURE_SUFFIXES, ".cls", ".json"}
            if not (member.isfile() or (is_link and known)) or path.name.startswith("."):
                continue
            if any(is_junk(folder) for folder in path.parts[:-1] if folder[0] != "."):
                continue
            opened = None if is_link or not contents else archive.extractfile(member)
            content = opened.read() if opened is not None else b""
            if opened is not None and len(content) != member.size:
                raise EOFError(f"{member.name} is cut off")
            key = str(path.parent / path.name.partition(".")[0])
            yield _Member(key, path, is_link, content)

        # `tarfile` takes any end of the file, and any zeros, for the end of the archive.
        rest: Any = archive.fileobj
        if rest.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise EOFError("it is cut off: the mark of its end is missing")
        while block := rest.read(1 << 20):
            if block.strip(b"\0"):
                raise ValueError("it goes on after the mark of its end, as when joined with cat")


def _tar_row(name: str, members: Sequence[_Member], column: str | None) -> StreamRow:
    """A row of members; what is wrong with it is raised when its picture is read."""
    # Picture, label, and the condition that the column names.
    label: Any = None
    condition: Any = None
    pictures: list[dict[str, Any]] = []
    arrays: list[dict[str, Any]] = []  # of a name of their own: pictures if there is no other
    faults: list[str] = []
    for member in members:
        kind = member.path.name.partition(".")[2].lower()
        if member.is_link:
            continue
        if column and kind == f"{column}.npy".lower():
            condition = member.content
        elif member.path.suffix.lower() in PICTURE_SUFFIXES:
            found = arrays if kind.endswith(".npy") else pictures
            found.append({"bytes": member.content, "path": member.path.name})
        elif kind == "cls":
            text = member.content.decode(errors="replace").strip()
            label = int(text) if text.isdecimal() else text
        elif kind == "json":
            try:
                values = json.loads(member.content or b"{}")
                values = values if isinstance(values, dict) else {}
                label = label if values.get("label") is None else values["label"]
                condition = condition if values.get(column) is None else values[column]
            except (ValueError, RecursionError) as error:
                file = member.path.name
                faults.append(f"{file} cannot be read ({first_line(error)}): fix it.")

    # One picture.
    pictures = pictures or arrays
    names = ", ".join(f"{m.path.name}{', a link' * m.is_link}" for m in members)
    if not pictures:
        faults.append(f"it has no picture of a known kind (only {names}): convert or remove it.")
    elif len(pictures) > 1:
        what = f"it has {len(pictures)} pictures ({names}; what follows the first dot is the kind)"
        faults.append(f"{what}: keep one, or rename the others.")
    return StreamRow(name, label, UserError(faults[-1]) if faults else pictures[0], condition)


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
        most = min(batch_size, len(stream), MOST_LANES)
        self.num_lanes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
        self.rows_per_lane = batch_size // self.num_lanes
        share = batch_size // num_processes
        self.places = range(process_index * share, (process_index + 1) * share)
        self._sizes: dict[int, int] = {}
        self._skipped: set[str] = set()

    def start_at(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from the `index`-th on, without end."""
        size = len(self.places)
        num_threads = max(1, self.data.num_workers)
        decoded = ordered(
            self._decode, self._rows(index), num_threads=num_threads, ahead=AHEAD * size
        )
        while True:
            images: list[Tensor] = []
            for image in islice(decoded, size):
                if isinstance(image, Tensor):
                    images.append(image)
                elif image.name not in self._skipped:
                    self._skipped.add(image.name)
                    self.on_skipped(image.name, image.reason)
            images = images or [self._stand_in]
            batch = torch.stack([images[i % len(images)] for i in range(size)])
            yield {"images": batch if use_cpu() else batch.pin_memory()}

    def _rows(self, index: int) -> Iterator[tuple[StreamRow, int]]:
        """The rows of this process from the `index`-th batch on, with their epochs."""
        numbers = sorted({place // self.rows_per_lane for place in self.places})
        lanes = {number: self._lane(number, index * self.rows_per_lane) for number in numbers}
        while True:
            for number, lane in lanes.items():
                first = number * self.rows_per_lane
                for place, row in enumerate(islice(lane, self.rows_per_lane), first):
                    if place in self.places:
                        yield row

    def _decode(self, row_and_epoch: tuple[StreamRow, int]) -> Tensor | BadImage:
        row, epoch = row_and_epoch
        change = partial(random_change, self.data.augmentation, self.config)
        choose = partial(change, seed=self.seed, epoch=epoch, name=row.id)
        try:
            return decode(self.stream.name, row.id, row.cell, self.config, choose)
        except BadImage as error:
            if self.data.on_error == "stop":
                raise
            return error

    @cached_property
    def _stand_in(self) -> Tensor:
        """The first training image that can be read, for a batch of which none can."""
        for row in filter(self._trains, self.stream.all_rows()):
            try:
                return decode(self.stream.name, row.id, row.cell, self.config, no_change)
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
                for row in islice(self._shuffled(number, epoch), skip, None):
                    yield row, epoch
                skip = 0
            if epoch == 0 and not any(self._size(number) for number in order):
                what = f"{self.stream.name} holds no training image"
                raise UserError(f"{what}: check the shards, or lower image.validation_fraction.")
            epoch += 1

    def _shuffled(self, number: int, epoch: int) -> Iterator[StreamRow]:
        """The training rows of a shard, each drawn from a window of rows."""
        generator = random.Random(f"{self.seed} {epoch} {self.stream.names[number]}")
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
