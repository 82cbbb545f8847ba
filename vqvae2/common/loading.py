"""Which rows are read, and in what order: in training a function of (seed, position) alone.

So a resumed run sees the rows that it would have seen without the interruption.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import count
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from vqvae2.common.accelerate import use_cpu

SECONDS_LEFT = 30  # to a loader's process after SIGTERM
T = TypeVar("T")
R = TypeVar("R")


class Loader(Protocol):
    """What `fit` trains on: batches of this process, from any position of an endless sequence."""

    def start_at(self, index: int) -> Iterator[Any]:
        """The batches of this process from the `index`-th on, without end."""
        ...


@dataclass(eq=False)
class ShuffledLoader:
    """Batches of a map-style dataset, shuffled anew in every epoch.

    The rows of all epochs form one endless sequence: position p belongs to epoch p // N and holds
    that epoch's permutation at p % N. Batch i takes the next `batch_size` positions, and each
    process takes its share of them in rank order. So no row is dropped or repeated at the end of
    an epoch, a dataset may be smaller than a batch, and any position is reached at once.

    Args:
        dataset: rows by index, or by a list of indices through `__getitems__` (then its batch is
            returned as it is). If it has a true attribute `endless`, row i of epoch e is asked
            for by the index i + e * N, so that rows can change from epoch to epoch.
        batch_size: rows per batch over all processes.
    """

    dataset: Any
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    num_processes: int = 1
    process_index: int = 0
    num_workers: int = 0

    def start_at(self, index: int) -> Iterator[Any]:
        """The batches of this process from the `index`-th on, without end."""
        makes_batches = hasattr(self.dataset, "__getitems__")
        loader = DataLoader(
            self.dataset,
            batch_sampler=map(self.indices, count(index)),
            num_workers=self.num_workers,
            collate_fn=_as_it_is if makes_batches else default_collate,
            generator=torch.Generator(),  # not the global one, which resuming restores
            pin_memory=not use_cpu(),
            worker_init_fn=_outlive_signals,
        )
        return iter(loader)

    def indices(self, index: int) -> list[int]:
        """The rows of this process in the `index`-th batch."""
        size = len(self.dataset)
        step = size if getattr(self.dataset, "endless", False) else 0
        share = self.batch_size // self.num_processes
        first = index * self.batch_size + self.process_index * share
        rows = []
        for position in range(first, first + share):
            epoch, place = divmod(position, size)
            rows.append(int(_permutation(size, self.seed, epoch)[place]) + epoch * step)
        return rows


@lru_cache(maxsize=1)  # batch after batch is of the same epoch
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).numpy()


def _outlive_signals(worker: int) -> None:
    """Of a loader's own process: go on at what is sent to all processes of a job (Ctrl-C, a time
    limit), for the training needs its loaders until it has saved its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_wait_for_sigterm, daemon=True).start()


def _wait_for_sigterm() -> None:
    """At SIGTERM, end: at once if the training has sent it, which does so to loaders that hang
    (in C perhaps, where no handler of Python's would run); else so many seconds later."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        signal.alarm(SECONDS_LEFT)
    os._exit(0)


def _as_it_is(batch: Any) -> Any:
    return batch


def some_rows(number: int, most: int) -> list[int]:
    """At most so many of a set's rows, always the same ones, in order. They are drawn at random, as
    equal steps would meet one class again and again where classes take turns."""
    if number <= most:
        return list(range(number))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values.tolist()


def ordered(
    function: Callable[[T], R], items: Iterable[T], *, num_threads: int, ahead: int | None = None
) -> Generator[R]:
    """Like `map`, on several threads, with at most `ahead` results (16 per thread) not yet taken:
    memory stays flat. With no threads it is `map`."""
    if not num_threads:
        yield from map(function, items)
        return
    ahead = 16 * num_threads if ahead is None else ahead
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
