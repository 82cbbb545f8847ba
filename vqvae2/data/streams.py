"""Tar and Parquet shards read from end to end, as they come from a disk or a URL: for data that fits on no disk.

Every process reads only what it needs, holds a few rows of each shard that it reads, and sees the same rows in the same order whenever it
starts again.
"""

import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import Change, random_change
from vqvae2.data.images import BadImage, Choice, ImageDataset, is_held_out
from vqvae2.data.preprocessing import Picture, first_line, picture_size
from vqvae2.data.source import SAMPLED, ImageSource, Prepared, refuse_duplicates, row_checksum, shard_stem, split_files
from vqvae2.data.sources import expand, expand_ranges, find_shards, open_held_out
from vqvae2.data.tables import find_column, read_cell, row_ids
from vqvae2.data.tars import read_row, tar_rows

HELD_OUT_LIMIT = 1024  # images that are held out by name are gathered from the first shards, at most so many
MAX_CLASSES = 1 << 20
AHEAD = 3  # batches that are being decoded while one is trained on


class StreamRow(NamedTuple):
    """A row of a shard as it is met."""

    id: str
    label: int | None
    read: Callable[[], Picture]


def _say_nothing(name: str, reason: str) -> None:
    """For those who do not want to know what was skipped."""


@dataclass(frozen=True)
class Shards:
    """Tar or Parquet shards, in order."""

    name: str
    urls: tuple[str, ...]
    image_column: str | None = None
    label_column: str | None = None

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def files(self) -> list[Path]:
        """Those on this machine."""
        return [Path(url.removeprefix("file://")) for url in self.urls if "://" not in url.removeprefix("file://")]

    def rows(self, number: int) -> Iterator[StreamRow]:
        """The rows of one shard, in order.

        Raises:
            UserError: the shard is absent or broken, or its labels are no numbers.
        """
        url = self.urls[number]
        with _opened(url) as file:
            yield from _parquet_rows(file, url, self.image_column, self.label_column) if url.endswith(".parquet") else _tar_rows(file, url)

    def ids(self, number: int) -> Iterator[str]:
        """The rows' names alone, without reading pictures where the shard can be sought in."""
        url = self.urls[number]
        with _opened(url) as file:
            if not url.endswith(".parquet"):
                yield from (row.id for row in tar_rows(file, url, positions="://" not in url))
                return
            table = _parquet_file(file, url)
            names = table.schema_arrow.names
            yield from map(str, table.read(columns=["id"])["id"].to_pylist()) if "id" in names else row_ids(shard_stem(url), table.metadata.num_rows)


def find_stream(data: ImagesConfig) -> Shards:
    """The shards that a configuration names.

    Raises:
        UserError: none, or of another kind.
    """
    urls = _find_urls(data.path)
    unknown = next((url for url in urls if not url.endswith((".parquet", ".tar", ".tar.gz"))), None)
    if unknown is not None or not urls:
        raise UserError(f"{data.path}: {unknown or 'nothing'} is no .tar or .parquet shard, and only such can be streamed: remove --data.streaming.")
    stems = [shard_stem(url) for url in urls]
    refuse_duplicates(stems, f"{data.path} (names of shards, which the names of their rows begin with)")
    parts = split_files([Path(url) for url in urls])
    if len(parts) > 1:
        raise UserError(
            f"{data.path} holds shards of the splits {', '.join(parts)}, which a stream would mix: name the training shards alone, for example by a "
            f"pattern, and the held-out ones as --data.validation-path."
        )
    return Shards(data.path, tuple(urls), data.image_column, data.label_column)


def _find_urls(path: str) -> list[str]:
    local = Path(path).expanduser()
    if local.is_dir():
        return list(map(str, find_shards(local)))
    if local.is_file():
        return [str(local)]
    if "://" not in path and not looks_like_path(path):
        path = f"hf://datasets/{path}/**/*.parquet"  # an id of the Hub
    if "://" not in path:
        return list(map(str, expand(path)))
    import fsspec

    urls: list[str] = []
    try:
        for one in expand_ranges(path):
            system, inside = fsspec.core.url_to_fs(one)
            scheme = one.split("://")[0]
            found = sorted(map(str, system.glob(inside))) if any(c in inside for c in "*?[") else [one]
            urls += [url if "://" in url else f"{scheme}://{url.removeprefix('/') if scheme == 'memory' else url}" for url in found]
    except Exception as error:  # each file system raises its own kinds
        raise UserError(f"{path} cannot be listed ({type(error).__name__}: {first_line(error)}): check data.path and your access to it.") from None
    return urls


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    import fsspec

    try:
        file = fsspec.open(url, "rb").open()
    except Exception as error:  # each file system raises its own kinds
        raise UserError(f"{url} cannot be opened ({type(error).__name__}: {first_line(error)}): check data.path and your access to it.") from None
    with file:
        yield file


def _number(label: Any, url: str) -> int | None:
    if label is not None and (type(label) is not int or not 0 <= label < MAX_CLASSES):
        raise UserError(f"{url} has the label {label!r}, but streamed classes must be numbers from 0 to {MAX_CLASSES - 1:,}: number them in the shards.")
    return label


