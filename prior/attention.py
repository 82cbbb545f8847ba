"""The one attention that everything here uses, and its cache.

Letters: B batch, n heads, T queries, S keys, d features per head.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN plans anew, 50 ms, for every number of keys, and a step has one more than the step before.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SHORT = 512  # keys up to which the written-out product is faster on a CPU (bf16: 1.5 times)


class Attention(NamedTuple):
    """The facts of a network's causal attention; `window` as in `attend`."""

    num_heads: int
    head_dim: int
    window: int


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1).

    Args:
        q: `(B, n, T, d)`, like the result.
        k: `(B, n, S, d)`, like `v`.
        causal: query t sees the keys up to t (T = S).
        window: how many keys before its own a query of a causal attention sees; 0 for all.
    """
    if causal and 0 < window < q.shape[-2] - 1:
        return attend_in_window(q, k, v, window)
    if q.device.type == "cpu" and k.shape[-2] <= SHORT:
        mask = _future(q.shape[-2], q.dtype, q.device) if causal else None
        return attend_written_out(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as two products and a softmax; `mask` `(T, S)` is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def attend_in_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention to the last `window` keys and the own one: memory and time grow with T.

    Queries are taken in blocks of that size. Those of a block see its own keys and the keys of the
    block before it, under a mask that is the same for every block but the first.
    """
    # Whole blocks of queries; before the first block of keys lies one of nothing.
    length = q.shape[-2]
    missing = -length % window
    q = F.pad(q, (0, 0, 0, missing))
    k, v = (F.pad(x, (0, 0, window, missing)) for x in (k, v))

    blocks = []
    for start, queries in enumerate(q.split(window, dim=2)):
        mask = _window(window, start == 0, q.dtype, q.device)
        keys, values = (x[:, :, start * window : (start + 2) * window] for x in (k, v))
        if q.device.type == "cpu" and 2 * window <= SHORT:
            blocks.append(attend_written_out(queries, keys, values, mask))
        else:
            blocks.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
    return torch.cat(blocks, dim=2)[:, :, :length]


@lru_cache(maxsize=16)
def _future(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(T, T)`: -inf where a key lies after the query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)


@lru_cache(maxsize=16)
def _window(window: int, first: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(window, 2 window)`: 0 where query i sees key j of (block before, own block), that is where
    i <= j <= i + window, else -inf; the first block has none before it."""
    seen = torch.ones(window, 2 * window, dtype=torch.bool, device=device).triu().tril(window)
    if first:
        seen[:, :window] = False
    mask = torch.zeros(window, 2 * window, dtype=dtype, device=device)
    return mask.masked_fill(~seen, -torch.inf)


def bf16_keys_pay(device_type: str) -> bool:
    """Whether one query reads keys and values faster in bf16, which are half as many bytes: on a
    GPU, and on a CPU with matrix units for it (8.8 instead of 16.7 ms; on others it was slower)."""
    if device_type != "cpu":
        return True
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # absent from older torch
    capabilities: dict[str, bool] = get_capabilities()
    return bool(capabilities.get("amx_bf16"))


class KVCache:
    """Keys and values `(B, n, length, d)` of the positions so far; `window` as in `attend`. They
    are kept and multiplied in bf16 if sampling is (`dtype`) and it pays, else as they come."""

    def __init__(self, length: int, *, window: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.keys: Tensor | None = None  # made at the first position
        self.values: Tensor | None = None
        self.length, self.window, self.dtype = length, window, dtype

    def attend(self, position: int | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the key and value of one position, `(B, n, 1, d)`, and attend to all up to it. If
        the position is a tensor `(1,)`, no shape depends on it, as CUDA graphs need it."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            in_bf16 = self.dtype == torch.bfloat16 and bf16_keys_pay(k.device.type)
            kept = torch.bfloat16 if in_bf16 else k.dtype
            self.keys, self.values = k.new_zeros(shape, dtype=kept), v.new_zeros(shape, dtype=kept)
        if k.dtype != self.keys.dtype:
            given, kept = q.dtype, self.keys.dtype
            return self.attend(position, q.to(kept), k.to(kept), v.to(kept)).to(given)
        if isinstance(position, Tensor):
            self.keys.index_copy_(2, position, k)
            self.values.index_copy_(2, position, v)
            slots = torch.arange(self.length, device=position.device)
            seen = (slots <= position) & (slots >= position - (self.window or self.length))
            return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen[None])
        self.keys[:, :, position : position + 1] = k
        self.values[:, :, position : position + 1] = v
        first = max(0, position - self.window) if self.window else 0
        seen_keys, seen_values = (x[:, :, first : position + 1] for x in (self.keys, self.values))
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # however many keys there are
            return attend_written_out(q, seen_keys, seen_values, None)
        if q.device.type != "cpu":
            with sdpa_kernel(PLANLESS):
                return F.scaled_dot_product_attention(q, seen_keys, seen_values)
        return attend(q, seen_keys, seen_values, causal=False)
