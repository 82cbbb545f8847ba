"""How fast this machine multiplies and reads, and durations in words."""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of half a second, as others may be using the machine."""
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device).to(dtype)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < 0.5:
        times.append(timed(lambda: matrix @ matrix, device))
    return 2 * side**3 / min(times)


@lru_cache
def memory_rate(device: torch.device) -> float:
    """Bytes per second that a sum over a large tensor reads: the best of some, as above."""
    numbers = torch.ones((64 if device.type == "cpu" else 512) * 2**20, device=device)
    return numbers.nbytes / min(timed(numbers.sum, device) for _ in range(8))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a piece of work takes, once the device has finished it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def hours(seconds: float) -> str:
    """A duration in hours, or minutes if it is short."""
    number = seconds / 3600
    return (
        f"{number:,.0f} h"
        if number >= 10
        else f"{number:.1f} h"
        if number >= 1
        else f"{60 * number:.1f} min"
    )
