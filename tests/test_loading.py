"""The order of training rows: shuffled, shared between processes, and reachable at any position."""

from itertools import chain, islice

import pytest
import torch

from vqvae2.common.loading import ShuffledLoader, StreamLoader


class Rows(torch.utils.data.Dataset):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return index


class Stream:
    """Rows that come in another order in each epoch."""

    def __init__(self, number: int) -> None:
        self.number, self.epoch = number, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(i + 3 * self.epoch) % self.number for i in range(self.number)])


def take(loader, start: int, number: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return [batch.tolist() for batch in islice(loader.start_at(start), number)]


LOADERS = {
    "map": lambda **o: ShuffledLoader(Rows(10), 4, **o),
    "stream": lambda **o: StreamLoader(Stream(10), 4, **o),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_epoch_gives_each_row_once(kind: str) -> None:
    rows = list(chain.from_iterable(take(LOADERS[kind](), 0, 10)))  # four epochs
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


@pytest.mark.parametrize("kind", LOADERS)
def test_starting_anywhere_continues_the_same_order(kind: str) -> None:
    whole = take(LOADERS[kind](), 0, 12)
    for start in range(12):
        assert take(LOADERS[kind](), start, 12 - start) == whole[start:]


@pytest.mark.parametrize("kind", LOADERS)
def test_two_processes_share_each_batch_of_one(kind: str) -> None:
    first, second = (take(LOADERS[kind](num_processes=2, process_index=r), 0, 12) for r in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == take(LOADERS[kind](), 0, 12)


def test_seeds_differ_and_a_dataset_may_be_smaller_than_a_batch() -> None:
    assert take(ShuffledLoader(Rows(10), 4, seed=1), 0, 3) != take(
        ShuffledLoader(Rows(10), 4), 0, 3
    )
    assert sorted(take(ShuffledLoader(Rows(3), 6), 0, 1)[0]) == [0, 0, 1, 1, 2, 2]


def test_worker_processes_change_nothing() -> None:
    assert take(ShuffledLoader(Rows(10), 4, num_workers=2), 3, 6) == take(
        ShuffledLoader(Rows(10), 4), 3, 6
    )


def test_an_empty_stream_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ValueError, match="no row"):
        next(StreamLoader([], 2).start_at(0))
