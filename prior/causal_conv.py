"""Convolutions over a grid that never look at a later position, all positions at once or one after the other.

Features are `(B, h, w, C)`, so that a 1x1 convolution is a linear layer, at a single position too. Letters: B batch, h w grid, k kernel size.
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
        """A tensor `(B, h, w, C)` is one `(B, C, h, w)` in the channels_last format: no copy is made."""
        return rearrange(
            super().forward(rearrange(features, "b h w c -> b c h w")), "b c h w -> b h w c"
        )


class CausalConv(nn.Module):
    """Two sets of taps with one sum: the k//2 rows above, k columns wide, and in the same row the k//2 positions to the left and the position itself.

    There is no mask: no tap exists that looks at a later position, so nothing is multiplied by zero and no weight is ever set to zero.
    (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2.2, pad and crop their two stacks in the same way.)

    Args:
        strict: leave out the position itself. The first layer of a prior does, so that its output at a position knows only the codes before
            it; all later layers may then look at their own position.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: int, *, strict: bool = False
    ) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.above = nn.Conv2d(
            in_features, out_features, (self.reach, kernel_size), padding=self.reach
        )
        self.left = nn.Conv2d(
            in_features,
            out_features,
            (1, self.reach if strict else self.reach + 1),
            padding=(0, self.reach),
            bias=False,
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(B, h, w, C)` to `(B, h, w, C')`."""
        height, width = features.shape[1:3]
        x = rearrange(features, "b h w c -> b c h w")
        # Padded on all sides, a convolution's first output sees nothing but padding, and the window of output i ends just before row i
        # (at column i, or just before it): the outputs beyond the grid, which look at what comes later, are cropped.
        y = self.above(x)[:, :, :height, :width] + self.left(x)[:, :, :height, :width]
        return rearrange(y, "b c h w -> b h w c")


class CausalConvSteps:
    """The same convolution, position after position in raster order, without computing anything twice.

    The taps that look at finished rows, most of them, are computed for a whole row at its start; at a position only those in its own row remain.
    Both are one matrix product over the concatenated inputs of all taps. All buffers and views are made here, once.
    """

    def __init__(self, conv: CausalConv, batch_size: int, width: int, dtype: torch.dtype) -> None:
        reach, weight = conv.reach, conv.above.weight
        out_features, features, _, kernel = weight.shape
        taps, padded = conv.left.weight.shape[-1], width + 2 * reach
        self.above = PackedLinear(
            rearrange(weight, "o i r c -> o (r c i)"), conv.above.bias, batch_size * width, dtype
        )
        self.left = PackedLinear(
            rearrange(conv.left.weight, "o i 1 c -> o (c i)"), None, batch_size, dtype
        )
        self.finished = weight.new_zeros(
            batch_size, reach, padded, features
        )  # inputs: the last k//2 rows, with their padding
        self.row = weight.new_zeros(batch_size, padded, features)  # inputs: the current row
        self.known = weight.new_empty(
            batch_size, width, out_features
        )  # what the current row's outputs are besides their left taps
        # Each column's k neighbours lie side by side in memory, so a window is a view with overlapping strides: (B, w, k//2, k*C).
        row_size = padded * features
        self.windows_above = self.finished.as_strided(
            (batch_size, width, reach, kernel * features), (reach * row_size, features, row_size, 1)
        )
        self.windows = [
            self.row[:, column : column + taps].view(batch_size, taps * features)
            for column in range(width)
        ]
        self.inputs = self.row[:, reach : reach + width].unbind(1)
        self.columns = self.known.unbind(1)

    def start_row(self, bias: Tensor | None = None) -> None:
        """Move on to the next row, when all inputs of the last one have been put.

        Args:
            bias: `(B, w, C')` or `(B, 1, C')`, added to the row's outputs.
        """
        for older, newer in zip(
            self.finished.unbind(1), [*self.finished.unbind(1)[1:], self.row], strict=True
        ):
            older.copy_(newer)
        known = self.above(self.windows_above.flatten(2))
        self.known.copy_(known if bias is None else known + bias)

    def put(self, features: Tensor, column: int) -> None:
        """Give the input `(B, C)` at a column of the current row."""
        self.inputs[column].copy_(features)

    def output(self, column: int) -> Tensor:
        """The output `(B, C')` at a column, when all inputs that it looks at have been put."""
        return self.left(self.windows[column]).add_(self.columns[column])


class CausalConvStatic:
    """The same convolution at one position, in fixed shapes: where its inputs lie is told by a tensor (see `tap_slots`).

    All taps are computed at every position, as one matrix product: on a GPU one more launch costs more than they do. Of the inputs, the rows that a
    window can reach are kept, in a ring of k//2 + 1 rows: a row takes the place of the one that no later window reaches.
    """

    def __init__(self, conv: CausalConv, batch_size: int, width: int, dtype: torch.dtype) -> None:
        above = rearrange(conv.above.weight, "o i r c -> o (r c i)")
        left = rearrange(conv.left.weight, "o i 1 c -> o (c i)")
        self.taps = PackedLinear(
            torch.cat([above, left], dim=1), conv.above.bias, batch_size, dtype
        )
        self.inputs = above.new_zeros(
            batch_size, (conv.reach + 1) * (width + 2 * conv.reach), conv.above.in_channels
        )

    def put(self, features: Tensor, slot: Tensor) -> None:
        """Give the input `(B, C)` whose place is `(1,)`."""
        self.inputs.index_copy_(1, slot, features[:, None])

    def output(self, slots: Tensor) -> Tensor:
        """The output `(B, C')` of the window whose places are `(taps,)`, when all inputs that it looks at have been put."""
        return self.taps(self.inputs.index_select(1, slots).flatten(1))


def tap_slots(grid: tuple[int, ...], kernel_size: int) -> Tensor:
    """Where the inputs of every position's window lie in the ring of a `CausalConvStatic`.

    Returns:
        `(T, k//2 * k + k//2 + 1)`: the rows above, then the positions to the left and, last, the position itself.
    """
    (height, width), reach = grid, kernel_size // 2
    rows, columns = (
        torch.arange(height).repeat_interleave(width),
        torch.arange(width).repeat(height),
    )
    down = torch.cat(
        [
            torch.arange(-reach, 0).repeat_interleave(kernel_size),
            torch.zeros(reach + 1, dtype=torch.int64),
        ]
    )
    across = torch.cat([torch.arange(-reach, reach + 1).repeat(reach), torch.arange(-reach, 1)])
    return (rows[:, None] + down) % (reach + 1) * (width + 2 * reach) + (
        columns[:, None] + across + reach
    )
