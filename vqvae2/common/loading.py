"""The order in which training sees its rows: a function of (seed, position) alone, so that a resumed run sees what it would have."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate


class Loader(Protocol):
    """What `fit` trains on: batches of this process, from any position of the endless stream."""

    def start_at(self, index: int) -> Iterator[Any]:
        """The batches of this process from the `index`-th on, without end."""
        ...


class ShuffledLoader:
    """Batches of a map-style dataset, shuffled anew in every epoch.

    The rows of all epochs form one endless sequence: position p is in epoch p // N and holds that epoch's permutation at p % N.
    Batch i of all processes together is the i-th run of `batch_size` positions, and each process takes its part of it in rank order:
    no row is dropped or repeated at the end of an epoch, a dataset may be smaller than a batch, and any position is reached at once.

    Args:
        dataset: rows by index, or by a list of indices through `__getitems__` (then the whole batch is returned as it is). One with a true
            attribute `endless` is asked for row i of epoch e by the index i + e * N, so that it can change rows from epoch to epoch.
        batch_size: rows per batch over all processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.num_workers = (
            dataset,
            batch_size,
            seed,
            num_workers,
        )
        self.num_processes, self.process_index = num_processes, process_index

    def start_at(self, index: int) -> Iterator[Any]:
        """The batches of this process from the `index`-th on, without end."""
        whole = hasattr(self.dataset, "__getitems__")
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=_Positions(self, index),
                num_workers=self.num_workers,
                collate_fn=_as_it_is if whole else default_collate,
                generator=torch.Generator(),  # the loader draws a seed from it: not from the global one, which resuming restores
                pin_memory=torch.cuda.is_available(),
            )
        )

    def indices(self, index: int) -> list[int]:
        """The rows of this process in the `index`-th batch."""
        share = self.batch_size // self.num_processes
        first = index * self.batch_size + self.process_index * share
        size = len(self.dataset)  # type: ignore[arg-type]
        step = size if getattr(self.dataset, "endless", False) else 0
        return [
            int(self._permutation(p // size)[p % size]) + p // size * step
            for p in range(first, first + share)
        ]

    def _permutation(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = torch.randperm(len(self.dataset), generator=generator).numpy()  # type: ignore[arg-type]
            self._cached_epoch = epoch
        return self._cached


def _as_it_is(batch: Any) -> Any:
    return batch


class _Positions:
    def __init__(self, loader: ShuffledLoader, index: int) -> None:
        self.loader, self.index = loader, index

    def __iter__(self) -> Iterator[list[int]]:
        index = self.index
        while True:
            yield self.loader.indices(index)
            index += 1


class StreamLoader:
    """Batches of an iterable of rows (mappings of tensors or numbers), read again from its start in every epoch.

    Every process reads the whole stream and keeps its part of each batch; resuming reads, and throws away, what was seen.
    If the stream has a method `set_epoch`, it is called before each epoch.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.num_processes, self.process_index = num_processes, process_index

    def start_at(self, index: int) -> Iterator[Any]:
        """The batches of this process from the `index`-th on, without end."""
        share = self.batch_size // self.num_processes
        mine = range(self.process_index * share, (self.process_index + 1) * share)
        kept: list[Any] = []
        for position, row in enumerate(self._rows()):
            batch, place = divmod(position, self.batch_size)
            if batch >= index and place in mine:
                kept.append(row)
                if len(kept) == share:
                    yield default_collate(kept)
                    kept = []

    def _rows(self) -> Iterator[Any]:
        epoch = 0
        while True:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:
                raise ValueError("the stream gave no row; training needs at least one")
            epoch += 1
