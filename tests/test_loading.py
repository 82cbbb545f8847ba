"""The order of training rows: shuffled, shared between processes, reachable at any position."""

import ctypes
import multiprocessing
import signal
import subprocess
import time
from itertools import chain, islice

import pytest
from torch.utils.data import Dataset

from vqvae2.common.loading import ShuffledLoader, ordered, some_rows


class Rows(Dataset):
    """The numbers from 0 on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return index


def take(start: int, number: int, *, rows: int = 10, **options: int) -> list[list[int]]:
    """Some batches of four of ten rows."""
    loader = ShuffledLoader(Rows(rows), 4, **options)
    return [batch.tolist() for batch in islice(loader.start_at(start), number)]


def test_each_epoch_gives_each_row_once_in_another_order() -> None:
    rows = list(chain.from_iterable(take(0, 10)))  # four epochs
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_starting_anywhere_continues_the_same_order() -> None:
    whole = take(0, 12)
    for start in range(12):
        assert take(start, 12 - start) == whole[start:]


def test_two_processes_share_each_batch_of_one() -> None:
    first, second = (take(0, 12, num_processes=2, process_index=rank) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == take(0, 12)


def test_seeds_differ() -> None:
    assert take(0, 3, seed=1) != take(0, 3)


def test_some_rows_are_of_all_classes_where_these_take_turns() -> None:
    rows = some_rows(2000, 100)
    assert rows == sorted(set(rows)) == some_rows(2000, 100)
    assert len(rows) == 100
    assert {row % 10 for row in rows} == set(range(10))
    assert some_rows(7, 100) == some_rows(7, 7) == list(range(7))


def test_a_dataset_may_be_smaller_than_a_batch() -> None:
    assert sorted(chain.from_iterable(take(0, 3, rows=3))) == sorted([0, 1, 2] * 4)


def test_worker_processes_change_nothing() -> None:
    assert take(3, 6, num_workers=2) == take(3, 6)


class Slow(Dataset):
    """Rows that take a while."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.1)
        return index


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loaders_outlive_a_signal_to_all_processes_of_a_job(number: int) -> None:
    """A training, which gets it too, needs them until its state is saved. (From the training alone
    SIGTERM would mean the end.)"""
    expected = [batch.tolist() for batch in islice(ShuffledLoader(Slow(), 2).start_at(0), 8)]
    batches = ShuffledLoader(Slow(), 2, num_workers=2).start_at(0)
    found = [next(batches).tolist()]
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    found += [batch.tolist() for batch in islice(batches, 7)]
    assert found == expected


class Stuck(Slow):
    """Its processes hang in C, where no handler of Python's runs."""

    def __getitem__(self, index: int) -> int:
        if index % 2:
            mutex = ctypes.create_string_buffer(64)
            lock = ctypes.CDLL(None).pthread_mutex_lock
            lock(mutex)
            lock(mutex)
        return index


def test_loaders_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    batches = ShuffledLoader(Stuck(), 2, num_workers=1).start_at(0)
    (worker,) = multiprocessing.active_children()
    del batches
    worker.join(5)
    assert not worker.is_alive()


def test_work_on_threads_keeps_its_order_and_never_runs_far_ahead() -> None:
    numbers = iter(range(1000))
    results = ordered(lambda number: -number, numbers, num_threads=2)
    assert [next(results) for _ in range(10)] == [-number for number in range(10)]
    assert next(numbers) < 50
