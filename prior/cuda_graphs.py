"""Sampling for CUDA, where launching kernels is what a step costs: a step of fixed shapes is compiled into a CUDA graph, which is launched as one.

Letters: B batch, K codebook size.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from prior.base import Prior, Stepper


class StaticPrior(Prior):
    """A prior with a second way to take a step: at a position that is a tensor, in buffers of full size, so that no shape and no address depends on it.

    It is used on CUDA alone, though it gives the same logits anywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self._static_steps: dict[Any, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {}

    @abstractmethod
    def start_static(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """What `start` gives, for steps of fixed shapes: no tensor of it is ever replaced by another."""

    @abstractmethod
    def restart(self, state: Any, condition: Sequence[Tensor], labels: Tensor | None) -> None:
        """Make what `start_static` gave ready for another batch of the same size, in place: a CUDA graph replays on the same addresses."""

    @abstractmethod
    def step_static(self, state: Any, position: Tensor, previous: Tensor) -> Tensor:
        """Logits `(B, K)` at a position `(1,)`, given the code before it `(B,)` (K at the first), and `state` moved on in place."""

    def make_stepper(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        dtype: torch.dtype,
    ) -> Stepper:
        """See `Prior.make_stepper`. On CUDA: one compiled step, kept for the next batch of this size."""
        if self.device.type != "cuda":
            return super().make_stepper(batch_size, condition, labels, dtype)
        return self.make_static_stepper(
            batch_size, condition, labels, dtype, partial(torch.compile, mode="reduce-overhead")
        )

    def make_static_stepper(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        dtype: torch.dtype,
        compile_step: Callable[[Callable], Callable],
    ) -> Stepper:
        """A stepper made of `step_static`, after `compile_step`."""
        key = (batch_size, dtype, self.device)
        if key not in self._static_steps:
            state = self.start_static(batch_size, condition, labels, dtype=dtype)
            self._static_steps[key] = (state, compile_step(partial(self.step_static, state)))
        state, compiled = self._static_steps[key]
        self.restart(state, condition, labels)
        positions = torch.arange(self.config.num_positions, device=self.device)
        before_all = torch.full((batch_size,), self.config.codebook_sizes[-1], device=self.device)

        def step(position: int, previous: Tensor | None) -> Tensor:
            logits = compiled(
                positions[position : position + 1], before_all if previous is None else previous
            )
            return logits.clone()  # the graph writes its next result to the same place

        return step

    def train(self, mode: bool = True) -> Self:
        """Training changes the weights: compiled steps, which may hold copies of them, are dropped."""
        if mode:
            self._static_steps = {}
        return super().train(mode)


def hold_still(*tensors: Tensor) -> None:
    """Promise torch.compile that these tensors stay where they are.

    Those that are not parts of a module need it: else CUDA graphs copy what they read at every replay, and where one is written to, no graph is made.
    """
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
