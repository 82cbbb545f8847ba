"""Work on several threads with its results in order and little of it at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered(function: Callable[[T], R], items: Iterable[T], *, num_threads: int) -> Generator[R]:
    """Like `map`, on several threads, and never far ahead of what is taken: memory stays flat however many items there are."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 16 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
