"""Sampling on CUDA, where launching kernels is what a step costs: steps are recorded as graphs.

A CUDA graph replays the same kernels on the same addresses. So positions are tensors, no shape
depends on them, and the sampling state of the first batch is refilled for the batches after it,
with its copies of weights: if they changed meanwhile, sampling uses them as they are now.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

# The number of the call, the first position of each image's window `(B,)` and the codes just before
# its positions `(B, W)` (K before the first) to logits `(B, W, K)`. Families without windows take
# the positions in order, so that the number of the call is the position.
Stepper = Callable[[int, Tensor, Tensor], Tensor]
cuda_graph = partial(torch.compile, mode="reduce-overhead")
logger = logging.getLogger(__name__)


class Recordings(dict):
    """A prior's recorded steps: batch size, window and types -> state, step and start of a row, or
    None where they cannot be compiled. They are of one prior: a copy of it starts without."""

    def __reduce__(self) -> Any:
        return Recordings, ()


def eager_stepper(prior: Any, state: Any) -> Stepper:
    """The steps of a prior as they are."""
    if prior.has_windows:
        return lambda _, first, previous: prior.step(state, first, previous)
    return lambda position, _, previous: prior.step(state, position, previous)


def graphed_stepper(
    prior: Any,
    start: Callable[[], Any],
    key: tuple[int, int, torch.dtype],
    record: Callable[[Callable], Callable] = cuda_graph,
) -> Stepper:
    """The steps of a prior with `fixed_shapes` for one batch, whose sampling state `start` makes.
    `record` compiles them once per `key` (batch size, window, type of the products), and they stay
    in the prior. Where that fails, a warning says so once, and steps are taken uncompiled."""
    weight, recordings = next(prior.parameters()), vars(prior).setdefault("_recorded", Recordings())
    all_types = (*key, weight.dtype, weight.device)
    if all_types not in recordings:
        recordings[all_types] = _record(prior, start(), key[:2], record)
    if recordings[all_types] is None:
        return eager_stepper(prior, start())
    state, step, start_row = recordings[all_types]

    # Fill the state anew. A fresh one has no caches yet: those of earlier batches are emptied.
    fresh = state_tensors(start())
    for name, tensor in state_tensors(state).items():
        if name not in fresh:
            tensor.zero_()
        elif not torch._C._is_alias_of(tensor, fresh[name]):  # type: ignore[attr-defined]
            tensor.copy_(fresh[name])

    # A step copies its positions and codes to where the graph reads them, and replays it.
    width = prior.config.grids[-1][1]

    def take_step(call: int, first: Tensor, previous: Tensor) -> Tensor:
        position = first if prior.has_windows else first[:1]
        if not prior.has_windows and call % width == 0:
            start_row(position, previous[:, 0])
        return step(position, previous).clone()  # the graph writes to the same place again

    return take_step


def _record(prior: Any, state: Any, shape: tuple[int, int], record: Callable) -> Any:
    """The state, the step and the start of a row, compiled; None if that fails."""
    # The first step makes the caches; from then on no tensor of the state moves.
    level, device = prior.config.level, prior.device
    previous = torch.full(shape, prior.config.codebook_sizes[-1], device=device)
    first = torch.zeros(shape[0] if prior.has_windows else 1, dtype=torch.int64, device=device)
    prior.step(state, first if prior.has_windows else 0, previous)
    for tensor in state_tensors(state).values():
        torch._dynamo.mark_static_address(tensor, guard=False)

    # Functions of their own: Dynamo tells graphs apart by the code that they were made from.
    def step(position: Tensor, previous: Tensor) -> Tensor:
        return prior.step(state, position, previous)

    def start_row(position: Tensor, previous: Tensor) -> Tensor:
        prior.start_row(state, position, previous)
        return position + 1  # a graph without a result is a special case, which nobody tests

    # Compilers work, and fail, at the first call.
    logger.info("compiling the steps of level %d, which may take some minutes", level)
    torch._dynamo.config.recompile_limit = 64  # all levels, and sizes of batches, share one count
    step, start_row = record(step), record(start_row)
    try:
        with torch._dynamo.config.patch(suppress_errors=False):  # a training may have set it
            if not prior.has_windows:
                start_row(first, previous[:, 0])
            step(first, previous)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every part of a compiler has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = "sampling goes on uncompiled; compiling needs Triton and a C compiler"
        logger.warning("the steps of level %d cannot be compiled (%s): %s.", level, reason, advice)
        return None
    return state, step, start_row


def state_tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a sampling state by name, those of its lists, objects and modules included;
    not parameters, which are the prior's own."""
    items: Any = {}
    if isinstance(state, Tensor):
        return {} if isinstance(state, nn.Parameter) else {name: state}
    if isinstance(state, list | tuple):
        items = dict(enumerate(state))
    elif isinstance(state, dict):
        items = state
    elif isinstance(state, nn.Module) or not callable(state):  # functions hold no tensors
        items = getattr(state, "__dict__", {})
    tensors: dict[str, Tensor] = {}
    for key, value in items.items():
        tensors |= state_tensors(value, f"{name}.{key}")
    return tensors


def at(features: Tensor, index: int | Tensor, dim: int = 1) -> Tensor:
    """The slice of length 1 at an index; where that is a tensor `(1,)`, no shape depends on it."""
    if isinstance(index, Tensor):
        return features.index_select(dim, index)
    return features.narrow(dim, index, 1)


@cache
def fused(function: Callable) -> Callable:
    """A function that is compiled at its first call; where that fails, it is called as it is."""
    compiled: list[Callable] = [torch.compile(function, dynamic=False)]

    def call(*inputs: Any) -> Any:
        try:
            return compiled[0](*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every part of a compiler has its own
            logger.debug("not compiled: %s", error)
            compiled[0] = function
            return function(*inputs)

    return call
