"""Pictures in arrays: .npy and .npz stacks, and what Python code has in memory."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqvae2.common.errors import UserError
from vqvae2.data.preprocessing import Picture, first_line
from vqvae2.data.source import ImageSource, number_classes, row_checksum

ARRAY_SUFFIXES = {".npy", ".npz"}
PythonImages = Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""{"images", "labels"} of arrays or tensors, or rows of that."""


def open_arrays(path: Path, channels: int) -> ImageSource:
    """A stack in a .npy file (read from the disk row by row), or `images` (and `labels`) in a .npz file.

    Raises:
        UserError: no such arrays.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = (
            dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
        )
    except Exception as error:  # NumPy raises many kinds for a file that is not what it seems
        raise UserError(
            f"{path} cannot be read as NumPy arrays ({first_line(error)}): check the file."
        ) from None
    alike = [
        key
        for key, array in arrays.items()
        if key not in ("images", "labels")
        and array.ndim
        and len(array) == len(arrays.get("images", ()))
    ]
    if "images" not in arrays or alike:
        raise UserError(
            f"{path} holds the arrays {list(arrays)}, but 'images' (and perhaps 'labels') is due: name them so, and leave others out."
        )
    return array_source(arrays, channels, name=str(path))


def array_source(data: PythonImages, channels: int, *, name: str = "data") -> ImageSource:
    """What Python code has: {"images", "labels"} of arrays or tensors, or an iterable of such rows (which is read whole).

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W); the labels are numbers or names, or absent.

    Raises:
        UserError: shapes that do not go together.
    """
    if not isinstance(data, Mapping):
        rows = list(data)
        if not rows:
            raise UserError(f"{name} holds no row: training needs at least one.")
        data = _stacked(rows, name)
    if "images" not in data:
        raise UserError(
            f"{name} has the keys {list(data)}, but 'images' (and perhaps 'labels') is due: name them so."
        )
    images = _one_array(data["images"], name)
    if images.ndim not in (3, 4) or not len(images):
        raise UserError(
            f"{name} has images of shape {images.shape}, but (N, H, W), (N, H, W, C) or (N, C, H, W) is due."
        )
    if (
        images.ndim == 4
        and images.shape[-1] not in (1, channels)
        and images.shape[1] in (1, channels)
    ):
        images = np.moveaxis(images, 1, -1)
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if data.get("labels") is not None:
        values = np.asarray(data["labels"])
        if values.shape != (len(images),):
            raise UserError(
                f"{name} has {len(images)} images, but labels of shape {values.shape}: give one for each image."
            )
        labels, class_names = number_classes(values.tolist(), f"{name}: labels")
    return ImageSource(
        name,
        [f"{i:09d}" for i in range(len(images))],
        partial(_read_row, images),
        partial(row_checksum, images),
        labels,
        class_names,
    )


def _stacked(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, np.ndarray]:
    keys = [key for key in ("images", "labels") if any(key in row for row in rows)]
    lacking = next(
        ((i, key) for i, row in enumerate(rows) for key in keys if row.get(key) is None), None
    )
    if lacking is not None:
        raise UserError(
            f"{name}: row {lacking[0]} has no {lacking[1]!r}, but others have: give it to every row, or to none."
        )
    return {key: _one_array([np.asarray(row[key]) for row in rows], name) for key in keys}


def _one_array(images: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(images)
    except ValueError:
        raise UserError(
            f"{name} has images of several shapes: bring them to one size, or write them to files, which may have any."
        ) from None


def _read_row(images: np.ndarray, index: int) -> Picture:
    return np.array(images[index])
