"""Convolutions over a grid that never look at a later position: all positions at once, or steps.

Features are `(B, h, w, C)`, so that a 1x1 convolution is a linear layer, at a single position too.
Letters: B batch, h w grid, k kernel size, r = k//2.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from prior.packed_linear import PackedLinear


class Conv3x3(nn.Conv2d):
    """An ordinary 3x3 convolution, `(B, h, w, C)` to `(B, h, w, C')`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, h, w, C)` is `(B, C, h, w)` in the channels_last format: no copy is made."""
        x = super().forward(rearrange(features, "b h w c -> b c h w"))
        return rearrange(x, "b c h w -> b h w c")


class CausalConv(nn.Module):
    """The sum of two convolutions: over the r rows above, k columns wide, and over the own row.

    In its own row a position sees the r positions to the left and, unless the layer is `strict` (a
    prior's first layer, which must not read the code to predict), itself. There is no mask: no
    weight exists for a later position. Padding and cropping are those of van den Oord et al. 2016,
    "Conditional Image Generation with PixelCNN Decoders", section 2.2.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: int, *, strict: bool = False
    ) -> None:
        super().__init__()
        self.reach = reach = kernel_size // 2
        self.above = nn.Conv2d(in_features, out_features, (reach, kernel_size), padding=reach)
        own_row = (1, reach if strict else reach + 1)
        self.left = nn.Conv2d(in_features, out_features, own_row, padding=(0, reach), bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, h, w, C)` to `(B, h, w, C')`."""
        height, width = features.shape[1:3]
        x = rearrange(features, "b h w c -> b c h w")
        # With padding on all sides, output i sees the rows (or columns) that end just before i.
        # Outputs beyond the grid, which look at what comes later, are cropped.
        y = self.above(x)[:, :, :height, :width] + self.left(x)[:, :, :height, :width]
        return rearrange(y, "b c h w -> b h w c")


class CausalConvSteps:
    """The same convolution, position after position in raster order, computing nothing twice.

    Most weights belong to the rows above, which are finished: their part of the sum is computed for
    a whole row at its start. At a position only the weights of its own row remain. No shape or
    address depends on the position, so CUDA graphs can hold both.

    A row has r columns of padding on either side: column c is its place c + r.
    """

    def __init__(self, conv: CausalConv, batch_size: int, width: int, dtype: torch.dtype) -> None:
        above, left = conv.above.weight, conv.left.weight
        out_features, features, self.reach, self.kernel_size = above.shape
        self.num_left, self.width = left.shape[-1], width
        self.above = PackedLinear(
            rearrange(above, "o i r c -> o (r c i)"), conv.above.bias, batch_size * width, dtype
        )
        self.left = PackedLinear(rearrange(left, "o i 1 c -> o (c i)"), None, batch_size, dtype)
        padded = width + 2 * self.reach
        self.finished = above.new_zeros(batch_size, self.reach, padded, features)  # last r rows
        self.row = above.new_zeros(batch_size, padded, features)  # the current row
        self.from_above = above.new_zeros(batch_size, padded, out_features)

    def start_row(self, bias: Tensor | None = None) -> None:
        """Move on to the next row, when all inputs of the last one are there. A bias `(B, w, C')`
        or `(B, 1, C')` is added to the row's outputs."""
        for row in range(self.reach - 1):
            self.finished[:, row] = self.finished[:, row + 1]
        self.finished[:, -1] = self.row

        # The k neighbours of a column lie side by side in memory, so that a view holds all windows.
        batch_size, reach, padded, features = self.finished.shape
        windows = self.finished.as_strided(
            (batch_size, self.width, reach, self.kernel_size * features),
            (reach * padded * features, features, padded * features, 1),
        )
        sums = self.above(windows.flatten(2))  # (B, w, C')
        self.from_above[:, reach:-reach] = sums if bias is None else sums + bias

    def put(self, features: Tensor, place: Tensor) -> None:
        """Keep the input `(B, C)` at a place `(1,)` of the current row."""
        self.row.index_copy_(1, place, features[:, None])

    def output(self, places: Tensor) -> Tensor:
        """The output `(B, C')` of a position, when its inputs are there. The places `(r + 1,)` are
        those of the r positions to the left and its own."""
        window = self.row.index_select(1, places[: self.num_left]).flatten(1)
        return self.left(window).add_(self.from_above.index_select(1, places[-1:])[:, 0])
