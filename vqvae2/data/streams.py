"""Training on shards that are read from end to end, as they come: for data that fits on no disk.

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
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.errors import UserError
from vqvae2.common.runs import SAMPLE_NAME
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import Change, random_change
from vqvae2.data.images import BadImage, Choice, ImageDataset, is_held_out
from vqvae2.data.preprocessing import picture_size
from vqvae2.data.shards import Shards, StreamRow
from vqvae2.data.source import SAMPLED, ImageSource, Prepared, row_checksum
from vqvae2.data.sources import open_held_out

HELD_OUT_LIMIT = (
    1024  # images that are held out by name are gathered from the first shards, at most so many
)
AHEAD = 3  # batches that are being decoded while one is trained on


def _say_nothing(name: str, reason: str) -> None:
    """For those who do not want to know what was skipped."""


def stream_facts(
    shards: Shards, held_out: ImageSource | None, config: PreprocessingConfig
) -> dict[str, str]:
    """What a run is bound to: the shards' names, what is held out, and the lengths of local shards."""
    names = [PurePosixPath(url).name for url in shards.urls]
    kept_apart: list[Any] = [config.validation_fraction] if held_out is None else list(held_out.ids)
    sample = [
        os.path.getsize(url) if "://" not in url else None
        for url in shards.urls[:: max(1, len(shards) // SAMPLED)]
    ]
    sample += held_out.sample() if held_out is not None else []
    digest = hashlib.sha256(json.dumps([names, held_out is None, kept_apart]).encode())
    return {"image_names_hash": digest.hexdigest(), SAMPLE_NAME: " ".join(map(str, sample))}


def held_out_images(
    shards: Shards,
    data: ImagesConfig,
    config: PreprocessingConfig,
    *,
    on_skipped: Callable[[str, str], None] = _say_nothing,
) -> ImageDataset:
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
    read = (
        range(len(shards)) if config.validation_fraction else ()
    )  # nothing is held out: nothing need be read
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
    stacked = (
        np.stack(pixels)
        if pixels
        else np.zeros((0, config.channels, *config.height_width), np.uint8)
    )
    return ImageDataset(
        ImageSource(
            shards.name,
            ids,
            stacked.__getitem__,
            partial(row_checksum, stacked),
            prepared=Prepared(config, partial(_take, stacked)),
        ),
        range(len(ids)),
        config,
    )


def _take(stacked: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return stacked[list(indices)]


def decode(
    name: str, row: StreamRow, config: PreprocessingConfig, choice: Choice | None
) -> np.ndarray:
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
        on_skipped: told the name of, and the reason for, an image that could not be read, where such are skipped, once; another takes its place.

    Where a process can read nothing of its part of a batch (and broken images are skipped), the first training image that can be read takes its place.

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
        self.shards, self.data, self.config, self.batch_size, self.held_out, self.seed = (
            shards,
            data,
            config,
            batch_size,
            held_out,
            seed,
        )
        self.num_lanes = next(
            n for n in range(min(batch_size, len(shards)), 0, -1) if batch_size % n == 0
        )
        self.per_lane = batch_size // self.num_lanes
        share = batch_size // num_processes
        self.mine = range(process_index * share, (process_index + 1) * share)
        self.on_skipped = on_skipped
        self._sizes: dict[int, int] = {}
        self._told: set[str] = set()

    def start_at(self, index: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from the `index`-th on, without end."""
        lanes = {
            lane: self._lane(lane, index * self.per_lane)
            for lane in sorted({place // self.per_lane for place in self.mine})
        }
        waiting: deque[list[tuple[StreamRow, Future]]] = deque()
        with ThreadPoolExecutor(max(1, self.data.num_workers)) as pool:
            while True:
                while len(waiting) < AHEAD:
                    waiting.append(self._begin_batch(lanes, pool))
                yield self._finish_batch(waiting.popleft())

    def _begin_batch(
        self, lanes: Mapping[int, Iterator[tuple[StreamRow, int]]], pool: ThreadPoolExecutor
    ) -> list[tuple[StreamRow, Future]]:
        """Read a batch's rows, and let those of this process be decoded."""
        rows = []
        for lane, stream in lanes.items():
            for place in range(lane * self.per_lane, (lane + 1) * self.per_lane):
                row, epoch = next(stream)
                if place in self.mine:
                    choice = partial(
                        random_change,
                        self.data.augmentation,
                        self.config,
                        seed=self.seed,
                        epoch=epoch,
                        name=row.id,
                    )
                    rows.append(
                        (row, pool.submit(decode, self.shards.name, row, self.config, choice))
                    )
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
        places = [i % len(images) for i in range(len(rows))]  # all processes must have as many rows
        images, labels = [images[i] for i in places], [labels[i] for i in places]
        batch = {"images": torch.stack(images)}
        return batch if None in labels else {**batch, "labels": torch.tensor(labels)}

    @cached_property
    def _stand_in(self) -> StandIn:
        """The first training image that can be read."""
        for row in (row for number in range(len(self.shards)) for row in self.shards.rows(number)):
            if self._trains(row.id):
                try:
                    return StandIn(
                        torch.from_numpy(decode(self.shards.name, row, self.config, None)),
                        row.label,
                    )
                except BadImage:
                    continue
        raise UserError(
            f"{self.shards.name}: none of the training images can be read: check data.path."
        )

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
                raise UserError(
                    f"{self.shards.name} holds no training image: check the shards, or lower image.validation_fraction."
                )
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
