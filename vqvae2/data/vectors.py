"""What images are conditioned on besides a class: a vector each, of numbers or of attributes."""

import io
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.common.vocabulary import LONGEST_VECTOR
from vqvae2.data.decoding import readable
from vqvae2.data.splits import check_names, few

logger = logging.getLogger(__name__)
ONE_KIND = "fill all rows in one way: a number, or as many floats in each, or a list of names"


@dataclass(frozen=True)
class Vectors:
    """A vector for each row of a table."""

    values: np.ndarray
    """`(N, V)` float32."""
    names: tuple[str, ...] = ()
    """Of attributes, those that the V places stand for (1: the image has it; 0: it has not)."""

    @property
    def size(self) -> int:
        """V."""
        return self.values.shape[1]

    def choose(self, rows: Sequence[int]) -> "Vectors":
        """Those of these rows alone."""
        return Vectors(self.values[list(rows)], self.names)

    def placed_as(self, train: "Vectors", source: str) -> "Vectors":
        """These vectors, of the held-out images `source`, with each attribute at its place in the
        training images' vectors; those that are unknown there are left out. Raises a `UserError`
        for vectors of another kind or length."""
        if bool(self.names) != bool(train.names) or not (self.names or self.size == train.size):
            kinds = [f"{len(v.names)} attributes" if v.names else v.size for v in (self, train)]
            what = (
                f"{source} has condition vectors of {kinds[0]}, but the training images {kinds[1]}"
            )
            raise UserError(f"{what}: give the same column to both.")
        if self.names == train.names:
            return self
        if unknown := [name for name in self.names if name not in train.names]:
            logger.info("%s: no training image has the attributes %s.", source, few(unknown))
        values = np.zeros((len(self.values), train.size), np.float32)
        for place, name in enumerate(train.names):
            if name in self.names:
                values[:, place] = self.values[:, self.names.index(name)]
        return Vectors(values, train.names)


def read_vectors(cells: Sequence[Any], source: str) -> Vectors:
    """The vectors of a column: a number or as many floats in each row, as they are; names (or whole
    numbers) in lists, as many or few as there are, as attributes. Text is read as JSON, or as names
    between semicolons. Raises a `UserError` for a row without, or of another kind or length."""
    # Rows as lists, of which the kind of all elements decides.
    column = f"{source}: the condition column"
    rows: list[list[Any]] = []
    of_names = any(isinstance(cell, str) and ";" in cell for cell in cells)
    for cell in cells:
        if (row := _as_list(cell, of_names=of_names)) is None:
            what = f"{column} is {shown(cell)} in row {len(rows)}"
            raise UserError(f"{what}: {ONE_KIND}.")
        rows.append(row)
    kinds = {type(value) for value in chain.from_iterable(rows)}
    if kinds & {float, bool}:
        sizes = {len(row) for row in rows}
        if not kinds <= {float, int, bool} or len(sizes) != 1:
            kind = [len(rows[0]), str in map(type, rows[0])]
            same = [[len(row), str in map(type, row)] == kind for row in rows]
            other = same.index(False) if False in same else len(rows) - 1
            one, another = (shown(row) if row else "nothing" for row in (rows[0], rows[other]))
            what = f"{column} holds {one} in row 0, but {another} in row {other}"
            raise UserError(f"{what}: {ONE_KIND}.")
        values = np.array(rows, np.float32)
        if not np.isfinite(values).all():
            number = int((~np.isfinite(values).all(axis=1)).argmax())
            raise UserError(f"{column} is not finite in row {number}: correct it.")
        names: tuple[str, ...] = ()
    else:
        # Attributes, sorted; numbers as numbers. None has an attribute twice.
        if len(kinds) > 1 or not kinds:
            found = "names and numbers" if kinds else "no name in any row"
            raise UserError(f"{column} holds {found}: {ONE_KIND}.")
        for number, row in enumerate(rows):
            if len(set(row)) < len(row):
                what = f"{column} holds {shown(row)} in row {number}: as attributes, one is twice"
                raise UserError(f"{what}. Write values with a point (1.0), attributes once.")
        known = sorted(set(chain.from_iterable(rows)))
        names = tuple(map(str, known))
        check_names(names, column)
        values = np.zeros((len(rows), len(known[: LONGEST_VECTOR + 1])), np.float32)
        places = {value: place for place, value in enumerate(known)}
        if len(known) <= LONGEST_VECTOR:
            for number, row in enumerate(rows):
                values[number, [places[value] for value in row]] = 1
    if not 1 <= values.shape[1] <= LONGEST_VECTOR:
        what = f"{column} makes vectors of length {len(names) or values.shape[1]:,}"
        raise UserError(f"{what}: give between 1 and {LONGEST_VECTOR:,} numbers or names.")
    return Vectors(values, names)


def read_vector(cell: Any, source: str) -> np.ndarray:
    """The vector `(V,)` float32 of a row of a stream: a number or a list of numbers, or the bytes
    of a .npy file of them. (A stream has no attributes, for they are known only at its end.)
    Raises a `UserError` for anything else."""
    if cell is None:
        raise UserError(f"{source} has no condition: add it, or correct data.condition_column.")
    if isinstance(cell, bytes):
        with readable(source, "read as a condition"):
            cell = np.load(io.BytesIO(cell), allow_pickle=False)
    values = _as_list(cell, of_names=False)
    if values is None or any(isinstance(value, str) for value in values):
        what = f"{source} has the condition {shown(cell)}"
        raise UserError(f"{what}: of a stream it must be a number or a list of numbers.")
    vector = np.array(values, np.float32)
    if not (1 <= len(vector) <= LONGEST_VECTOR and np.isfinite(vector).all()):
        what = f"{source} has a condition of {len(vector):,} values, or one that is not finite"
        raise UserError(f"{what}: give between 1 and {LONGEST_VECTOR:,} numbers.")
    return vector


def _as_list(cell: Any, *, of_names: bool) -> list[Any] | None:
    """A cell as a list of numbers or of texts; None if it is neither. In a column `of_names` text
    that is no JSON list is names."""
    if isinstance(cell, str):
        text, cell = cell, [name.strip() for name in cell.split(";") if name.strip()]
        with suppress(ValueError):
            parsed = json.loads(text)
            cell = cell if of_names and not isinstance(parsed, list) else parsed
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    with suppress(OverflowError):
        cell = [float(cell)] if type(cell) in (int, float) else cell
    is_list = isinstance(cell, list | tuple)
    if not is_list or not all(type(value) in (int, float, bool, str) for value in cell):
        return None
    return list(cell)
