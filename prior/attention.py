"""The one attention that everything here uses, and its cache.

Letters: B batch, n heads, T queries, S keys, d features per head.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 512  # positions up to which the written-out product is the faster one on a CPU (bf16: up to 1.5 times)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1): `(B, n, T, d)` from keys and values `(B, n, S, d)`.

    Args:
        causal: query t sees the keys up to t (T = S).
    """
    if q.device.type == "cpu" and k.shape[-2] <= SHORT:
        return attend_written_out(q, k, v, causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The same as two products and a softmax."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores + _future(q.shape[-2], scores.dtype, scores.device)
    return scores.softmax(dim=-1).to(v.dtype) @ v


@lru_cache(maxsize=16)
def _future(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(T, T)`: -inf where a key lies after the query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)


class KVCache:
    """Keys and values of the positions so far, `(B, n, S, d)` each, in buffers taken once."""

    def __init__(self, batch_size: int, num_heads: int, length: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch_size, num_heads, length, head_dim)
        self.values = torch.empty_like(self.keys)

    def append(self, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one position `(B, n, 1, d)` and return all up to it."""
        self.keys[:, :, position : position + 1] = k
        self.values[:, :, position : position + 1] = v
        return self.keys[:, :, : position + 1], self.values[:, :, : position + 1]
