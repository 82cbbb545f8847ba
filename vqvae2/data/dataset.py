"""Images at hand in any order: a table of named pictures, and datasets of their pixels over it."""

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vqvae2.common.config import differences, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.threads import ordered
from vqvae2.config import AugmentationConfig, PreprocessingConfig
from vqvae2.data.augmentation import Choice, no_change, random_change
from vqvae2.data.decoding import BadImage, Picture, picture_size
from vqvae2.data.preprocessing import BYTES
from vqvae2.data.splits import image_facts, marked

CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size


@dataclass(frozen=True)
class PreparedPictures:
    """Pixels in their final form, uint8 or float32 in [-1, 1]: an array `(N, C, H, W)`, or the
    Arrow-formatted column `pixels` of a `datasets` table."""

    config: PreprocessingConfig
    rows: Any

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """The pixels `(B, C, H, W)` of these rows."""
        if isinstance(self.rows, np.ndarray):
            return self.rows[list(indices)]
        column = self.rows[list(indices)]["pixels"].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(-1, self.config.channels, *self.config.height_width).copy()

    def read(self, index: int) -> Picture:
        """As an array that can be prepared once more, in another size."""
        values = np.moveaxis(self.pixels([index])[0], 0, -1)
        low, high = self.config.value_range
        is_bytes = values.dtype == np.uint8
        return values if is_bytes else ((values + 1) / 2 * (high - low) + low).clip(low, high)

    def mark(self, index: int) -> int:
        """A checksum of the values."""
        return zlib.crc32(self.pixels([index]).tobytes())


