"""The one attention that everything here uses, and its cache.

Letters: B batch, n heads, T queries, S keys, d features per head.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

SHORT = 512  # positions up to which the written-out product is the faster one on a CPU (bf16: up to 1.5 times)


class Attention(NamedTuple):
    """A causal attention as a network has it."""

    num_heads: int
    head_dim: int
    window: int
    """As in `attend`."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1): `(B, n, T, d)` from keys and values `(B, n, S, d)`.

    Args:
        causal: query t sees the keys up to t (T = S).
        window: of a causal attention, how many keys before its own a query sees; 0 for all.
    """
    if causal and 0 < window < q.shape[-2] - 1:
        return attend_in_window(q, k, v, window)
    if q.device.type == "cpu" and k.shape[-2] <= SHORT:
        return attend_written_out(
            q, k, v, _future(q.shape[-2], q.dtype, q.device) if causal else None
        )
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as two products and a softmax; `mask` `(T, S)` is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def attend_in_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys and the own one, in blocks of that many queries: memory and time grow with T, not T^2.

    The queries of a block see its own keys and those of the block before, under one mask for all blocks.
    """
    length = q.shape[-2]
    missing = -length % window
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, window, 0)) for x in (k, v))  # a block of nothing before the first
    queries = rearrange(q, "b n (block t) d -> block b n t d", t=window)
    starts = range(0, length + missing, window)
    masks = [_window(window, block == 0, q.dtype, q.device) for block in range(len(starts))]
    blocks = [
        _attend_masked(x, k[:, :, i : i + 2 * window], v[:, :, i : i + 2 * window], mask)
        for x, i, mask in zip(queries, starts, masks, strict=True)
    ]
    return torch.cat(blocks, dim=2)[:, :, :length]


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if q.device.type == "cpu" and k.shape[-2] <= SHORT:
        return attend_written_out(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@lru_cache(maxsize=16)
def _future(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(T, T)`: -inf where a key lies after the query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)


@lru_cache(maxsize=16)
def _window(window: int, first: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(window, 2 window)`: 0 where key j of (block before, own block) is seen by query i: i <= j <= i + window; else -inf."""
    seen = torch.ones(window, 2 * window, dtype=torch.bool, device=device).triu().tril(window)
    if first:
        seen[:, :window] = False
    return torch.zeros(window, 2 * window, dtype=dtype, device=device).masked_fill(
        ~seen, -torch.inf
    )


class KVCache:
    """Keys and values of the positions so far, `(B, n, S, d)` each, in buffers taken once.

    Args:
        window: how many positions before its own a query sees; 0 for all.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        length: int,
        head_dim: int,
        like: Tensor,
        *,
        window: int = 0,
    ) -> None:
        self.keys = like.new_zeros(batch_size, num_heads, length, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.window = window

    def attend(self, position: int | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the key and value of one position, `(B, n, 1, d)`, and attend to all up to it.

        Given the position as a tensor `(1,)`, no shape depends on it: the whole buffers are attended to under a mask, as CUDA graphs need it.
        """
        if isinstance(position, Tensor):
            self.keys.index_copy_(2, position, k.to(self.keys.dtype))
            self.values.index_copy_(2, position, v.to(self.values.dtype))
            slots = torch.arange(self.keys.shape[2], device=position.device)
            seen = (slots <= position) & (slots >= position - (self.window or len(slots)))
            return F.scaled_dot_product_attention(
                q, self.keys.to(q.dtype), self.values.to(q.dtype), attn_mask=seen[None, None, None]
            )
        self.keys[:, :, position : position + 1] = k
        self.values[:, :, position : position + 1] = v
        first = max(0, position - self.window) if self.window else 0
        return attend(
            q,
            self.keys[:, :, first : position + 1],
            self.values[:, :, first : position + 1],
            causal=False,
        )
