"""A CPU of its own for each thread that computes, and a warning when other programs use them.

The threads of an operation wait for one another at its end by spinning. While another program
keeps a CPU busy, the scheduler may put two of them on one CPU: then one spins for a whole time
slice while the one that it waits for cannot run, and this at every operation. A step of 65 ms on
2 CPUs took 270 to 2,250 ms beside one or two busy programs; with each thread bound to its own CPU,
140 to 480 ms.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
TASKS = Path("/proc/self/task")  # the threads of this process, on Linux
MUCH, SECONDS = 0.2, 10.0  # share of the time that is worth a word, and what it is taken of


_default: list[int] = []  # the number of threads before it was changed here
_others: list[int] = []  # threads that compute, or did, beside the main one


def set_threads(number: int) -> None:
    """Compute with this many threads from now on; 0: as many as before any other number."""
    if number and not _default:
        _default.append(torch.get_num_threads())
    if number or _default:
        torch.set_num_threads(number or _default.pop())

    # The first large operation starts threads, which cannot be told from others later. (The numbers
    # of those that have ended may come again.)
    _others[:] = [thread for thread in _others if (TASKS / str(thread)).exists()]
    before = set(os.listdir(TASKS) if TASKS.exists() else ())
    torch.ones(1 << 20).neg_()
    started = set(os.listdir(TASKS)) - before if before else ()
    _others.extend(int(thread) for thread in started)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """A context in which an operation computes on one thread: for as many threads, whose number it
    gives, that each compute something else. None waits for another, as in `OwnCpus`."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield number
    finally:
        torch.set_num_threads(number)


def fastest_number(seconds: Callable[[], float]) -> int:
    """The number of threads for `set_threads` with which some work, whose seconds are given, is
    fastest now: 0, or 1 if that is faster by a fifth. It is set, too."""
    if torch.get_num_threads() == 1:
        return 0
    with_all = seconds()
    set_threads(1)
    if with_all > 1.2 * seconds():
        return 1
    set_threads(0)
    return 0


class OwnCpus:
    """A context in which each computing thread is bound to a CPU; `with` it is entered for every
    step, so that threads and processes that are started between steps are not bound.

    Binds only if there is one thread per CPU and no other process of ours on this machine: else
    the scheduler does better. Turn `bind` off where a GPU computes, and where a step starts threads
    (a compiler).
    """

    def __init__(self, *, bind: bool = True) -> None:
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
        is_main = threading.current_thread() is threading.main_thread()
        self.threads: list[int] = []
        self.bind = bind
        if bind and alone and is_main and torch.get_num_threads() == len(self.cpus) > 1:
            others = [thread for thread in _others if (TASKS / str(thread)).exists()]
            threads = [threading.get_native_id(), *others]
            self.threads = threads if len(threads) == len(self.cpus) else []
        self.warned, self.started = False, (time.perf_counter(), time.process_time(), _waited())

    def __enter__(self) -> None:
        for thread, cpu in zip(self.threads, sorted(self.cpus), strict=False):
            with suppress(OSError):  # it has ended: PyTorch computes with fewer now
                os.sched_setaffinity(thread, {cpu})

    def __exit__(self, *_: object) -> None:
        for thread in self.threads:
            with suppress(OSError):
                os.sched_setaffinity(thread, self.cpus)

    def warn(self) -> None:
        """Say, once, if other processes take the CPUs. To be called now and then."""
        now = (time.perf_counter(), time.process_time(), _waited())
        seconds, used, waited = (new - old for new, old in zip(now, self.started, strict=True))
        own = used > 0.85 * seconds * (os.cpu_count() or 1)  # threads of ours wait for one another
        if self.warned or seconds < SECONDS or waited < MUCH * seconds or own:
            return
        self.warned, number = True, torch.get_num_threads()
        advice = f" On {number} threads that slows it down out of proportion: with num_threads 1"
        advice += " it may be faster (in a new output folder, for results depend on the number)."
        logger.warning(
            "Other processes keep the CPUs busy: %.0f %% of the time this one stood waiting.%s",
            100 * waited / seconds,
            advice if number > 1 and self.bind else "",
        )


def _waited() -> float:
    """Seconds that the calling thread was ready to run and did not; 0.0 where nobody counts."""
    try:
        return int((TASKS / f"{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
