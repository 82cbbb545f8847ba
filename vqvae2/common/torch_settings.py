"""Settings of torch that hold for the whole process, and contexts that give them back."""

import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn

Setting = tuple[Any, str, Any]  # an object, the name of an attribute, its value
cudnn: Any = torch.backends.cudnn


def set_arithmetic() -> None:
    """fp32 means fp32: on a GPU PyTorch's convolutions would round it to TF32 (10 bits), in which
    codes change. bf16 is asked for by its name. And let repeatable products be possible, if they
    are wanted: cuBLAS reads its setting once, before any of them."""
    torch.set_float32_matmul_precision("highest")
    _change(_full_precision())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class _Exact:
    """What convolutions were like before they had to be exact, and for how many contexts they still
    have to: in threads, these may overlap."""

    def __init__(self) -> None:
        self.lock, self.number = Lock(), 0
        self.before: list[Setting] = []

    def enter(self) -> None:
        with self.lock:
            self.number += 1
            if self.number == 1:
                repeatable = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
                self.before = _change([*repeatable, *_full_precision()])

    def leave(self) -> None:
        with self.lock:
            self.number -= 1
            if self.number == 0:
                _change(self.before)


_exact = _Exact()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """A context, or a decorator: on a GPU, convolutions of the same numbers give the same bits
    again (transposed ones would add up in any order), in fp32 proper. (A training that did so would
    be a third slower.)"""
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()


def use_deterministic_algorithms(wanted: bool) -> None:
    """As torch's function of this name, which imports a compiler (1.4 s), but only at a change."""
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)


@contextmanager
def settings_restored() -> Iterator[None]:
    """A context, or a decorator: afterwards random numbers (Python's, numpy's and torch's) go on
    from where they were, and torch's precision and deterministic algorithms are as before."""
    python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    products = None
    with suppress(RuntimeError):  # settings that contradict each other
        products = torch.get_float32_matmul_precision()
    others = _read([*_full_precision(), *_products()])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(ours)
        if device is not None:
            torch.cuda.set_rng_state(device)
        use_deterministic_algorithms(deterministic)
        if products is not None:
            torch.set_float32_matmul_precision(products)
        _change(others)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """A context: models are in evaluation mode; afterwards each of their parts is as it was."""
    training = [part for model in models for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _full_precision() -> Iterator[Setting]:
    """Settings with which cuDNN computes in fp32 proper: the older one, and those of torch 2.9,
    which would win."""
    yield cudnn, "allow_tf32", False
    for kind in ("conv", "rnn"):
        if hasattr(cudnn, kind):
            yield getattr(cudnn, kind), "fp32_precision", "ieee"


def _products() -> Iterator[Setting]:
    """Settings of torch 2.9 for the products of matrices, which would win over the older one."""
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        place = getattr(backend, "matmul", None)
        if hasattr(place, "fp32_precision"):
            yield place, "fp32_precision", "ieee"


def _read(settings: Iterable[Setting]) -> list[Setting]:
    """These settings as they are; without what torch does not tell, as newer ones contradict it."""
    found: list[Setting] = []
    for place, name, _ in settings:
        with suppress(RuntimeError):
            found.append((place, name, getattr(place, name)))
    return found


def _change(settings: Iterable[Setting]) -> list[Setting]:
    """Set these, and return what they were before."""
    settings = list(settings)
    before = _read(settings)
    for place, name, value in settings:
        setattr(place, name, value)
    return before
