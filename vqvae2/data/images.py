"""The images of a source in the size and channels that a model wants, split into training and held out."""

import hashlib
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vqvae2.common.accelerate import say
from vqvae2.common.config import differences, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import SAMPLE_NAME
from vqvae2.common.threads import ordered
from vqvae2.config import AugmentationConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.arrays import PythonImages, array_source
from vqvae2.data.augmentation import Change, random_change
from vqvae2.data.preprocessing import BYTES, Picture, first_line, picture_size
from vqvae2.data.source import ImageSource, file_identity, refuse_shared
from vqvae2.data.sources import open_held_out, open_source

CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size
Choice = Callable[[tuple[int, int]], Change]
"""What to do with a picture of (width, height)."""


class BadImage(UserError):
    """An image that cannot be read or prepared."""

    def __init__(self, source: str, name: str, error: Exception) -> None:
        self.name, self.reason = name, first_line(error)
        cure = (
            ""
            if isinstance(error, UserError)
            else " (repair or remove it, or add --data.on-error skip)"
        )
        what = (
            self.reason
            if isinstance(error, UserError)
            else f"it cannot be read as an image: {self.reason}"
        )
        super().__init__(f"{source}: {name}: {what}{cure}")


class ImageDataset(Dataset):
    """Pictures of a source as batches {"images": (B, C, H, W) uint8 or float32, "labels": (B,) int64 if there are labels}.

    Decoded pictures are kept in memory where all of them fit into `CACHE_BYTES`.

    Args:
        shared: keep them where processes of a loader see them too.
        cached: whether to keep them at all; not where each is read once.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        config: PreprocessingConfig,
        *,
        shared: bool = False,
        cached: bool = True,
    ) -> None:
        self.source, self.indices, self.config = source, indices, config
        self.left_out: Sequence[int] = ()
        shape = (len(indices), config.channels, *config.height_width)
        self.is_prepared = source.prepared is not None and _same_pixels(
            source.prepared.config, config
        )
        if source.prepared is not None:
            _refuse_other_preparation(source.name, source.prepared.config, config)
        kind = torch.uint8 if config.value_range == BYTES else torch.float32
        fits = np.prod(shape, dtype=np.int64) * kind.itemsize <= CACHE_BYTES
        self.cache = (
            torch.empty(shape, dtype=kind)
            if cached and fits and len(indices) and not self.is_prepared
            else None
        )
        self.cached = torch.zeros(len(indices) if self.cache is not None else 0, dtype=torch.bool)
        if shared and self.cache is not None:
            self.cache.share_memory_()
            self.cached.share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        """The pictures' names, in order."""
        return [self.source.ids[i] for i in self.indices]

    def picture(self, index: int) -> Picture:
        """One picture as it is.

        Raises:
            BadImage: naming the picture and what is wrong with it.
        """
        return self._attempt(index, lambda: self.source.read(self.indices[index]))

    def changed(self, index: int, choose: Choice) -> Tensor:
        """One picture, changed as it is chosen for its size: `(C, H, W)`.

        Raises:
            BadImage: naming the picture and what is wrong with it.
        """
        picture = self.picture(index)
        return torch.from_numpy(
            self._attempt(index, lambda: choose(picture_size(picture)).apply(picture, self.config))
        )

    def pixels(self, index: int) -> Tensor:
        """One picture, `(C, H, W)`.

        Raises:
            BadImage: naming the picture and what is wrong with it.
        """
        if self.source.prepared is not None and self.is_prepared:
            return torch.from_numpy(self.source.prepared.pixels([self.indices[index]])[0])
        if self.cache is None:
            return self.changed(index, _unchanged)
        if not self.cached[index]:
            self.cache[index] = self.changed(index, _unchanged)
            self.cached[index] = True
        return self.cache[index]

    def _attempt(self, index: int, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # decoders raise many kinds for a file that is not what it seems
            raise BadImage(self.source.name, self.source.ids[self.indices[index]], error) from None

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Their labels `(B,)`, if there are labels."""
        if self.source.labels is None:
            return None
        return torch.tensor([self.source.labels[self.indices[i]] for i in indices])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        if self.source.prepared is not None and self.is_prepared:
            images = torch.from_numpy(
                self.source.prepared.pixels([self.indices[i] for i in indices])
            )
        else:
            images = torch.stack([self.pixels(i) for i in indices])
        labels = self.labels(indices)
        return {"images": images} if labels is None else {"images": images, "labels": labels}

    def check(self, *, skip: bool = False, show_progress: bool = True) -> dict[int, BadImage]:
        """Decode every picture once, in parallel, so that a broken one stops the run before it starts.

        Args:
            skip: find all broken ones instead of stopping at the first.

        Raises:
            BadImage: naming the first broken picture.
        """
        if self.is_prepared:
            return {}

        def attempt(index: int) -> BadImage | None:
            try:
                self.pixels(index)
            except BadImage as error:
                return error
            return None

        bad: dict[int, BadImage] = {}
        results = ordered(attempt, range(len(self)), num_threads=os.cpu_count() or 1)
        bar = tqdm(
            results,
            desc="checking images",
            total=len(self),
            unit="image",
            disable=not show_progress,
            leave=False,
        )
        for index, error in enumerate(bar):
            if error is not None and not skip:
                results.close()
                raise error
            if error is not None:
                bad[index] = error
        return bad

    def without(self, bad: Container[int]) -> "ImageDataset":
        """The same images but for those at these indices."""
        kept = [i for i in range(len(self)) if i not in bad]
        rest = ImageDataset(self.source, [self.indices[i] for i in kept], self.config, cached=False)
        rest.left_out = [self.indices[i] for i in range(len(self)) if i in bad]
        if self.cache is not None:
            rest.cache, rest.cached = self.cache[kept], self.cached[kept]
        return rest


def _unchanged(size: tuple[int, int]) -> Change:
    return Change()


def _same_pixels(one: PreprocessingConfig, other: PreprocessingConfig) -> bool:
    """Whether both give the same pixels."""
    return replace(one, size=one.height_width) == replace(other, size=other.height_width)


def _refuse_other_preparation(
    name: str, prepared: PreprocessingConfig, config: PreprocessingConfig
) -> None:
    """Prepared images can be prepared once more in another size, and in nothing else.

    Raises:
        UserError: naming what differs.
    """
    for key, before, due in differences(
        PreprocessingConfig,
        to_dict(replace(prepared, size=config.size, fit=config.fit)),
        to_dict(config),
    ):
        raise UserError(
            f"{name} was prepared with image.{key} = {before!r}, but {due!r} is asked for: say the same, or prepare the images again."
        )


class AugmentedImages(Dataset):
    """Images with random changes, as an endless dataset: index i is image i % N in epoch i // N (see `ShuffledLoader`)."""

    endless = True

    def __init__(self, images: ImageDataset, config: AugmentationConfig, seed: int) -> None:
        self.images, self.config, self.seed = images, config, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [i % len(self) for i in indices]
        if self.config.crop == "off":  # then the pixels in memory will do
            batch = self.images.__getitems__(rows)
            flips = [self._choose(i)((1, 1)).flip for i in indices]
            return {
                **batch,
                "images": torch.stack(
                    [
                        image.flip(-1) if flip else image
                        for image, flip in zip(batch["images"], flips, strict=True)
                    ]
                ),
            }
        images = torch.stack(
            [
                self.images.changed(row, self._choose(i))
                for row, i in zip(rows, indices, strict=True)
            ]
        )
        labels = self.images.labels(rows)
        return {"images": images} if labels is None else {"images": images, "labels": labels}

    def _choose(self, index: int) -> Choice:
        epoch, row = divmod(index, len(self))
        name = self.images.source.ids[self.images.indices[row]]
        return partial(
            random_change, self.config, self.images.config, seed=self.seed, epoch=epoch, name=name
        )


@dataclass(frozen=True)
class ImageSplits:
    """The same source, split into what trains and what is held out (perhaps empty)."""

    train: ImageDataset
    validation: ImageDataset
    class_names: tuple[str, ...]
    skipped: tuple[BadImage, ...] = ()

    def names_hash(self) -> str:
        """A hash of which images there are, by name, label and split, skipped ones too: a run must continue on what it was begun on."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split, dataset in self.items():
            labels = dataset.source.labels
            for i in sorted([*dataset.indices, *dataset.left_out]):
                digest.update(
                    f"{split} {dataset.source.ids[i]} {labels[i] if labels is not None else None}\n".encode()
                )
        return digest.hexdigest()

    def facts(self) -> dict[str, str]:
        """What a run is bound to: the names, and some of the pictures."""
        sources = {
            id(source): source for source in (self.train.source, self.validation.source)
        }.values()
        return {
            "image_names_hash": self.names_hash(),
            SAMPLE_NAME: " ".join(str(mark) for source in sources for mark in source.sample()),
        }

    def skipped_hash(self) -> str | None:
        """A hash of which images are skipped, if there are any."""
        return (
            hashlib.sha256(repr([error.name for error in self.skipped]).encode()).hexdigest()
            if self.skipped
            else None
        )

    def items(self) -> Iterator[tuple[str, ImageDataset]]:
        """The splits by name."""
        yield "train", self.train
        yield "validation", self.validation


def load_images(
    data: ImagesConfig | PythonImages,
    config: PreprocessingConfig,
    *,
    num_workers: int = 0,
    show_progress: bool = True,
    check: bool = True,
) -> ImageSplits:
    """Find, split and check the images that the configuration names, or take {"images", "labels"} from Python (see `array_source`).

    A held-out set that is given (`validation_path`, or the source's own) is taken; otherwise a hash of each image's name decides.

    Args:
        check: decode all images now; without it a broken one is found when it is read, and nothing is kept in memory.

    Raises:
        UserError: no images, a broken image, an unknown colour, held-out images among the training images, or other classes.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserError(
            f"image.background is {config.background!r}, but must be a colour name or #rrggbb."
        ) from None
    if isinstance(data, ImagesConfig):
        train, own = open_source(data.path, data, config.channels)
        held_out = open_held_out(data, config.channels, train.name, train.files) or own
        name, skip = data.path, data.on_error == "skip"
    else:
        train, held_out = array_source(data, config.channels), None
        name, skip = train.name, False
    if held_out is not None:
        held_out = held_out.with_classes_of(train)
        splits: list[tuple[ImageSource, Sequence[int]]] = [
            (train, _without_twins(train, held_out)),
            (held_out, range(len(held_out))),
        ]
    else:
        chosen = _choose_held_out(train, config.validation_fraction)
        splits = [(train, [i for i, c in enumerate(chosen) if c is side]) for side in (False, True)]
    if not len(splits[0][1]):
        raise UserError(
            f"{name}: all {len(train)} images are held out: add images or lower image.validation_fraction."
        )
    datasets = [
        ImageDataset(source, indices, config, shared=num_workers > 0, cached=check)
        for source, indices in splits
    ]
    bad = [
        dataset.check(skip=skip, show_progress=show_progress) if check else {}
        for dataset in datasets
    ]
    datasets = [
        dataset.without(errors) if errors else dataset
        for dataset, errors in zip(datasets, bad, strict=True)
    ]
    skipped = tuple(error for errors in bad for error in errors.values())
    if not len(datasets[0]):
        raise UserError(
            f"{name}: none of the {len(bad[0])} training images can be read (the first: {skipped[0].reason}): check data.path."
        )
    return ImageSplits(datasets[0], datasets[1], train.class_names, skipped)


def _choose_held_out(source: ImageSource, fraction: float) -> list[bool]:
    """Whether each image is held out: by its name, and that of its first if a file has several names."""
    chosen = [is_held_out(name, fraction) for name in source.ids]
    if fraction and len(source.files) == len(source):
        first: dict[object, int] = {}
        chosen = [
            chosen[first.setdefault(file_identity(path), i)] for i, path in enumerate(source.files)
        ]
    return chosen


def _without_twins(train: ImageSource, held_out: ImageSource) -> Sequence[int]:
    """The training images that are not held out by another name. A few such (caches link equal files) are left out, and that is said.

    Raises:
        UserError: many are, or whole shards.
    """
    if len(train.files) != len(train) or len(held_out.files) != len(held_out):
        refuse_shared(train.files, held_out.files, train.name)
        return range(len(train))
    known = {file_identity(path) for path in held_out.files}
    kept = [i for i, path in enumerate(train.files) if file_identity(path) not in known]
    if len(train) - len(kept) > len(train) // 10:
        refuse_shared(train.files, held_out.files, train.name)
    if len(kept) < len(train):
        say(
            f"{train.name}: {len(train) - len(kept)} images are links to held-out ones, and are not trained on."
        )
    return kept


def lies_in(path: str, folder: str) -> bool:
    """Whether a local path is a folder or lies in it."""
    return Path(folder).expanduser().is_dir() and Path(path).expanduser().resolve().is_relative_to(
        Path(folder).expanduser().resolve()
    )


def load_source(data: ImagesConfig, channels: int) -> ImageSource:
    """All images of a source, held out or not.

    Raises:
        UserError: there are none.
    """
    train, held_out = open_source(data.path, data, channels)
    if held_out is None:
        return train
    ids, number = [*train.ids, *held_out.ids], len(train)
    return ImageSource(
        train.name,
        ids,
        partial(_either, train.read, held_out.read, number),
        partial(_either, train.mark, held_out.mark, number),
    )


def _either(
    first: Callable[[int], Any], second: Callable[[int], Any], number: int, index: int
) -> Any:
    return first(index) if index < number else second(index - number)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the image of this name is held out: a hash decides, so it never depends on the other images."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64