@dataclass(frozen=True)
class ImageTable:
    """Named pictures, each with a label or none, in an order of their own."""

    name: str
    ids: Sequence[str]
    """A name for each picture: it decides the split and goes into the code dataset."""
    read: Callable[[int], Picture]
    """One picture; what it raises for a broken one is reported with the picture's name."""
    mark: Callable[[int], int]
    """Something cheap that tells a picture from another of the same name."""
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] = ()
    files: Sequence[Path] = ()
    """The files behind it, where they are known: one for each picture, or shards of many."""
    prepared: PreparedPictures | None = None

    def __post_init__(self) -> None:
        strange = re.search("[^\n]*[\ud800-\udfff][^\n]*", "\n".join(self.ids))
        if strange:
            raise UserError(
                f"{self.name} holds a name that is not UTF-8 ({strange[0]!r}): rename that image."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def choose(self, indices: Sequence[int]) -> "ImageTable":
        """These rows alone."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            read=partial(_of_chosen, self.read, indices),
            mark=partial(_of_chosen, self.mark, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            files=[self.files[i] for i in indices] if len(self.files) == len(self) else self.files,
        )

    def with_classes_of(self, train: "ImageTable") -> "ImageTable":
        """This table with its labels numbered as in the training images.

        Raises:
            UserError: it has other classes, or none where the training images have some.
        """
        if train.labels is None:
            return replace(self, labels=None, class_names=())
        if self.labels is None or not set(self.class_names) <= set(train.class_names):
            raise UserError(
                f"{self.name} has the classes {list(self.class_names)}, but {train.name} has "
                f"{list(train.class_names)}: held-out images need the training images' classes."
            )
        labels = [train.class_names.index(self.class_names[label]) for label in self.labels]
        return replace(self, labels=labels, class_names=train.class_names)


def _of_chosen(function: Callable[[int], Any], indices: Sequence[int], index: int) -> Any:
    return function(indices[index])


class ImageDataset(Dataset):
    """Pictures of a table as batches {"images": (B, C, H, W) uint8 or float32, "labels": (B,)}.

    Decoded pictures are kept in memory where all of them fit into `CACHE_BYTES`.

    Args:
        shared: keep them where processes of a loader see them too.
        cached: whether to keep them at all; not where each is read once.
    """

    def __init__(
        self,
        source: ImageTable,
        indices: Sequence[int],
        config: PreprocessingConfig,
        *,
        shared: bool = False,
        cached: bool = True,
    ) -> None:
        self.source, self.indices, self.config = source, indices, config
        self.left_out: Sequence[int] = ()
        self.prepared = _as_prepared(source, config)
        shape = (len(indices), config.channels, *config.height_width)
        kind = torch.uint8 if config.value_range == BYTES else torch.float32
        fits = int(np.prod(shape, dtype=np.int64)) * kind.itemsize <= CACHE_BYTES
        keep = cached and fits and len(indices) and self.prepared is None
        self.cache = torch.empty(shape, dtype=kind) if keep else None
        self.cached = torch.zeros(len(indices) if keep else 0, dtype=torch.bool)
        if shared and self.cache is not None:
            self.cache.share_memory_()
            self.cached.share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        """The pictures' names, in order."""
        return [self.source.ids[i] for i in self.indices]

    def changed(self, index: int, choose: Choice) -> Tensor:
        """One picture, changed as chosen for its size: `(C, H, W)`.

        Raises:
            BadImage: naming the picture and what is wrong with it.
        """
        row = self.indices[index]
        try:
            picture = self.source.read(row)
            change = choose(picture_size(picture))
            return torch.from_numpy(change.apply(picture, self.config))
        except Exception as error:  # decoders raise many kinds
            raise BadImage(self.source.name, self.source.ids[row], error) from None

    def pixels(self, index: int) -> Tensor:
        """One picture, `(C, H, W)`.

        Raises:
            BadImage: naming the picture and what is wrong with it.
        """
        if self.prepared is not None:
            return torch.from_numpy(self.prepared.pixels([self.indices[index]])[0])
        if self.cache is None:
            return self.changed(index, no_change)
        if not self.cached[index]:
            self.cache[index] = self.changed(index, no_change)
            self.cached[index] = True
        return self.cache[index]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.batch(self.pixel_rows(indices), indices)

    def pixel_rows(self, indices: Sequence[int]) -> Tensor:
        """Several pictures, `(B, C, H, W)`."""
        if self.prepared is not None:
            return torch.from_numpy(self.prepared.pixels([self.indices[i] for i in indices]))
        return torch.stack([self.pixels(i) for i in indices])

    def batch(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """Images with their labels, if there are labels."""
        if self.source.labels is None:
            return {"images": images}
        labels = [self.source.labels[self.indices[i]] for i in indices]
        return {"images": images, "labels": torch.tensor(labels)}

    def check(self, *, skip: bool = False, show_progress: bool = True) -> dict[int, BadImage]:
        """Decode every picture once, in parallel, so that a broken one stops the run at its start.

        Args:
            skip: find all broken ones instead of stopping at the first.

        Raises:
            BadImage: naming the first broken picture.
        """
        if self.prepared is not None:
            return {}

        def attempt(index: int) -> BadImage | None:
            try:
                self.pixels(index)
            except BadImage as error:
                return error
            return None

        broken: dict[int, BadImage] = {}
        results = ordered(attempt, range(len(self)), num_threads=os.cpu_count() or 1)
        disable = not show_progress
        bar = tqdm(
            results, "checking images", len(self), unit="image", disable=disable, leave=False
        )
        for index, error in enumerate(bar):
            if error is not None and not skip:
                results.close()
                raise error
            if error is not None:
                broken[index] = error
        return broken

    def without(self, bad: Container[int]) -> "ImageDataset":
        """The same images but for those at these indices."""
        kept = [i for i in range(len(self)) if i not in bad]
        rows = [self.indices[i] for i in kept]
        rest = ImageDataset(self.source, rows, self.config, cached=False)
        rest.left_out = [self.indices[i] for i in range(len(self)) if i in bad]
        if self.cache is not None:
            rest.cache, rest.cached = self.cache[kept], self.cached[kept]
        return rest


def _as_prepared(source: ImageTable, config: PreprocessingConfig) -> PreparedPictures | None:
    """The pixels, if they were prepared as configured; in another size they are prepared anew.

    Raises:
        UserError: they were prepared in another way.
    """
    if source.prepared is None:
        return None
    made = source.prepared.config
    resized = replace(made, size=config.size, fit=config.fit)
    for key, old, new in differences(PreprocessingConfig, to_dict(resized), to_dict(config)):
        raise UserError(
            f"{source.name} was prepared with image.{key} {old!r}, not {new!r}: "
            f"set the same, or prepare the images again."
        )
    same = (made.height_width, made.fit) == (config.height_width, config.fit)
    return source.prepared if same else None


class AugmentedImages(Dataset):
    """Randomly changed images without end: index i is image i % N in epoch i // N (see
    `ShuffledLoader`)."""

    endless = True

    def __init__(self, images: ImageDataset, config: AugmentationConfig, seed: int) -> None:
        self.images, self.config, self.seed = images, config, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [index % len(self) for index in indices]
        choices = [self._choice(index) for index in indices]
        if self.config.crop != "off":
            images = []
            for row, choose in zip(rows, choices, strict=True):
                images.append(self.images.changed(row, choose))
        else:  # then the pixels in memory will do
            images = list(self.images.pixel_rows(rows))
            for place, choose in enumerate(choices):
                if choose((1, 1)).flip:
                    images[place] = images[place].flip(-1)
        return self.images.batch(torch.stack(images), rows)

    def _choice(self, index: int) -> Choice:
        epoch, row = divmod(index, len(self))
        name = self.images.source.ids[self.images.indices[row]]
        change = partial(random_change, self.config, self.images.config)
        return partial(change, seed=self.seed, epoch=epoch, name=name)


@dataclass(frozen=True)
class ImageSplits:
    """One source, split into what trains and what is held out (perhaps empty)."""

    train: ImageDataset
    validation: ImageDataset
    skipped: tuple[BadImage, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that labels number, or none."""
        return self.train.source.class_names

    def facts(self) -> dict[str, str]:
        """What a run is bound to: names, labels and splits, of skipped images too; and marks."""
        lines = [repr(self.class_names)]
        for split, dataset in self.items():
            labels = dataset.source.labels
            for i in sorted([*dataset.indices, *dataset.left_out]):
                label = labels[i] if labels is not None else None
                lines.append(f"{split} {dataset.source.ids[i]} {label}\n")
        tables = {id(table): table for table in (self.train.source, self.validation.source)}
        marks = []
        for table in tables.values():
            marks += [table.mark(i) for i in marked(len(table))]
        return image_facts(lines, marks)

    def skipped_hash(self) -> str | None:
        """A hash of which images are skipped, if there are any."""
        names = [error.name for error in self.skipped]
        return hashlib.sha256(repr(names).encode()).hexdigest() if names else None

    def items(self) -> Iterator[tuple[str, ImageDataset]]:
        """The splits by name."""
        yield "train", self.train
        yield "validation", self.validation
