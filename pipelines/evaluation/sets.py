"""Sets of images, and what an extractor sees in them: worked out once, kept, shared by processes."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from pipelines.evaluation.metrics import Moments
from vqvae2.common.accelerate import processes
from vqvae2.common.files import whole_file
from vqvae2.common.messages import progress_bar
from vqvae2.config import PreprocessingConfig
from vqvae2.data import ImageDataset, load_picture, to_images
from vqvae2.model import VQVAE2

CHUNK = 500  # images that are read, seen and kept together
BATCH = 50  # images that a network sees at once: always as many, as its last bits depend on it
MOST_KEPT = 50_000  # images of a set, evenly spread over it, whose features stay in memory


@dataclass(frozen=True)
class ImageSet:
    """Images that can be read in any order."""

    name: str
    number: int
    read: Callable[[Sequence[int]], Tensor]
    """Rows to pixels `(B, C, H, W)`, uint8 or floating in [-1, 1]."""
    labels: Sequence[int] | None = None
    vqvae: VQVAE2 | None = None
    """If given, the images are what it makes of those."""
    vqvae_hash: str = ""

    @classmethod
    def of_dataset(cls, name: str, images: ImageDataset) -> Self:
        """All images of a dataset, with its labels."""
        labels = [images.label(i) for i in range(len(images))]
        known = None if None in labels else [label for label in labels if label is not None]
        return cls(name, len(images), images.pixel_rows, known)

    @classmethod
    def of_files(
        cls, name: str, files: Sequence[Path], config: PreprocessingConfig, labels: Sequence[int]
    ) -> Self:
        """Files that are pictures; `labels` are taken in turn, none if there are none."""

        def read(rows: Sequence[int]) -> Tensor:
            return torch.cat([load_picture(str(files[i]), config) for i in rows])

        known = [labels[i % len(labels)] for i in range(len(files))] if labels else None
        return cls(name, len(files), read, known)

    def choose(self, rows: Sequence[int]) -> "ImageSet":
        """These rows alone."""
        labels = None if self.labels is None else [self.labels[i] for i in rows]

        def read(chosen: Sequence[int]) -> Tensor:
            return self.read([rows[i] for i in chosen])

        return replace(self, number=len(rows), read=read, labels=labels)

    def reconstructed(self, vqvae: VQVAE2) -> "ImageSet":
        """What an autoencoder makes of them."""
        hash_ = vqvae.content_hash()
        return replace(self, name=f"{self.name}, reconstructed", vqvae=vqvae, vqvae_hash=hash_)

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Rows as uint8 `(B, C, H, W)`."""
        return self._finish(self.read(rows))

    @torch.no_grad()
    def _finish(self, pixels: Tensor) -> Tensor:
        if self.vqvae is None:
            return pixels if pixels.dtype == torch.uint8 else _to_bytes(pixels)
        made = []
        for batch, number in _in_batches(pixels):
            made.append(_to_bytes(self.vqvae(to_images(batch.to(self.vqvae.device))).reconstruction))
            made[-1] = made[-1][:number]
        return torch.cat(made)


@dataclass(frozen=True)
class Seen:
    """What an extractor sees in a set."""

    images: ImageSet
    moments: Moments
    """Of all images."""
    rows: Sequence[int]
    """Which images the following are about; all, unless there are very many."""
    features: Tensor  # (N, D) float32
    probabilities: Tensor | None  # (N, classes)
    labels: Tensor | None  # (N,)

    def choose(self, places: Tensor) -> "Seen":
        """Those at these places of `rows` alone."""
        features = self.features[places]
        return Seen(
            self.images,
            Moments.of(features),
            [self.rows[i] for i in places.tolist()],
            features,
            None if self.probabilities is None else self.probabilities[places],
            None if self.labels is None else self.labels[places],
        )

    def first(self, number: int) -> "Seen":
        """The first ones."""
        return self.choose(torch.arange(min(number, len(self.features))))

    def of_class(self, label: int) -> "Seen":
        """Those of a class."""
        assert self.labels is not None
        return self.choose((self.labels == label).nonzero()[:, 0])


def see(images: ImageSet, extractor: Any, folder: Path) -> Seen:
    """What an extractor sees in a set, the same on any number of processes. Files in `folder` keep
    it, named by the content of the images: what was seen before is not looked at again."""
    # Each process looks at its share of the chunks.
    state, number = processes(), images.number
    chunks = [range(i, min(i + CHUNK, number)) for i in range(0, number, CHUNK)]
    own = range(state.process_index, len(chunks), state.num_processes)
    found: list[tuple[int, str]] = []
    bar = progress_bar(desc=f"looking at {images.name}", total=number, unit="image", leave=False)
    for i in own:
        pixels = images.read(chunks[i])
        identity = [extractor.name, extractor.version, extractor.weights_hash, images.vqvae_hash]
        content = hashlib.sha256(repr([identity, pixels.dtype, pixels.shape]).encode())
        content.update(pixels.numpy().tobytes())
        file = folder / f"{content.hexdigest()[:32]}.npz"
        if not file.exists():
            _look(images._finish(pixels), extractor, file)
        found.append((i, file.name))
        bar.update(len(chunks[i]) * state.num_processes)
    bar.close()
    if state.num_processes > 1:
        found = gather_object(found)

    # All of them, in order.
    step = -(-number // MOST_KEPT)
    moments, features, probabilities = None, [], []
    for i, name in sorted(found):
        with np.load(folder / name) as arrays:
            seen = torch.from_numpy(arrays["features"])
            moments = moments or Moments(seen.shape[1])
            moments.update(seen)
            kept = [row - chunks[i].start for row in chunks[i] if row % step == 0]
            features.append(seen[kept])
            if "probabilities" in arrays:
                probabilities.append(torch.from_numpy(arrays["probabilities"])[kept])
    assert moments is not None
    labels = None if images.labels is None else torch.tensor(images.labels)[::step]
    joint = torch.cat(probabilities) if probabilities else None
    return Seen(images, moments, range(0, number, step), torch.cat(features), joint, labels)


def _look(pixels: Tensor, extractor: Any, file: Path) -> None:
    """Write the features, and probabilities if there are any, of pixels `(B, C, H, W)` uint8."""
    arrays: dict[str, list[np.ndarray]] = {}
    for batch, number in _in_batches(pixels):
        seen = {"features": extractor(batch), "probabilities": extractor.probabilities(batch)}
        for name, values in seen.items():
            if values is not None:
                arrays.setdefault(name, []).append(values[:number].float().cpu().numpy())
    buffer = io.BytesIO()
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    np.savez(buffer, **joined)  # type: ignore[arg-type]
    with whole_file(file) as aside:
        aside.write_bytes(buffer.getvalue())


def _in_batches(pixels: Tensor) -> list[tuple[Tensor, int]]:
    """Batches of `BATCH` images, the last one filled up; and how many of each count."""
    batches = []
    for batch in pixels.split(BATCH):
        padding = pixels.new_zeros(BATCH - len(batch), *pixels.shape[1:])
        batches.append((torch.cat([batch, padding]), len(batch)))
    return batches


def _to_bytes(images: Tensor) -> Tensor:
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