def _tar_rows(file: BinaryIO, url: str) -> Iterator[StreamRow]:
    for row in tar_rows(file, url):
        yield StreamRow(row.id, _number(row.label, url), partial(read_row, row))


def _parquet_file(file: BinaryIO, url: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{url} cannot be read as Parquet ({first_line(error)}): restore or remove it.") from None
    if "split" in table.schema_arrow.names:
        raise UserError(f"{url} has a column 'split', but a stream is held out by whole shards: write the splits to shards of their own.")
    return table


def _parquet_rows(file: BinaryIO, url: str, image_column: str | None, label_column: str | None) -> Iterator[StreamRow]:
    import pyarrow as pa

    table = _parquet_file(file, url)
    names = dict.fromkeys(table.schema_arrow.names)
    image = find_column(names, url, image_column)
    label = label_column or _typed_classes(table.schema_arrow) or ("label" if "label" in names else None)
    if label is not None and label not in names:
        raise UserError(f"{url} has the columns {list(names)}, but no {label!r}: correct --data.label-column.")
    columns = [name for name in (image, label, "id" if "id" in names else None) if name is not None]
    met: set[str] = set()
    made_up = iter(row_ids(shard_stem(url), table.metadata.num_rows))
    try:
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                name = str(row.get("id", next(made_up)))
                if name in met or row.get("id", name) is None:
                    raise UserError(f"{url} has the id {name!r} twice, or a row without: give each image a name of its own.")
                met.add(name)
                yield StreamRow(name, _number(row.get(label), url) if label is not None else None, partial(read_cell, row[image]))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{url} cannot be read as Parquet ({first_line(error)}): restore or remove it.") from None


def _typed_classes(schema: Any) -> str | None:
    """The column that `datasets` wrote as classes, if there is one."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return None
    return next((name for name, feature in features.items() if name != "split" and feature.get("_type") == "ClassLabel"), None)


def stream_facts(shards: Shards, held_out: ImageSource | None, config: PreprocessingConfig) -> dict[str, str]:
    """What a run is bound to: the shards' names, what is held out, and the lengths of local shards."""
    names = [PurePosixPath(url).name for url in shards.urls]
    kept_apart: list[Any] = [config.validation_fraction] if held_out is None else list(held_out.ids)
    sample = [os.path.getsize(url) if "://" not in url else None for url in shards.urls[:: max(1, len(shards) // SAMPLED)]]
    sample += held_out.sample() if held_out is not None else []
    contents = {"image_names_hash": [names, held_out is None, kept_apart], "image_sample_hash": sample}
    return {name: hashlib.sha256(json.dumps(content).encode()).hexdigest() for name, content in contents.items()}


def held_out_images(shards: Shards, data: ImagesConfig, config: PreprocessingConfig, *, on_skipped: Callable[[str, str], None] = _say_nothing) -> ImageDataset:
    """The explicit held-out set, or the first `HELD_OUT_LIMIT` images of the stream whose names are held out.

    Args:
        on_skipped: told the name of, and the reason for, an image that could not be read, where such are skipped.

    Raises:
        UserError: a broken shard, or (unless they are to be skipped) a broken image.
    """
    source = open_held_out(data, config.channels, data.path, shards.files)
    if source is not None:
        images = ImageDataset(source, range(len(source)), config)
        bad = images.check(skip=data.on_error == "skip")
        for error in bad.values():
            on_skipped(error.name, error.reason)
        return images.without(bad) if bad else images
    pixels: list[np.ndarray] = []
    ids: list[str] = []
    read = range(len(shards)) if config.validation_fraction else ()  # nothing is held out: nothing need be read
    for row in (row for number in read for row in shards.rows(number)):
        if len(ids) == HELD_OUT_LIMIT:
            break
        if is_held_out(row.id, config.validation_fraction):
            try:
                pixels.append(decode(shards.name, row, config, None))
                ids.append(row.id)
            except BadImage as error:
                if data.on_error == "stop":
                    raise
                on_skipped(error.name, error.reason)
    stacked = np.stack(pixels) if pixels else np.zeros((0, config.channels, *config.height_width), np.uint8)
    return ImageDataset(
        ImageSource(shards.name, ids, stacked.__getitem__, partial(row_checksum, stacked), prepared=Prepared(config, partial(_take, stacked))),
        range(len(ids)),
        config,
    )


def _take(stacked: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return stacked[list(indices)]


def decode(name: str, row: StreamRow, config: PreprocessingConfig, choice: Choice | None) -> np.ndarray:
    """A row's pixels `(C, H, W)`, changed as is chosen for its size, or not.

    Raises:
        BadImage: naming it and what is wrong with it.
    """
    try:
        picture = row.read()
        change = choice(picture_size(picture)) if choice is not None else Change()
        return change.apply(picture, config)
    except Exception as error:  # decoders raise many kinds for a file that is not what it seems
        raise BadImage(name, row.id, error) from None


class StandIn(NamedTuple):
    """An image `(C, H, W)` with its label."""

    image: Tensor
    label: int | None


class StreamedImages:
    """Batches of training images from shards, shuffled, from any position of an endless stream: a loader for `fit`.

    A batch is made of equal runs of rows from several *lanes*. Lane l reads the shards l, l + L, ... of an order drawn anew in every epoch, and
    draws the next row from a window of rows (`shuffle_buffer` of all lanes together), which is emptied at a shard's end, so that finished
    shards can be passed over when a run continues. Lanes belong to processes as rows of the batch do: for any number of processes the batches
    are the same.

    Args:
        batch_size: rows per batch over all processes.
        held_out: whether the images whose names are held out by the configured share are left out.
        on_skipped: told the name of, and the reason for, an image that could not be read, where such are skipped, once. The batch lacks it.

    A process whose part of a batch cannot be read at all (where broken images are skipped) trains on the first image that can, for it needs one.

    Raises:
        UserError: when it is read: a broken shard or image, or no training image.
    """

    def __init__(
        self,
        shards: Shards,
        data: DataConfig,
        config: PreprocessingConfig,
        batch_size: int,
        *,
        held_out: bool,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        on_skipped: Callable[[str, str], None] = _say_nothing,
    ) -> None:
        self.shards, self.data, self.config, self.batch_size, self.held_out, self.seed = shards, data, config, batch_size, held_out, seed
        self.num_lanes = next(n for n in range(min(batch_size, len(shards)), 0, -1) if batch_size % n == 0)
        self.per_lane = batch_size // self.num_lanes
        share = batch_size // num_processes
        self.mine = range(process_index * share, (process_index + 1) * share)
        self.on_skipped = on_skipped
        self._sizes: dict[int, int] = {}
        self._told: set[str] = set()

    def start_at(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from the `index`-th on, without end."""
        lanes = {lane: self._lane(lane, index * self.per_lane) for lane in sorted({place // self.per_lane for place in self.mine})}
        waiting: deque[list[tuple[StreamRow, Future]]] = deque()
        with ThreadPoolExecutor(max(1, self.data.num_workers)) as pool:
            while True:
                while len(waiting) < AHEAD:
                    waiting.append(self._begin_batch(lanes, pool))
                yield self._finish_batch(waiting.popleft())

    def _begin_batch(self, lanes: Mapping[int, Iterator[tuple[StreamRow, int]]], pool: ThreadPoolExecutor) -> list[tuple[StreamRow, Future]]:
        """Read a batch's rows, and let those of this process be decoded."""
        rows = []
        for lane, stream in lanes.items():
            for place in range(lane * self.per_lane, (lane + 1) * self.per_lane):
                row, epoch = next(stream)
                if place in self.mine:
                    choice = partial(random_change, self.data.augmentation, self.config, seed=self.seed, epoch=epoch, name=row.id)
                    rows.append((row, pool.submit(decode, self.shards.name, row, self.config, choice)))
        return rows

    def _finish_batch(self, rows: Sequence[tuple[StreamRow, Future]]) -> dict[str, Tensor]:
        images: list[Tensor] = []
        labels: list[int | None] = []
        for row, future in rows:
            try:
                images.append(torch.from_numpy(future.result()))
                labels.append(row.label)
            except BadImage as error:
                if self.data.on_error == "stop":
                    raise
                if error.name not in self._told:
                    self._told.add(error.name)
                    self.on_skipped(error.name, error.reason)
        if not images:
            images, labels = [self._stand_in.image], [self._stand_in.label]
        batch = {"images": torch.stack(images)}
        return batch if None in labels else {**batch, "labels": torch.tensor(labels)}

    @cached_property
    def _stand_in(self) -> StandIn:
        """The first training image that can be read."""
        for row in (row for number in range(len(self.shards)) for row in self.shards.rows(number)):
            if self._trains(row.id):
                try:
                    return StandIn(torch.from_numpy(decode(self.shards.name, row, self.config, None)), row.label)
                except BadImage:
                    continue
        raise UserError(f"{self.shards.name}: none of the training images can be read: check data.path.")

    def _lane(self, lane: int, skip: int) -> Iterator[tuple[StreamRow, int]]:
        """The rows of a lane with their epoch, from the `skip`-th on, without end."""
        epoch = 0
        while True:
            order = list(range(len(self.shards)))
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
                raise UserError(f"{self.shards.name} holds no training image: check the shards, or lower image.validation_fraction.")
            epoch += 1

    def _shuffled(self, number: int, epoch: int) -> Iterator[StreamRow]:
        draw = random.Random(f"{self.seed} {epoch} {PurePosixPath(self.shards.urls[number]).name}")
        window: list[StreamRow] = []
        size = max(1, self.data.shuffle_buffer // self.num_lanes)
        for row in self.shards.rows(number):
            if self._trains(row.id):
                window.append(row)
            if len(window) > size:
                yield window.pop(draw.randrange(len(window)))
        draw.shuffle(window)
        yield from window

    def _trains(self, name: str) -> bool:
        return not (self.held_out and is_held_out(name, self.config.validation_fraction))

    def _size(self, number: int) -> int:
        """Training images in a shard."""
        if number not in self._sizes:
            self._sizes[number] = sum(map(self._trains, self.shards.ids(number)))
        return self._sizes[number]
