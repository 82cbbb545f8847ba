"""Images that are arrays: of a file, or given from Python."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vqvae2.common.config import suggest
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig
from vqvae2.data.decoding import readable
from vqvae2.data.sources import Sources, make_table, numbered
from vqvae2.data.stream import NO_LABELS, named_columns

PythonImages = Mapping[str, Any] | Iterable[Mapping[str, Any]] | Dataset[Any] | np.ndarray | Tensor
"""{"images", "labels", "conditions"} of arrays or tensors, rows of that (also as a dataset of
torch's), or the images alone."""

ARRAYS = ("images", "labels", "conditions")
MOST_BANDS = 4  # of an image; no image is so narrow


def open_array_file(path: Path, channels: int, columns: ImagesConfig) -> Sources:
    """A stack in a .npy file (mapped from the disk), or `images` (and `labels`, and a condition
    column) in a .npz file, by these names or those of the columns."""
    with readable(str(path), "read as arrays"):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        is_archive = isinstance(loaded, np.lib.npyio.NpzFile)
        arrays = dict(loaded.items()) if is_archive else {"images": loaded}
    names, ignored = list(arrays), columns.label_column == NO_LABELS
    if columns.condition_column is not None:
        found = arrays.pop(columns.condition_column, None)
        arrays.pop("conditions", None)
        arrays |= {} if found is None else {"conditions": found}
    for key, column in named_columns(columns).items():
        if column not in arrays:
            what = f"{path} has the arrays {list(arrays)}, but no {key} column {column!r}"
            raise UserError(f"{what} ({suggest(column, arrays)}): correct --data.{key}-column.")
        arrays[f"{key}s"] = arrays.pop(column)
    number = len(np.atleast_1d(arrays.get("images", ())))
    for name, array in arrays.items():
        if name not in ARRAYS and array.ndim and len(array) == number and not ignored:
            what = f"{path} holds the arrays {names}, of which {name!r} is unknown"
            advice = "name them 'images' and 'labels', say --data.condition-column, or leave it out"
            raise UserError(f"{what}: {advice}.")
    if "images" in arrays:
        arrays = {name: array for name, array in arrays.items() if name in ARRAYS}
    return open_arrays(arrays, channels, str(path), [path])


def open_arrays(
    data: PythonImages, channels: int, name: str, files: Sequence[Path] = ()
) -> Sources:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), and perhaps labels (numbers or names) and
    conditions (an array (N, V), or see `read_vectors`)."""
    # Rows become arrays.
    if isinstance(data, np.ndarray | Tensor):
        data = {"images": data}
    if not isinstance(data, Mapping):
        data = _columns(_rows(data, name), name)
    _check_keys(list(data), name)
    try:
        images = _as_array(data["images"])
    except ValueError:
        raise UserError(f"{name} has images of several shapes: resize them to one.") from None
    if not images.size:
        raise UserError(f"{name} holds no image: give some.")
    if images.ndim == 3 and images.shape[-1] <= MOST_BANDS:
        what = f"{name} has images of shape {images.shape}: that is one image"
        raise UserError(f"{what}; give {(1, *images.shape)}, by array[None].")
    if images.ndim not in (3, 4):
        expected = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise UserError(f"{name} has images of shape {images.shape}: reshape them to {expected}.")
    is_last = images.ndim == 3 or images.shape[-1] in (1, channels)
    if not is_last and images.shape[1] in (1, channels):
        images = np.moveaxis(images, 1, -1)

    # One label each, or none.
    labels = None
    if data.get("labels") is not None:
        values = _as_array(data["labels"])
        if values.shape != (len(images),):
            what = f"{name} has {len(images)} images, but labels of shape {values.shape}"
            raise UserError(f"{what}: give one for each image.")
        labels = (values.tolist(), f"{name}: labels", None)
    conditions = data.get("conditions")
    if conditions is not None:
        conditions = _as_values(conditions)
        if len(conditions) != len(images):
            what = f"{name} has {len(images)} images, but {len(conditions)} conditions"
            raise UserError(f"{what}: give one for each image.")
    options: Any = {"files": files, "conditions": conditions}
    return make_table(name, numbered(len(images)), images, labels=labels, **options)


def _rows(data: Any, name: str) -> list[Mapping[str, Any]]:
    """All rows; of a dataset of torch's with numbered rows, which has a length, but no end."""
    is_stream = isinstance(data, IterableDataset)
    has_length = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not is_stream
    rows = [data[i] for i in range(len(data))] if has_length else list(data)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            what = f"{name}: row {i} is of type {type(row).__name__}"
            raise UserError(f'{what}, but must be a mapping, such as {{"images": ...}}.')
    return rows


def _columns(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[Any]]:
    """The values of each key that a row has."""
    if not rows:
        raise UserError(f"{name} holds no image: give some.")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    _check_keys(keys, name)
    for i, row in enumerate(rows):
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            raise UserError(f"{name}: row {i} has no {missing[0]!r}, but others have: add it.")
    return {key: [row[key] for row in rows] for key in keys}


def _check_keys(keys: Sequence[Any], name: str) -> None:
    if "images" not in keys:
        raise UserError(f"{name} has the keys {keys}, but 'images' is missing: add it.")
    if unknown := [key for key in keys if key not in ARRAYS]:
        what = f"{name} has the key {unknown[0]!r}, which is unknown: leave it out"
        raise UserError(f"{what} ({suggest(unknown[0], ARRAYS)}).")


def _as_array(values: Any) -> np.ndarray:
    """Arrays, tensors and lists of such as one array."""
    if isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
        values = [_as_array(value) for value in values]
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def _as_values(conditions: Any) -> Any:
    """Arrays and tensors of whole numbers, and rows of such, as floats: they are no attributes."""
    if hasattr(conditions, "dtype"):
        values = _as_array(conditions)
        return values.astype(float) if values.dtype.kind in "iub" else values
    is_list = isinstance(conditions, list | tuple)
    return [_as_values(row) for row in conditions] if is_list else conditions
