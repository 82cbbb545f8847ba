"""Linear layers with their weights in the order in which oneDNN reads them fastest, for sampling on a CPU.

Sampling multiplies a few rows by every weight, once per position: what it costs is reading the weights. Packed, they are read two to three
times faster; packed in bf16 there is half as much to read. The packing operators are private to torch, so they are tried before they are used.
"""

import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear(nn.Module):
    """`x @ weight^T + bias` for `(..., in)`, the products in `dtype`, input and output in the input's type. For inference alone.

    Where packing does not work (another device, another build of torch, weights that are not fp32) it is a plain linear layer; on CUDA with its
    weights in `dtype`.

    Args:
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: how many rows will be multiplied at once, all leading dimensions together; other numbers are slower, not wrong.
        dtype: fp32 or bf16.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.dtype, self.packed = (
            dtype,
            weight.device.type == "cpu" and weight.dtype == torch.float32 and can_pack(dtype),
        )
        self.cast = self.packed or (weight.device.type == "cuda" and dtype != torch.float32)
        if self.packed:
            self.weight = _pack(self.weight, rows, dtype)
        elif self.cast:
            self.weight = self.weight.to(dtype)
        if self.cast and self.bias is not None:
            self.bias = self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        multiply = _multiply if self.packed else F.linear
        return multiply(x.to(self.dtype) if self.cast else x, self.weight, self.bias).to(x.dtype)


def pack_linears(module: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module with packed linear layers; all else is shared with the original, which stays as it is."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias, rows, dtype)
    clone = copy.copy(module)
    clone._modules = {
        name: child and pack_linears(child, rows, dtype) for name, child in module._modules.items()
    }
    return clone


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products exist here and are right."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((3, 24), (40, 24), (40,))
    )
    try:
        found = _multiply(x.to(dtype), _pack(weight, 3, dtype), bias.to(dtype)).float()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    return bool((found - F.linear(x, weight, bias)).abs().max() < tolerance)


def _pack(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), rows)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
