"""The shape of a check: a name, what was seen, and what to do where it fails."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Finding(NamedTuple):
    """What a check saw and, where it failed, what to do."""

    name: str
    passed: bool
    message: str


class Failed(Exception):
    """What a check saw that must not be."""


def check(name: str, advice: str) -> Callable[[Callable[..., str | None]], Callable[..., Any]]:
    """Make a check, which returns a `Finding` or None, of a function that returns what it saw or
    None (nothing to check), or raises `Failed`. In `name`, {1} is the second argument."""

    def decorate(function: Callable[..., str | None]) -> Callable[..., Any]:
        @functools.wraps(function)
        @torch.no_grad()
        def checked(*inputs: Any) -> Finding | None:
            try:
                seen = function(*inputs)
            except Failed as failure:
                return Finding(name.format(*inputs), False, f"{failure}. {advice}")
            return None if seen is None else Finding(name.format(*inputs), True, f"{seen}.")

        return checked

    return decorate
