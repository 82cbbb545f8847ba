"""What a user means by a label: a class by its name or number, or none."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any
from unicodedata import normalize

import numpy as np
from torch import Tensor

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.data.splits import few, whole_numbers

Labels = int | str | Sequence[int | str] | np.ndarray | Tensor | None
"""A class by its number or name, several of them, or none."""


def label_numbers(labels: Labels, names: Sequence[str], *, can_hide: bool) -> list[int]:
    """Class names or numbers as numbers; "none", the hidden label, is the number after the
    last class. None: all classes. Without classes, no numbers. A `UserError` names a label
    that is unknown."""
    is_one = isinstance(labels, str) or getattr(labels, "ndim", 1) == 0
    if is_one or not isinstance(labels, Iterable):
        several: list[Any] = [] if labels is None else [labels]
    else:
        several = [*labels]
    given = [one.item() if isinstance(one, np.generic | Tensor) else one for one in several]
    if given and not names:
        what = f"labels are {few(given)}, but the priors have no classes"
        raise UserError(f"{what}: leave them out.")

    # A number is a place; but a name where all names are numbers, and nothing where it is both.
    whole = whole_numbers(names)
    numbers: dict[Any, int] = {"none": len(names)} if can_hide else {}
    for place, name in enumerate(names):
        number = place if whole is None else whole[place]
        numbers |= {number: place, str(number): place, normalize("NFC", name): place}
    numbers |= {name: place for place, name in enumerate(names)}
    for number in list(numbers) if whole is None else ():
        if isinstance(number, int) and numbers[str(number)] != number:
            del numbers[number]
    places = []
    for label in given:
        key = label
        is_known = label in numbers or str(label) not in numbers
        if isinstance(label, int) and 0 <= label < len(names) and not is_known:  # deleted above
            own, other = shown(names[label]), shown(str(label))
            what = f"label {label} is the number of the class {own}, and the name of another"
            raise UserError(f"{what}: give the name, {own} or {other}.")
        if isinstance(label, str) and label not in numbers:
            key = normalize("NFC", label)
        if key not in numbers:
            allowed = "" if whole else f"a number from 0 to {len(names) - 1}, or "
            near = get_close_matches(str(label)[:100], names, n=1)
            allowed += shown(near[0]) if near else f"one of {few(names)}"
            allowed += ", or none" * can_hide
            raise UserError(f"label {shown(label)} names no class: give {allowed}.")
        places.append(numbers[key])
    return places or list(range(len(names)))
