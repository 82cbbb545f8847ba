"""Sampling on CUDA, where launching kernels is what a step costs: steps are recorded as graphs.

A CUDA graph replays the same kernels on the same addresses. So positions are tensors, no shape
depends on them, and the sampling state of the first batch is refilled for the batches after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# A position and the codes just before it `(B,)` (K at the first) to logits `(B, K)`.
Stepper = Callable[[int, Tensor], Tensor]
cuda_graph = partial(torch.compile, mode="reduce-overhead")


def graphed_stepper(
    prior: Any,
    start: Callable[[], Any],
    key: tuple[int, torch.dtype],
    record: Callable[[Callable], Callable] = cuda_graph,
) -> Stepper:
    """The steps of a prior with `fixed_shapes` for one batch, whose sampling state `start` makes.
    `record` compiles them once per `key`, batch size and type of the products, and they stay in the
    prior until its weights change."""
    # What was recorded is of no use after the weights have changed: the state may hold copies.
    weights = [(weight.data_ptr(), weight._version) for weight in prior.parameters()]
    recorded = vars(prior).setdefault("_recorded_steps", {})  # key -> weights, state, functions
    if key not in recorded or recorded[key][0] != weights:
        # The first step makes the caches; from then on no tensor of the state moves.
        state = start()
        first = torch.full((key[0],), prior.config.codebook_sizes[-1], device=prior.device)
        prior.step(state, 0, first)
        for tensor in state_tensors(state).values():
            torch._dynamo.mark_static_address(tensor, guard=False)
        step, start_row = partial(prior.step, state), partial(prior.start_row, state)
        recorded[key] = weights, state, record(step), record(start_row)
    _, state, step, start_row = recorded[key]

    # Caches of a fresh state do not exist yet. Old ones may stay: later positions are not read.
    recorded_tensors = state_tensors(state)
    for name, tensor in state_tensors(start()).items():
        recorded_tensors[name].copy_(tensor)

    # A step copies its position and codes to where the graph reads them, and replays it.
    positions = torch.arange(prior.config.num_positions, device=prior.device)
    width = prior.config.grids[-1][1]

    def take_step(position: int, previous: Tensor) -> Tensor:
        at = positions[position : position + 1]
        if position % width == 0:
            start_row(at, previous)
        return step(at, previous).clone()  # the graph writes to the same place again

    return take_step


def state_tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a sampling state by name, those of its lists and objects included; not those
    of modules, which never change between steps, and stay where they are anyway."""
    if isinstance(state, Tensor):
        return {name: state}
    if isinstance(state, list | tuple):
        items = dict(enumerate(state))
    else:
        items = {} if isinstance(state, nn.Module) else getattr(state, "__dict__", {})
    tensors: dict[str, Tensor] = {}
    for key, value in items.items():
        tensors |= state_tensors(value, f"{name}.{key}")
    return tensors


def at(features: Tensor, index: int | Tensor, dim: int = 1) -> Tensor:
    """The slice of length 1 at an index; where that is a tensor `(1,)`, no shape depends on it."""
    if isinstance(index, Tensor):
        return features.index_select(dim, index)
    return features.narrow(dim, index, 1)
