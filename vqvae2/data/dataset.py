"""Images as training reads them: datasets of pixels over a table, or batches from a stream."""

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vqvae2.common.config import differences, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.loading import Loader, ShuffledLoader, ordered
from vqvae2.config import AugmentationConfig, DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data import splits
from vqvae2.data.augmentation import Choice, no_change, random_change
from vqvae2.data.decoding import BadImage, picture_size
from vqvae2.data.open_source import (
    ImageTable,
    PreparedPictures,
    PythonImages,
    Sources,
    open_source,
    refuse_stream,
)
from vqvae2.data.preprocessing import BYTES
from vqvae2.data.stream import ImageStream, StreamedImages, StreamRow

CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size
MAX_HELD_OUT = 1024  # images of a stream that are held out by name


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
    """A table, split into what trains and what is held out (perhaps nothing)."""

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
        tables = {id(dataset.source): dataset.source for _, dataset in self.items()}
        marks: list[int] = []
        for table in tables.values():
            marks += map(table.mark, splits.marked(len(table)))
        return splits.image_facts(lines, marks)

    def skipped_hash(self) -> str | None:
        """A hash of which images are skipped, if there are any."""
        names = [error.name for error in self.skipped]
        return hashlib.sha256(repr(names).encode()).hexdigest() if names else None

    def items(self) -> Iterator[tuple[str, ImageDataset]]:
        """The splits by name."""
        yield "train", self.train
        yield "validation", self.validation


def split_table(sources: Sources, config: PreprocessingConfig) -> ImageSplits:
    """The training and the held-out images of a table, not decoded yet.

    Raises:
        UserError: the source is a stream, or no training image is left.
    """
    train, held_out = sources
    refuse_stream(train)
    assert isinstance(train, ImageTable)
    if held_out is None:
        chosen = splits.choose_held_out(train.ids, train.files, config.validation_fraction)
        rows = [i for i, is_chosen in enumerate(chosen) if not is_chosen]
        held_out, held_out_rows = train, [i for i, is_chosen in enumerate(chosen) if is_chosen]
    else:
        if isinstance(held_out, ImageStream):
            held_out = _stack(held_out, held_out.all_rows(), config, skip=False)[0].source
        rows, held_out_rows = list(range(len(train))), list(range(len(held_out)))
        if train.is_of_files and held_out.is_of_files:
            rows = splits.drop_held_out_files(train.files, held_out.files, train.name)
    if not rows:
        what_to_do = "add images or lower image.validation_fraction"
        raise UserError(f"{train.name}: all {len(train)} images are held out: {what_to_do}.")
    return ImageSplits(
        ImageDataset(train, rows, config, cached=False),
        ImageDataset(held_out, held_out_rows, config, cached=False),
    )


def load_images(
    data: ImagesConfig | PythonImages,
    config: PreprocessingConfig,
    *,
    num_workers: int = 0,
    show_progress: bool = True,
    check: bool = True,
) -> ImageSplits:
    """Find, split and check the images that the configuration names, or take them from Python.

    Args:
        check: decode all images now; without it a broken one is found when it is read, and
            nothing is kept in memory.

    Raises:
        UserError: no images, a broken image, held-out images among the training images, or other
            classes; or the source is a stream.
    """
    found = split_table(open_source(data, config), config)
    if not check:
        return found
    skip = isinstance(data, ImagesConfig) and data.on_error == "skip"
    kept: list[ImageDataset] = []
    skipped: list[BadImage] = []
    for _, split in found.items():
        images = ImageDataset(split.source, split.indices, config, shared=num_workers > 0)
        broken = images.check(skip=skip, show_progress=show_progress)
        kept.append(images.without(broken) if broken else images)
        skipped += broken.values()
    if not len(kept[0]):
        name, reason = found.train.source.name, skipped[0].reason
        raise UserError(f"{name}: no training image can be read ({reason}): check data.path.")
    return ImageSplits(kept[0], kept[1], tuple(skipped))


def held_out_images(
    data: ImagesConfig, config: PreprocessingConfig, *, show_progress: bool = True
) -> ImageDataset:
    """The held-out images of a table or stream, at hand; of a stream at most `MAX_HELD_OUT`.

    Raises:
        UserError: see `load_images`.
    """
    sources = open_source(data, config)
    if isinstance(sources.train, ImageStream):
        return _held_out_of_stream(sources, data, config)[0]
    return load_images(data, config, show_progress=show_progress).validation


