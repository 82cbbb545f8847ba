"""Linear layers with weights in the order that oneDNN reads fastest, for sampling on a CPU.

A sampling step multiplies a few rows by every weight: what it costs is reading the weights. Packed,
they are read two to three times faster; in bf16 there is half as much to read. The operators are
private to torch, so they are tried before they are used.
"""

import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear(nn.Module):
    """`x @ weight^T + bias` for `(..., in)`, the products in `dtype`; for inference alone.

    Where packing does not work (other devices, other builds of torch, weights that are not fp32) it
    is a plain linear layer; on CUDA its weights are `dtype`, fp32 or bf16. The input has about
    `rows` rows; other numbers are slower, not wrong. The output is of the input's type.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        packable = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.packed = packable and can_pack(dtype)
        castable = self.packed or weight.device.type == "cuda"
        self.dtype = dtype if castable and dtype != torch.float32 else weight.dtype
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        if self.packed:
            self.weight = _pack(self.weight, rows)
            self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        given = x if x.dtype == self.dtype else x.to(self.dtype)  # even an idle `to` takes time
        if self.packed:
            y = self.multiply(given, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(given, self.weight, self.bias)
        return y if y.dtype == x.dtype else y.to(x.dtype)


def pack_linears(module: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module with packed linear layers, sharing all else with the original, which stays."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias, rows, dtype)
    clone = copy.copy(module)
    clone._modules = {}
    for name, child in module._modules.items():
        clone._modules[name] = child and pack_linears(child, rows, dtype)
    return clone


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products exist here and are right."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 24), (40, 24), (40,))
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    try:
        packed = _pack(weight.to(dtype), rows=3)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        y = multiply(x.to(dtype), packed, bias.to(dtype), "none", [], "").float()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    return bool((y - F.linear(x, weight, bias)).abs().max() < tolerance)


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
