"""Muon for the matrices within a network, AdamW for all else: one optimizer.

AdamW scales every weight's step by itself. Muon (Jordan et al. 2024) takes a layer's weights as the
matrix they are: the averaged gradient is replaced by the nearest matrix whose singular values are
all about one, so that directions in which gradients are small are learned as fast as the others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqvae2.common.accelerate import native_bf16

MOMENTUM = 0.95
# Of a polynomial a s + b s^3 + c s^5 that, applied again and again, takes singular values from
# (0, 1] to between 0.7 and 1.2 (Jordan et al. 2024): it need not be exact, but fast.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
# Steps as large as AdamW's, so that one learning rate serves both (Liu et al. 2025, section 2.2).
SIZE = 0.2


def moment_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What `MuonAdamW` keeps of each parameter of a group."""
    return ("momentum",) if group["muon"] else ("step", "exp_avg", "exp_avg_sq")


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups with `muon=True`, whose parameters `(out, in, ...)` learn by Muon."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], rate: float, **options: Any) -> None:
        super().__init__([{"muon": False, **group} for group in groups], rate, **options)
        # A gradient scaler (fp16) must itself leave out steps whose gradients are not finite.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update."""
        with self._without_muon():
            result = super().step(closure)
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a copy or `load_state_dict` gives; AdamW's part looks at its own groups."""
        self.__dict__.update(state)
        with self._without_muon():
            super().__setstate__({})

    @contextmanager
    def _without_muon(self) -> Iterator[None]:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            yield
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        # The direction is the averaged gradient, a step ahead (Nesterov), as a matrix.
        directions: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter.grad)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            ahead = parameter.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
            directions[ahead.shape].append((parameter, ahead))

        # Those of one shape together.
        for shape, items in directions.items():
            steps = orthogonalise(torch.stack([direction for _, direction in items]))
            size = SIZE * max(shape) ** 0.5 * group["lr"]
            for (parameter, _), step in zip(items, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(step.view_as(parameter), alpha=size)


def layer_weights(model: nn.Module) -> set[int]:
    """The ids of the weights of linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds)}


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices `(N, rows, columns)` to the nearest ones with singular values of about one, by a
    Newton-Schulz iteration; in bf16 where that is fast, as it need not be exact."""
    in_bf16 = matrices.dtype == torch.float32 and native_bf16()
    x = matrices.bfloat16() if in_bf16 else matrices
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS

    # Each round multiplies x from the left by a I + b S + c S^2 of the small square S = x x^T. In
    # bf16 that must be done as it stands. Else the factors are multiplied first, and S follows
    # them, so that x, which may be long, is read twice and not in each round.
    if in_bf16:
        for _ in range(ROUNDS):
            square = x @ x.mT
            x = a * x + torch.baddbmm(b * square, square, square, alpha=c) @ x
    else:
        square, one = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        product = one.expand_as(square)
        for _ in range(ROUNDS):
            factor = torch.baddbmm(a * one + b * square, square, square, alpha=c)
            product, square = factor @ product, factor @ square @ factor
        x = product @ x
    return (x.mT if is_tall else x).to(matrices.dtype)