def _held_out_of_stream(
    sources: Sources, data: ImagesConfig, config: PreprocessingConfig
) -> tuple[ImageDataset, list[BadImage]]:
    """The stream's explicit held-out set, or its first images that are held out by name."""
    train, held_out = sources
    assert isinstance(train, ImageStream)
    skip = data.on_error == "skip"
    if isinstance(held_out, ImageTable):
        images = ImageDataset(held_out, range(len(held_out)), config)
        broken = images.check(skip=skip)
        return images.without(broken) if broken else images, list(broken.values())
    if held_out is not None:
        return _stack(held_out, held_out.all_rows(), config, skip=skip)
    rows: Iterable[StreamRow] = ()  # where nothing is held out, nothing need be read
    share = config.validation_fraction
    if share:
        rows = (row for row in train.all_rows() if splits.is_held_out(row.id, share))
    return _stack(train, rows, config, skip=skip)


def _stack(
    stream: ImageStream, rows: Iterable[StreamRow], config: PreprocessingConfig, *, skip: bool
) -> tuple[ImageDataset, list[BadImage]]:
    """The first rows of a stream in memory, and those that could not be read."""
    ids: list[str] = []
    pixels: list[np.ndarray] = []
    skipped: list[BadImage] = []
    for row in islice(rows, MAX_HELD_OUT):
        try:
            pixels.append(stream.decode(row, config, no_change))
            ids.append(row.id)
        except BadImage as error:
            if not skip:
                raise
            skipped.append(error)
    empty = np.zeros((0, config.channels, *config.height_width), np.uint8)
    pictures = PreparedPictures(config, np.stack(pixels) if pixels else empty)
    table = ImageTable(stream.name, ids, pictures.read, pictures.mark, prepared=pictures)
    return ImageDataset(table, range(len(ids)), config), skipped


def stream_facts(sources: Sources, config: PreprocessingConfig) -> dict[str, str]:
    """What a run on a stream is bound to: its shards, and what is held out."""
    train, held_out = sources
    assert isinstance(train, ImageStream)
    content: list[Any] = [config.validation_fraction]
    marks: list[object] = [*train.marks()]
    if isinstance(held_out, ImageTable):
        content = list(held_out.ids)
        marks += map(held_out.mark, splits.marked(len(held_out)))
    elif held_out is not None:
        content = held_out.shard_names()
        marks += held_out.marks()
    line = json.dumps([train.shard_names(), held_out is None, content])
    return splits.image_facts([line], marks)


@dataclass(frozen=True)
class TrainingImages:
    """What a training of the autoencoder sees."""

    loader: Loader
    """Batches without end."""
    validation: ImageDataset
    shown: ImageDataset
    """Images to draw reconstructions of: held-out ones, if there are any."""
    facts: Mapping[str, str | None]
    """What the run is bound to."""
    summary: str
    skipped: Sequence[BadImage]


def open_training_images(
    data: DataConfig,
    config: PreprocessingConfig,
    batch_size: int,
    *,
    images: PythonImages | None = None,
    on_skipped: Callable[[str, str], None],
    show_progress: bool = True,
    **place: int,
) -> TrainingImages:
    """Images found, split, checked and shuffled; or shards that are read as they come.

    Args:
        images: see `load_images`; instead of what `data.path` names.
        on_skipped: see `StreamedImages`.
        place: `seed`, `num_processes` and `process_index`.

    Raises:
        UserError: see `open_source` and `load_images`.
    """
    # A stream, in an order of its own.
    sources = open_source(data, config) if images is None else None
    if sources is not None and isinstance(sources.train, ImageStream):
        validation, skipped = _held_out_of_stream(sources, data, config)
        share = config.validation_fraction if sources.held_out is None else 0.0
        stream = sources.train
        loader = StreamedImages(stream, data, config, batch_size, share, on_skipped, **place)
        summary = f"{len(stream)} shards, {len(validation)} images held out"
        facts = stream_facts(sources, config)
        return TrainingImages(loader, validation, validation, facts, summary, skipped)

    # A table, shuffled anew in every epoch.
    workers = data.num_workers
    source = data if images is None else images
    found = load_images(source, config, num_workers=workers, show_progress=show_progress)
    train: Any = found.train
    if data.augmentation.horizontal_flip or data.augmentation.crop != "off":
        train = AugmentedImages(found.train, data.augmentation, place["seed"])
    classes = f"{len(found.class_names) or 'no'} classes"
    return TrainingImages(
        ShuffledLoader(train, batch_size, num_workers=workers, **place),
        found.validation,
        found.validation if len(found.validation) else found.train,
        {**found.facts(), "skipped_hash": found.skipped_hash()},
        f"{len(found.train)} training images, {len(found.validation)} held out, {classes}",
        found.skipped,
    )
