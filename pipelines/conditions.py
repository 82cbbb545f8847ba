"""What a user means by a condition: numbers, or names of attributes, or a file of either."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.artifact import content_hash
from vqvae2.common.config import shown, suggest
from vqvae2.common.errors import UserError
from vqvae2.common.vocabulary import describe_vectors
from vqvae2.data.decoding import readable

CONDITIONS_NAME = "conditions.npy"


def read_conditions(file: str | None, attributes: Sequence[str]) -> Any:
    """What `as_vectors` takes, of a file (.npy: an array `(N, V)`; .jsonl: in each line a list of
    numbers or of names), or of attributes that all images have; None of neither. Raises a
    `UserError` for a file of another kind, or both."""
    if file is None:
        return [list(attributes)] if attributes else None
    if attributes:
        raise UserError("--conditions and --attributes are both given: give one of them.")
    path = Path(file)
    if path.suffix not in (".npy", ".jsonl"):
        raise UserError(f"{file} is no .npy or .jsonl file: write the conditions as one of these.")
    with readable(file, "read as conditions"):
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def as_vectors(conditions: Any, size: int, names: Sequence[str], *, can_hide: bool) -> Any:
    """Conditions as float32 vectors `(N, V)`, or None for hidden ones.

    Args:
        conditions: a tensor or array `(N, V)` or `(V,)`, in which a row of NaN is hidden; or for
            each image a list of numbers, or of names of attributes; or None.
        size: V, the length of the priors' vectors; 0 where they have none.
        names: of attributes, what the places of a vector stand for.
        can_hide: whether the priors do without.

    Raises:
        UserError: conditions that the priors do not know, or none where they need some.
    """
    # Whether there may be any, and must be.
    if conditions is None:
        if size and not can_hide:
            raise UserError("the priors cannot do without conditions: give one, or several.")
        return None
    if not size:
        raise UserError("conditions are given, but the priors were trained without: omit them.")
    expected = f"{describe_vectors(size, names)}, which the priors were trained with"
    if isinstance(conditions, list | tuple) and conditions and not _are_numbers(conditions):
        if any(not isinstance(row, list | tuple) for row in conditions):
            what = f"the conditions begin with {shown(conditions[0])}"
            raise UserError(f"{what}: give a list of numbers, or of names, for each image.")
        conditions = [_named(row, size, names) for row in conditions]

    # Numbers, as many as there must be.
    for i, row in enumerate(conditions if isinstance(conditions, list | tuple) else []):
        if isinstance(row, list | tuple) and len(row) != size:
            raise UserError(f"condition {i} (from 0) has {len(row)} numbers: give {expected}.")
    try:
        given = torch.as_tensor(conditions)
        if given.is_complex():
            raise TypeError
        vectors = given.detach().cpu().to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        what = f"the conditions {shown(conditions)} are no rows of numbers"
        raise UserError(f"{what}: give {expected}.") from None
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim and not len(vectors):
        raise UserError(f"there are no conditions: give {expected}.")
    if vectors.ndim != 2 or vectors.shape[1] != size:
        shape = tuple(vectors.shape)
        raise UserError(f"the conditions have the shape {shape}: give {expected}.")

    # Which rows are hidden, and which are no vectors.
    hidden = vectors.isnan().all(dim=1)
    faults = {"is not finite in float32": ~hidden & ~vectors.isfinite().all(dim=1)}
    if not can_hide:
        faults["is hidden, but the priors need one"] = hidden
    for fault, rows in faults.items():
        if rows.any():
            raise UserError(f"condition {int(rows.nonzero()[0])} (from 0) {fault}: correct it.")
    return vectors


def _are_numbers(row: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in row)


def _named(row: Sequence[Any], size: int, names: Sequence[str]) -> list[float]:
    """A list of numbers as it is, one of names as a vector of 0 and 1."""
    if not all(isinstance(value, str | int | float) for value in row):
        raise UserError(f"a condition is {shown(row)}: give numbers, or names of attributes.")

    if not names and not _are_numbers(row):
        what = f"a condition is {shown(row)}, but the priors know no attributes"
        raise UserError(f"{what}: give {describe_vectors(size)}.")

    # Where attributes are named by numbers, values are 0 and 1, or written with a point.
    is_row = _are_numbers(row) and len(row) == size
    is_row &= set(row) <= {0, 1} or any(isinstance(value, float) for value in row)
    if is_row or not names:
        return list(row)
    unknown = [name for name in row if str(name) not in names]
    if unknown:
        what = f"no attribute is named {shown(unknown[0])}"
        raise UserError(f"{what} ({suggest(str(unknown[0]), names)}).")
    given = set(map(str, row))
    return [float(name in given) for name in names]


def vectors_hash(vectors: Tensor | None) -> str | None:
    """A hash of vectors, if there are any."""
    return None if vectors is None else content_hash({}, [("vectors", vectors)])


def as_numbers(vector: Tensor) -> tuple[float, ...] | None:
    """A vector `(V,)` as short numbers that are the same in float32; None if it is hidden."""
    values = vector.numpy()
    return None if np.isnan(values).all() else tuple(float(str(value)) for value in values)
