"""Muon for the matrices within a network, AdamW for all else: one optimizer.

AdamW scales every weight's step by itself. Muon (Jordan et al. 2024) takes a layer's weights as the
matrix they are: the averaged gradient is replaced by the nearest matrix whose singular values are
all about one, so that directions in which gradients are small are learned as fast as the others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqvae2.common.accelerate import native_bf16

MOMENTUM = 0.95
# Of a polynomial a s + b s^3 + c s^5 that, applied again and again, takes singular values from
# (0, 1] to between 0.7 and 1.2 (Jordan et al. 2024): it need not be exact, but fast.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
# Steps as large as AdamW's, so that one learning rate serves both (Liu et al. 2025, section 2.2).
SIZE = 0.2
# Matrices of up to so many rows and columns, or the other way round, take a GPU less time than to
# be told of them one by one.
SMALL = 256, 4096


def moment_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What `MuonAdamW` keeps of each parameter of a group."""
    return ("momentum",) if group["muon"] else ("step", "exp_avg", "exp_avg_sq")


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups with `muon=True`, whose parameters, of two axes or more,
    learn by Muon as matrices: the first axis against all others."""

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
        # The direction is the averaged gradient, a step ahead (Nesterov).
        learned = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not learned:
            return
        gradients = [cast(Tensor, parameter.grad) for parameter in learned]
        momenta = []
        for parameter, gradient in zip(learned, gradients, strict=True):
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            momenta.append(state["momentum"])
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)

        # Matrices are made orthogonal together.
        rate = group["lr"]
        torch._foreach_mul_(learned, 1 - rate * group["weight_decay"])
        batches: dict[Any, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter, direction in zip(learned, directions, strict=True):
            matrix = direction.flatten(1)
            batches[_batch_of(matrix)].append((parameter, matrix))
        for items in batches.values():
            steps = orthogonalise_each([matrix for _, matrix in items])
            for (parameter, matrix), step in zip(items, steps, strict=True):
                size = SIZE * max(matrix.shape) ** 0.5 * rate
                parameter.sub_(step.reshape(parameter.shape), alpha=size)


def layer_weights(model: nn.Module) -> set[int]:
    """The ids of the weights of linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds)}


def _batch_of(matrix: Tensor) -> Any:
    """What those have in common that are computed together: on a CPU the shape; elsewhere, where
    each operation takes its time however small it is, all small ones belong together."""
    is_small = min(matrix.shape) <= SMALL[0] and max(matrix.shape) <= SMALL[1]
    shape = "small" if is_small and matrix.device.type != "cpu" else matrix.shape
    return shape, matrix.dtype, matrix.device


def orthogonalise_each(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` of matrices of any shapes, in one go: lying on their side where they are
    tall, and with zeros around them, which change nothing."""
    if len({matrix.shape for matrix in matrices}) == 1:
        return list(orthogonalise(torch.stack(matrices)))
    wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    rows, columns = (max(matrix.shape[side] for matrix in wide) for side in (0, 1))
    padded = wide[0].new_zeros(len(wide), rows, columns)
    places = [x[: len(matrix), : matrix.shape[1]] for x, matrix in zip(padded, wide, strict=True)]
    for place, matrix in zip(places, wide, strict=True):
        place.copy_(matrix)
    done = orthogonalise(padded)
    result = []
    for x, matrix in zip(done, matrices, strict=True):
        rows, columns = matrix.shape
        result.append(x[:columns, :rows].mT if rows > columns else x[:rows, :columns])
    return result


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices `(N, rows, columns)` to the nearest ones with singular values of about one, by a
    Newton-Schulz iteration; in bf16 where that is fast, as it need not be exact."""
    in_bf16 = matrices.dtype == torch.float32 and native_bf16(matrices.device.type)
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
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
            x = torch.baddbmm(x, factor, x, beta=a)
    else:
        square, one = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        product = one.expand_as(square)
        for _ in range(ROUNDS):
            factor = torch.baddbmm(a * one + b * square, square, square, alpha=c)
            product, square = factor @ product, factor @ square @ factor
        x = product @ x
    return (x.mT if is_tall else x).to(matrices.dtype)
