"""RMSNorm (Zhang and Sennrich 2019) whose training costs little on a CPU.

PyTorch has a kernel of its own for it on CUDA; on a CPU it is a chain of products, whose gradients
took a fifth of a prior's training step. LayerNorm, which has a kernel there, has nearly the same
gradient: RMSNorm's is that of LayerNorm with a mean of 0, plus what LayerNorm takes off because
its mean moves with its input.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, W."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., W)` to the same shape."""
        return rms_norm(x, self.weight)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, of `(..., W)` over W; eps is that of the type."""
    same_type = weight is None or weight.dtype == x.dtype
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not same_type:
        return F.rms_norm(x, x.shape[-1:], weight)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight)
    return _normalise(x, weight)[0]


def _normalise(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms."""
    inverse = x.square().mean(dim=-1, keepdim=True).add_(torch.finfo(x.dtype).eps).rsqrt_()
    normalised = x * inverse
    return normalised if weight is None else normalised.mul_(weight), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.contiguous()
        normalised, inverse = _normalise(x, weight)
        ctx.save_for_backward(x, inverse, weight)
        return normalised

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        # The gradient of LayerNorm, were the mean 0 and fixed.
        (gradient,), (x, inverse, weight) = gradients, ctx.saved_tensors
        gradient, width, learned = gradient.contiguous(), x.shape[-1], weight is not None
        factors = weight if learned else torch.ones_like(x[(0,) * (x.ndim - 1)])
        zero = torch.zeros_like(inverse)
        needed = [True, learned, False]
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, [width], zero, inverse, factors, None, needed
        )
        # It subtracts the mean of the gradient, as LayerNorm would: put that back.
        to_x += (gradient @ factors)[..., None] * (inverse / width)
        return to_x, to_weight
