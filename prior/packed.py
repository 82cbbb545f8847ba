"""Linear layers with their weights in the order in which oneDNN reads them fastest, for sampling on a CPU.

Sampling multiplies a few rows by every weight, once per position: what it costs is reading the weights. Packed, they are read two to three
times faster; packed in bf16 there is half as much to read. The packing operators are private to torch, so they are tried before they are used.
"""

import copy
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """`x @ weight^T + bias` for `(..., in)`: the products in the weights' precision, input and output in that of the input.

    Args:
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: about how many rows will be multiplied at once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.dtype, self.rows = len(weight), dtype, rows
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), rows)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        result = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, "none", [], "")
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)


def pack_linears(module: M, rows: int, dtype: torch.dtype = torch.float32) -> M:
    """The module with packed linear layers; all else is shared with the original, which stays as it is.

    Where packing does not work (another device, another build of torch), or the layer is not in fp32, linear layers stay plain.
    """
    weight = next(module.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not can_pack(dtype):
        return module
    return _pack(module, rows, dtype)


def _pack(module: M, rows: int, dtype: torch.dtype) -> M:
    clone = copy.copy(module)
    clone._modules = {
        name: PackedLinear(child.weight, child.bias, rows, dtype) if isinstance(child, nn.Linear) else child and _pack(child, rows, dtype)
        for name, child in module._modules.items()
    }
    return clone


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products exist here and are right."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 24), (40, 24), (40,)))
    try:
        found = PackedLinear(weight, bias, 3, dtype)(x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    return bool((found - F.linear(x, weight, bias)).abs().max() < tolerance)
