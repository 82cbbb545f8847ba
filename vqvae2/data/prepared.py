"""Folders that `vqvae2 prepare` wrote: pixels in their final size in Parquet shards, read at the speed of memory.

    prepared.json   train/00000.parquet ...   validation/00000.parquet ...

A row is an image: `id`, `pixels` (a fixed-size list of C*H*W values, uint8, or float32 in [-1, 1]) and `label` where there are classes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.config import PreprocessingConfig
from vqvae2.data.preprocessing import Picture, first_line
from vqvae2.data.source import ImageSource, Prepared, SourcePair, row_checksum

MANIFEST_NAME = "prepared.json"
RECORD_NAME = "prepare_config.yaml"


@dataclass(frozen=True, kw_only=True)
class PreparedManifest:
    """What the shards hold. Written last: a folder without it is unfinished."""

    source: str
    """Where the images came from."""
    image: PreprocessingConfig
    """How they were prepared."""
    class_names: tuple[str, ...]
    """Names of the classes that labels count, or empty."""
    has_labels: bool
    """Whether the rows have labels."""
    num_train: int
    """Rows in train/."""
    num_validation: int
    """Rows in validation/."""
    num_skipped: int
    """Images that could not be read; skipped.jsonl lists them."""


def shard_place(path: Path) -> str | None:
    """Which shard a file is, such as "train/00000", as it says itself; None if it is absent or broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return (pq.read_metadata(path).metadata or {}).get(b"place", b"").decode()
    except (OSError, ValueError, pa.ArrowException):
        return None


def open_prepared(folder: Path) -> SourcePair:
    """The prepared images of a folder, split as they were when they were prepared.

    Raises:
        UserError: a broken manifest, or missing or broken shards.
    """
    manifest = from_dict(
        PreparedManifest, read_json(folder / MANIFEST_NAME), str(folder / MANIFEST_NAME)
    )
    train = _open_split(folder, manifest, "train", manifest.num_train)
    return train, _open_split(folder, manifest, "validation", manifest.num_validation)


def _open_split(folder: Path, manifest: PreparedManifest, split: str, number: int) -> ImageSource:
    import datasets

    what_to_do = "run vqvae2 prepare again"
    files = sorted((folder / split).glob("*.parquet"))
    for path in files:
        if shard_place(path) != f"{split}/{path.stem}":
            raise UserError(
                f"{path} cannot be read, or is not the shard that its name says: {what_to_do}."
            )
    channels, (height, width) = manifest.image.channels, manifest.image.height_width
    if not number:
        return _empty(f"{folder / split}", manifest)
    try:
        table = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
        ids, labels = list(table["id"]), list(table["label"]) if manifest.has_labels else None
        rows = table.select_columns(["pixels"]).with_format(
            "arrow"
        )  # the numpy format widens to int64
        length = table.features["pixels"].length
    except Exception as error:  # `datasets` raises many kinds
        raise UserError(
            f"{folder / split} cannot be read ({type(error).__name__}: {first_line(error)}): {what_to_do}."
        ) from None
    if len(ids) != number or length != channels * height * width:
        raise UserError(
            f"{folder / split} holds {len(ids)} images of {length} values, but {MANIFEST_NAME} says {number} of {channels} x {height} x {width}: {what_to_do}."
        )
    if labels is not None and not all(
        label is not None and 0 <= label < len(manifest.class_names) for label in labels
    ):
        raise UserError(
            f"{folder / split} holds labels that are none of the {len(manifest.class_names)} classes of {MANIFEST_NAME}: {what_to_do}."
        )
    pixels = partial(_read_pixels, rows, (manifest.image.channels, *manifest.image.height_width))
    name = str(folder) if split == "train" else str(folder / split)
    read, mark = (
        partial(_read_picture, pixels, manifest.image.value_range),
        partial(_checksum, pixels),
    )
    return ImageSource(
        name,
        ids,
        read,
        mark,
        labels,
        manifest.class_names,
        Prepared(manifest.image, pixels),
        files=files,
    )


def _empty(name: str, manifest: PreparedManifest) -> ImageSource:
    """Nothing was held out, or none of it could be read: then nothing of the rest is held out either."""
    empty = np.zeros((0, manifest.image.channels, *manifest.image.height_width), np.uint8)
    labels: list[int] | None = [] if manifest.has_labels else None
    return ImageSource(
        name,
        [],
        empty.__getitem__,
        partial(row_checksum, empty),
        labels,
        manifest.class_names,
        Prepared(manifest.image, partial(_take, empty)),
    )


def _take(rows: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return rows[list(indices)]


def _read_pixels(rows: Any, shape: tuple[int, int, int], indices: Sequence[int]) -> np.ndarray:
    return (
        rows[list(indices)]["pixels"]
        .combine_chunks()
        .flatten()
        .to_numpy(zero_copy_only=False)
        .reshape(-1, *shape)
        .copy()
    )


def _read_picture(pixels: Any, value_range: tuple[float, float], index: int) -> Picture:
    """As an array that can be prepared once more, in another size or another part of it."""
    values = np.moveaxis(pixels([index])[0], 0, -1)
    low, high = value_range
    return (
        values
        if values.dtype == np.uint8
        else ((values + 1) / 2 * (high - low) + low).clip(low, high)
    )


def _checksum(pixels: Any, index: int) -> int:
    return zlib.crc32(pixels([index]).tobytes())
