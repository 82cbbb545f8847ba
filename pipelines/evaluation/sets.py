"""Sets of images, and what an extractor sees in them: worked out once, shared, and kept."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.features import LANES, Extractor, kept_arrays
from pipelines.evaluation.metrics import Moments
from pipelines.model_index import part_hash
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.samples import codes_file, load_codes
from vqvae2.common.accelerate import processes
from vqvae2.common.loading import some_rows
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import to_bytes
from vqvae2.config import PreprocessingConfig
from vqvae2.data import ImageDataset, load_picture, to_images
from vqvae2.data.vectors import Vectors
from vqvae2.model import VQVAE2

CHUNK = 500  # images that are read, seen and kept together
MOST_KEPT = 50_000  # images of a set, chosen at random, whose features stay in memory


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
    codes: Callable[[Sequence[int]], list[Tensor]] | None = None
    """Rows to the codes `(B, h, w)` of every level that images were made of, if they are kept."""
    vectors: Vectors | None = None
    """The images' conditions, if there are any."""

    @classmethod
    def of_dataset(cls, name: str, images: ImageDataset) -> Self:
        """All images of a dataset, with its labels."""
        labels = [images.label(i) for i in range(len(images))]
        known = None if None in labels else [label for label in labels if label is not None]
        vectors = images.source.vectors
        vectors = vectors and vectors.choose(images.indices)
        return cls(name, len(images), images.pixel_rows, known, vectors=vectors)

    @classmethod
    def of_files(
        cls, name: str, files: Sequence[Path], config: PreprocessingConfig, labels: Sequence[int]
    ) -> Self:
        """Samples, perhaps with codes; `labels` are taken in turn, none if there are none."""

        def read(rows: Sequence[int]) -> Tensor:
            return torch.cat([load_picture(str(files[i]), config) for i in rows])

        def codes(rows: Sequence[int]) -> list[Tensor]:
            levels = zip(*(load_codes(files[i]) for i in rows), strict=True)
            return [torch.from_numpy(np.stack(level).astype(np.int64)) for level in levels]

        known = [labels[i % len(labels)] for i in range(len(files))] if labels else None
        kept = bool(files) and codes_file(files[0]).exists()
        return cls(name, len(files), read, known, codes=codes if kept else None)

    def choose(self, rows: Sequence[int]) -> "ImageSet":
        """These rows alone."""

        def only(function: Callable | None) -> Any:
            return function and (lambda chosen: function([rows[i] for i in chosen]))

        labels = None if self.labels is None else [self.labels[i] for i in rows]
        changes = {"read": only(self.read), "codes": only(self.codes), "labels": labels}
        changes["vectors"] = self.vectors and self.vectors.choose(rows)
        return replace(self, number=len(rows), **changes)

    def vectors_for(self, pipeline: VQVAE2Pipeline) -> Tensor | None:
        """The images' conditions `(N, V)`, if they are what the pipeline's priors read."""
        known, own = (pipeline.vector_size, pipeline.vector_names), self.vectors
        if own is None or (own.size, own.names) != known:
            return None
        return torch.from_numpy(own.values)

    def some(self, most: int) -> "ImageSet":
        """At most so many."""
        return self.choose(some_rows(self.number, most))

    def reconstructed(self, vqvae: VQVAE2) -> "ImageSet":
        """What an autoencoder makes of them."""
        hash_ = part_hash(vqvae)  # of its image decoder too
        name = f"{self.name}, reconstructed"
        return replace(self, name=name, vqvae=vqvae, vqvae_hash=hash_, codes=None)

    def __len__(self) -> int:
        return self.number

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:  # as a dataset
        return {"images": self.pixels(rows)}

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Rows as uint8 `(B, C, H, W)`."""
        return self.finish(self.read(rows))

    @torch.no_grad()
    def finish(self, pixels: Tensor) -> Tensor:
        """What was read as uint8, reconstructed if that is wanted: always `LANES` together, as the
        last bits depend on it."""
        if self.vqvae is None:
            return pixels if pixels.dtype == torch.uint8 else to_bytes(pixels)
        made = []
        for rows in to_images(pixels).split(LANES):
            batch = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, LANES - len(rows))).to(self.vqvae.device)
            made.append(to_bytes(self.vqvae(batch).reconstruction)[: len(rows)].cpu())
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
            self.images.choose([self.rows[i] for i in places.tolist()]),
            Moments.of(features),
            range(len(places)),
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


def see(images: ImageSet, extractor: Extractor, folder: Path) -> Seen:
    """What an extractor sees in a set, the same on any number of processes. Files in `folder` keep
    it, by the content of the images: what was seen before is not looked at again."""

    def look(pixels: Tensor) -> dict[str, np.ndarray]:
        features = extractor(images.finish(pixels))
        probabilities = extractor.probabilities(features)
        arrays = {"features": features.numpy()}
        return arrays if probabilities is None else {**arrays, "seen": probabilities.numpy()}

    # Each process looks at its share of the chunks.
    state, number = processes(), images.number
    chunks = [range(i, min(i + CHUNK, number)) for i in range(0, number, CHUNK)]
    hashes: list[tuple[int, str]] = []
    name = f"looking at {images.name}"
    with progress_bar(desc=name, total=number, unit="image", leave=False) as bar:
        for i in range(state.process_index, len(chunks), state.num_processes):
            pixels = images.read(chunks[i])
            content = hashlib.sha256(repr([images.vqvae_hash, pixels.shape]).encode())
            content.update(pixels.numpy().tobytes())
            hashes.append((i, content.hexdigest()))
            kept_arrays(folder, extractor, hashes[-1][1], partial(look, pixels))
            bar.update(len(chunks[i]) * state.num_processes)
    if state.num_processes > 1:
        hashes = gather_object(hashes)

    # All of them, in order.
    rows, moments = some_rows(number, MOST_KEPT), None
    features, probabilities = [], []
    for i, content_hash in sorted(hashes):
        again = lambda i=i: look(images.read(chunks[i]))  # noqa: E731
        arrays = kept_arrays(folder, extractor, content_hash, again)
        seen = torch.from_numpy(arrays["features"])
        moments = moments or Moments(seen.shape[1])
        moments.update(seen)
        kept = [row - chunks[i].start for row in rows if row in chunks[i]]
        features.append(seen[kept])
        if "seen" in arrays:
            probabilities.append(torch.from_numpy(arrays["seen"])[kept])
    assert moments is not None
    labels = None if images.labels is None else torch.tensor(images.labels)[rows]
    joint = torch.cat(probabilities) if probabilities else None
    return Seen(images, moments, rows, torch.cat(features), joint, labels)
