"""Sampling on CUDA, where launching kernels is what a call costs: calls are recorded as graphs.

A CUDA graph replays the same kernels on the same addresses. So positions are tensors, no shape
depends on them, and what a call changes it changes in place. Recording takes no longer than three
calls, so each batch has graphs of its own: nothing of an earlier batch, nor of weights that have
moved since, can be in them.
"""

import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The number of the call, the first position of each image's window `(B,)` and the codes just before
# its positions `(B, W)` (K before the first) to logits `(B, W, K)`. Families without windows take
# the positions in order, so that the number of the call is the position.
Stepper = Callable[[int, Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)
# Where recording has failed, this process records nothing more: parts of CUDA are left as they were
# then. The graph is kept, for even to free it may fail.
broken: list[object] = []
_one_at_a_time = threading.Lock()  # as CUDA records


def eager_stepper(prior: Any, state: Any) -> Stepper:
    """The steps of a prior as they are."""
    if prior.has_windows:
        return lambda _, first, previous: prior.step(state, first, previous)
    return lambda position, _, previous: prior.step(state, position, previous)


def fixed_stepper(prior: Any, state: Any, *, compiled: bool) -> Stepper:
    """The steps of a prior with `fixed_shapes`, as graphs need them; compiled, if wanted."""
    compiled_step = fused(_step) if compiled else _step

    def take_step(call: int, first: Tensor, previous: Tensor) -> Tensor:
        position = first if prior.has_windows else first[:1]
        if prior.starts_row(call):
            prior.start_row(state, position, previous[:, 0])
        # The first step makes the caches; from then on they stay where they are.
        return (compiled_step if call else _step)(prior, state, position, previous)

    return take_step


def _step(prior: Any, state: Any, position: Tensor, previous: Tensor) -> Tensor:
    return prior.step(state, position, previous)


def cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the work, without doing it; what is returned does it again. Raises what the work
    raises, rather than that its recording cannot be ended then."""
    graph, stream, failures = torch.cuda.CUDAGraph(), _recording_stream(device), []

    def watched() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)
            raise

    try:
        # Other threads, which copy batches to the GPU, may go on meanwhile. The outer context
        # returns to the stream from before even where the inner one fails to end.
        options: Any = {"stream": stream, "capture_error_mode": "thread_local"}
        recording = torch.cuda.graph(graph, **options)
        with _no_garbage_collection(), torch.cuda.stream(stream), recording:
            watched()
    except torch.OutOfMemoryError:  # which ends a recording in order
        graph.reset()
        raise
    except Exception as error:
        broken.append(graph)
        _release_generator(device)
        raise (failures.pop() if failures else error) from None
    return graph.replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What Python would free meanwhile (compiled kernels, older graphs) may call CUDA, which spoils
    a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _release_generator(device: torch.device) -> None:
    """Some versions of torch leave the GPU's random numbers waiting for the end of a recording that
    failed to end: a copy of the generator's state does not wait."""
    with suppress(Exception):
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that everything is recorded on, which has cuBLAS's workspace already: else each
    graph would keep one of its own."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        one = torch.ones(1, 1, device=device)
        one @ one
    return stream


def as_it_is(call: Callable[[int], None]) -> Callable[[int], None]:
    """Nothing is recorded."""
    return call


class RecordedCalls:
    """Calls of a loop, by their number, of two kinds: each kind runs twice as it is, is recorded,
    and then replayed. Where recording fails, a warning says so once, and calls stay as they are."""

    def __init__(
        self,
        call: Callable[[int], None],
        is_special: Callable[[int], bool],
        device: torch.device,
        record: Callable[[Callable[[], None], torch.device], Callable[[], None]] = cuda_graph,
    ) -> None:
        self.call, self.is_special, self.device, self.record = call, is_special, device, record
        self.runs: Counter[bool] = Counter()
        self.replays: dict[bool, Callable[[], None] | None] = {}

    def __call__(self, number: int) -> None:
        """Do call `number`, in order."""
        kind = self.is_special(number)
        self.runs[kind] += 1
        if self.runs[kind] == 3:
            self.replays[kind] = self._try_to_record(number)
        replay = self.replays.get(kind)
        if replay is None:
            self.call(number)
        else:
            replay()

    def _try_to_record(self, number: int) -> Callable[[], None] | None:
        with _one_at_a_time:
            if broken:
                return None
            try:
                return self.record(lambda: self.call(number), self.device)
            except torch.OutOfMemoryError:
                _warn_once("no memory is left to record CUDA graphs: sampling is slower.")
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                logger.warning("no CUDA graph can be recorded (%s): sampling is slower.", reason)
                broken.append(reason)
            return None


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def at(features: Tensor, index: int | Tensor) -> Tensor:
    """The slice of length 1 at an index of axis 1. If that is a tensor `(1,)`, no shape depends on
    it."""
    if isinstance(index, Tensor):
        return features.index_select(1, index)
    return features.narrow(1, index, 1)


@cache
def fused(function: Callable) -> Callable:
    """A function that is compiled at its first call; where that fails, a warning says so, and it is
    called as it is."""
    compiled: list[Callable] = [torch.compile(function, dynamic=False)]
    logger.info("compiling for each level, which may take some minutes")

    def call(*inputs: Any) -> Any:
        if compiled[0] is function:
            return function(*inputs)
        try:
            # All levels, sizes of batches and settings share one count; and a training may have
            # set the other.
            with torch._dynamo.config.patch(recompile_limit=64, suppress_errors=False):
                return compiled[0](*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every part of a compiler has its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            advice = "sampling goes on uncompiled; compiling needs Triton and a C compiler"
            logger.warning("%s cannot be compiled (%s): %s.", function.__name__, reason, advice)
            compiled[0] = function
            return function(*inputs)

    return call
