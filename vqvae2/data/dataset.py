"""Images as training reads them: datasets of pixels over a table, or batches from a stream."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.common.config import differences, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.loading import Loader, ShuffledLoader, ordered
from vqvae2.common.messages import progress_bar
from vqvae2.config import AugmentationConfig, DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data import open_source as sources
from vqvae2.data import splits
from vqvae2.data.augmentation import Choice, decode, no_change, random_change
from vqvae2.data.decoding import BadImage
from vqvae2.data.open_arrays import PythonImages
from vqvae2.data.sources import Sources
from vqvae2.data.stream import ImageStream, StreamedImages
from vqvae2.data.survey import Survey
from vqvae2.data.table import ImageTable, PreparedPictures

logger = logging.getLogger(__name__)
MOST_NAMED = 10  # broken pictures; where there are more, all may be
CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size


class ImageDataset(Dataset):
    """Pictures of a table as batches {"images": (B, C, H, W) uint8 or float32, "labels": (B,)}. A
    `DataLoader` needs `collate_fn=dict`, as batches come whole."""

    def __init__(
        self, source: ImageTable, indices: Sequence[int], config: PreprocessingConfig
    ) -> None:
        self.source, self.indices, self.config = source, indices, config
        self.left_out: Sequence[int] = ()
        self.cache: Tensor | None = None
        self.prepared = _as_prepared(source, config)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        """The pictures' names, in order."""
        return [self.source.ids[i] for i in self.indices]

    def label(self, index: int) -> int | None:
        """A picture's label, if there are labels."""
        return None if self.source.labels is None else self.source.labels[self.indices[index]]

    def vector(self, index: int) -> np.ndarray | None:
        """A picture's condition vector `(V,)`, if there are any."""
        vectors = self.source.vectors
        return None if vectors is None else vectors.values[self.indices[index]]

    def changed(self, index: int, choose: Choice) -> Tensor:
        """One picture, changed as chosen for its size: `(C, H, W)`. Raises BadImage: naming the
        picture and what is wrong with it."""
        row, table = self.indices[index], self.source
        if self.prepared is not None:
            change = choose((1, 1))
            if change.window is None and not change.flip:
                return torch.from_numpy(self.prepared.pixels([row])[0])
        return decode(table.name, table.ids[row], table.cells[row], self.config, choose)

    def pixels(self, index: int) -> Tensor:
        """One picture, `(C, H, W)`. Raises BadImage."""
        return self.pixel_rows([index])[0]

    def pixel_rows(self, indices: Sequence[int]) -> Tensor:
        """Several pictures, `(B, C, H, W)`. Raises BadImage."""
        if self.prepared is not None:
            return torch.from_numpy(self.prepared.pixels([self.indices[i] for i in indices]))
        if self.cache is not None:
            return self.cache[list(indices)]
        return torch.stack([self.changed(i, no_change) for i in indices])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.batch(self.pixel_rows(indices), indices)

    def batch(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """Images with their labels, if there are labels."""
        if self.source.labels is None:
            return {"images": images}
        return {"images": images, "labels": torch.tensor([self.label(i) for i in indices])}

    def check(
        self,
        *,
        skip: bool = False,
        shared: bool = False,
        choose: Choice = no_change,
    ) -> list[BadImage]:
        """Decode every picture once, so that a broken one stops the run at its start; and keep
        their pixels in memory where all of them fit into `CACHE_BYTES`.

        Args:
            skip: leave broken ones out, and return what is wrong with them.
            shared: keep the pixels where the processes of a loader see them too.
            choose: `no_change`, or a `Survey`'s.

        Raises:
            BadImage: naming the broken pictures, unless they are skipped.
        """
        if self.prepared is not None or not len(self):
            return []

        def attempt(index: int) -> Tensor | BadImage:
            try:
                return self.changed(index, choose)
            except BadImage as error:
                return error

        # Decode, on all cores, into the cache.
        good: list[int] = []
        broken: list[BadImage] = []
        results = ordered(attempt, range(len(self)), num_threads=os.cpu_count() or 1)
        number = len(self)
        bar = progress_bar(results, "checking images", number, unit="image", leave=False)
        for index, result in enumerate(bar):
            if isinstance(result, BadImage):
                broken.append(result)
                if not skip and len(broken) == MOST_NAMED:
                    results.close()
                    break
                continue
            if not good and result.nbytes * number <= CACHE_BYTES:
                self.cache = torch.empty((number, *result.shape), dtype=result.dtype)
                try:
                    self.cache = self.cache.share_memory_() if shared else self.cache
                except RuntimeError as error:  # /dev/shm of a container is small
                    self.cache = None
                    logger.warning("pixels are decoded anew in every epoch: %s", error)
            if self.cache is not None:
                self.cache[len(good)] = result
            good.append(index)

        # Name broken ones, or leave them out.
        if broken and not skip:
            raise broken[0].together_with(broken[1:])
        if broken:
            kept = set(good)
            self.left_out = [row for i, row in enumerate(self.indices) if i not in kept]
            self.indices = [self.indices[i] for i in good]
            self.cache = self.cache[: len(good)] if self.cache is not None else None
        return broken


def _as_prepared(source: ImageTable, config: PreprocessingConfig) -> PreparedPictures | None:
    """The pixels, if they were prepared as configured; in another size they are prepared anew.
    Raises UserError: they were prepared in another way."""
    if not isinstance(source.cells, PreparedPictures):
        return None
    made = source.cells.config
    share = config.validation_fraction or made.validation_fraction  # 0: no more than was held out
    resized = replace(made, size=config.size, fit=config.fit)
    wanted = replace(config, validation_fraction=share)
    for key, old, new in differences(PreprocessingConfig, to_dict(resized), to_dict(wanted)):
        what = f"{source.name} was prepared with image.{key} {old!r}, not {new!r}"
        raise UserError(f"{what}: set the same, or prepare the images again.")
    same = (made.height_width, made.fit) == (config.height_width, config.fit)
    return source.cells if same else None


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
        images: list[Tensor] = []
        if self.config.crop == "off":  # then the pixels in memory will do
            images += self.images.pixel_rows(rows)
        for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
            name = self.images.source.ids[self.images.indices[row]]
            change = partial(random_change, self.config, self.images.config)
            choose = partial(change, seed=self.seed, epoch=index // len(self), name=name)
            if self.config.crop != "off":
                images.append(self.images.changed(row, choose))
            elif choose((1, 1)).flip:
                images[place] = images[place].flip(-1)
        return self.images.batch(torch.stack(images), rows)


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
        marks = self.train.source.marks()
        if self.validation.source is not self.train.source:
            marks = [*marks, *self.validation.source.marks()]
        return splits.image_facts(self._lines(), marks)

    def _lines(self) -> Iterator[str]:
        yield repr(self.class_names)
        for split, dataset in self.items():
            table = dataset.source
            for i in sorted([*dataset.indices, *dataset.left_out]):
                label = table.labels[i] if table.labels is not None else None
                yield f"{split} {table.ids[i]} {label}\n"

    def skipped_hash(self) -> str | None:
        """A hash of which images are skipped, if there are any."""
        names = [error.name for error in self.skipped]
        return hashlib.sha256(repr(names).encode()).hexdigest() if names else None

    def items(self) -> Iterator[tuple[str, ImageDataset]]:
        """The splits by name."""
        yield "train", self.train
        yield "validation", self.validation


def split_table(opened: Sources, config: PreprocessingConfig) -> ImageSplits:
    """The training and the held-out images of a table, not decoded yet.

    Raises UserError: the source is a stream, or no training image is left."""
    # What is held out explicitly, by the source's own split, or by name.
    train = sources.refuse_stream(opened.train)
    if opened.held_out is None:
        held_out, share = train, config.validation_fraction
        chosen = [splits.is_held_out(name, share) for name in train.ids]
        held_out_rows = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        rows = [i for i, is_chosen in enumerate(chosen) if not is_chosen]
    else:
        held_out = sources.refuse_stream(opened.held_out)
        rows, held_out_rows = list(range(len(train))), list(range(len(held_out)))

    # A file that is held out under any name is not trained on.
    if held_out_rows and train.is_of_files and held_out.is_of_files:
        files = [held_out.files[i] for i in held_out_rows]
        rows = splits.drop_held_out(rows, train.files, files, train.name)
    if not rows:
        what_to_do = "add images, or hold out fewer"
        raise UserError(f"{train.name}: all {len(train)} images are held out: {what_to_do}.")
    return ImageSplits(
        ImageDataset(train, rows, config), ImageDataset(held_out, held_out_rows, config)
    )


def load_images(
    data: ImagesConfig | PythonImages,
    config: PreprocessingConfig,
    *,
    check: bool = True,
) -> ImageSplits:
    """Find, split and check the images that the configuration names, or take them from Python.

    Args:
        check: decode all images now; without it a broken one is found when it is read, and
            nothing is kept in memory.

    Raises:
        UserError: no images, a broken image, or held-out images among the training images; or the
            source is a stream.
    """
    found = split_table(sources.open_source(data, config), config)
    if not check:
        return found
    skip = isinstance(data, ImagesConfig) and data.on_error == "skip"
    return _checked(found, skip=skip)


def _checked(found: ImageSplits, **options: Any) -> ImageSplits:
    skipped: list[BadImage] = []
    lost: set[int] = set()
    kept: set[int] = set()
    for _, images in found.items():
        skipped += images.check(**options)
        if images.source.labels is not None:
            lost |= {images.source.labels[row] for row in images.left_out}
            kept |= {images.source.labels[row] for row in images.indices}
    if not len(found.train):
        name, reason = found.train.source.name, skipped[0].reason
        raise UserError(f"{name}: no training image can be read ({reason}): check data.path.")
    splits.check_no_class_lost(lost - kept, found.class_names, found.train.source.name)
    return replace(found, skipped=tuple(skipped))


def held_out_images(
    data: ImagesConfig, config: PreprocessingConfig
) -> tuple[ImageDataset, Mapping[str, str]]:
    """The held-out images of a table or stream, at hand; of a stream the first of them. And what a
    run on all of its images is bound to.

    Raises:
        UserError: see `load_images`.
    """
    opened = sources.open_source(data, config)
    if isinstance(opened.train, ImageTable):
        found = split_table(opened, config)
        images, facts = found.validation, found.facts()
    else:
        images, facts = _held_out_of_stream(opened, config), stream_facts(opened, config)
    skipped = images.check(skip=data.on_error == "skip")
    if skipped:
        names = splits.few([bad.name for bad in skipped])
        logger.warning("left out of the held-out images, as they cannot be read: %s", names)
    return images, facts


def _held_out_of_stream(opened: Sources, config: PreprocessingConfig) -> ImageDataset:
    """The explicit held-out set of a stream, or its first images that are held out by name."""
    train, held_out = opened
    assert isinstance(train, ImageStream)
    share = config.validation_fraction
    if isinstance(held_out, ImageStream):
        held_out = sources.first_rows(held_out, held_out.all_rows())
    elif held_out is None:  # where nothing is held out, nothing need be read
        rows = train.all_rows() if share else iter(())
        chosen = (row for row in rows if splits.is_held_out(row.id, share))
        held_out = sources.first_rows(train, chosen)
    return ImageDataset(held_out, range(len(held_out)), config)


def stream_facts(opened: Sources, config: PreprocessingConfig) -> dict[str, str]:
    """What a run on a stream is bound to: its shards, and what is held out."""
    train, held_out = opened
    content: list[Any] = [config.validation_fraction] if held_out is None else held_out.names
    marks = [mark for source in opened if source is not None for mark in source.marks()]
    line = json.dumps([train.names, held_out is None, content])
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
    number: int
    """How many images there are in all; of a stream, how many shards."""
    summary: str
    skipped: Sequence[BadImage]


def open_training_images(
    data: DataConfig,
    config: PreprocessingConfig,
    batch_size: int,
    *,
    images: PythonImages | None = None,
    check_facts: Callable[[Mapping[str, str], int], None],
    on_skipped: Callable[[str, str], None],
    **place: int,
) -> TrainingImages:
    """Images found, split, checked and shuffled, saying what is lost in them (see `Survey`); or
    shards that are read as they come, of which only the held-out images are checked.

    Args:
        images: see `load_images`; instead of what `data.path` names.
        check_facts: called with the facts and the number before the images are checked.
        on_skipped: see `StreamedImages`.
        place: `seed`, `num_processes` and `process_index`.

    Raises:
        UserError: see `open_source` and `load_images`.
    """
    # A stream, in an order of its own.
    opened = sources.open_source(data if images is None else images, config)
    skip, survey = data.on_error == "skip" and images is None, Survey(config)
    if isinstance(opened.train, ImageStream):
        stream, facts = opened.train, stream_facts(opened, config)
        check_facts(facts, len(stream))
        held_out = _held_out_of_stream(opened, config)
        skipped = held_out.check(skip=skip, choose=survey.choose)
        survey.report(f"{stream.name}, held out")
        share = config.validation_fraction if opened.held_out is None else 0.0
        if share or opened.held_out is not None:
            splits.warn_of_few_held_out(len(held_out), 0, share=None)
        loader = StreamedImages(stream, data, config, batch_size, share, on_skipped, **place)
        summary = f"{len(stream)} shards, {len(held_out)} images held out"
        return TrainingImages(loader, held_out, held_out, facts, len(stream), summary, skipped)

    # A table, shuffled anew in every epoch.
    found, workers = split_table(opened, config), data.num_workers
    check_facts(found.facts(), len(opened.train))
    found = _checked(found, skip=skip, shared=workers > 0, choose=survey.choose)
    survey.report(opened.train.name)
    train: Any = found.train
    if data.augmentation.horizontal_flip or data.augmentation.crop != "off":
        train = AugmentedImages(found.train, data.augmentation, place["seed"])
    share_by_name = config.validation_fraction if opened.held_out is None else None
    number = len(found.train) + len(found.validation)
    splits.warn_of_few_held_out(len(found.validation), number, share=share_by_name)
    few = {0: "no classes", 1: "one class, so that labels change nothing"}
    classes = few.get(len(found.class_names), f"{len(found.class_names)} classes")
    return TrainingImages(
        ShuffledLoader(train, batch_size, num_workers=workers, **place),
        found.validation,
        found.validation if len(found.validation) else found.train,
        {**found.facts(), "skipped_hash": found.skipped_hash()},
        number,
        f"{len(found.train)} training images, {len(found.validation)} held out, {classes}",
        found.skipped,
    )
