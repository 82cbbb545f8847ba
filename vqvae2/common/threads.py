"""Work on several threads with its results in order and little of it at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered(
    function: Callable[[T], R], items: Iterable[T], *, num_threads: int, ahead: int | None = None
) -> Generator[R]:
    """Like `map`, on several threads, with at most `ahead` results (16 per thread) not yet taken:
    memory stays flat however many items there are."""
    ahead = 16 * num_threads if ahead is None else ahead
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
