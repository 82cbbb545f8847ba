"""The one attention that everything here uses, and its cache.

Letters: B batch, n heads, T queries, S keys, d features per head.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
        mask = _mask(_future, q.shape[-2], q.dtype, q.device) if causal else None
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
        mask = _mask(_window, window, start == 0, q.dtype, q.device)
        keys, values = (x[:, :, start * window : (start + 2) * window] for x in (k, v))
        if q.device.type == "cpu" and 2 * window <= SHORT:
            blocks.append(attend_written_out(queries, keys, values, mask))
        else:
            blocks.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))
    return torch.cat(blocks, dim=2)[:, :, :length]


@lru_cache(maxsize=32)
def kept_mask(make: Callable[..., Tensor], *facts: object) -> Tensor:
    """A mask that is made once, and may be used in training later, wherever it is made."""
    with torch.inference_mode(False):
        return make(*facts)


def _mask(make: Callable[..., Tensor], *facts: object) -> Tensor:
    """A mask that is kept; code that is compiled makes its own, as a part of it."""
    return make(*facts) if torch.compiler.is_compiling() else kept_mask(make, *facts)


def _future(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(T, T)`: -inf where a key lies after the query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)


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


def grows(places: Tensor) -> bool:
    """Whether caches grow with the positions, whose values are looked at."""
    return places.device.type == "cpu"


class Slots(NamedTuple):
    """Where W positions of each image lie in the caches of all layers, and what they see."""

    rows: Tensor | slice  # (B * n * W,) of the cache seen as (B * n * capacity, d); or, on a CPU
    #                       where all images are at the same positions, these
    mask: Tensor  # (B, 1, W, capacity), added to the scores: 0 for what is seen, else -inf


class KVCache:
    """Keys and values `(B, n, capacity, d)` of the positions so far; `window` as in `attend`. They
    are kept and multiplied in bf16 if sampling is (`dtype`) and it pays, else as they come.

    On a CPU the capacity grows with the positions, in steps, for all of it is read; elsewhere it is
    the whole length, so that no shape or address changes, as CUDA graphs need it.
    """

    def __init__(self, length: int, *, window: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.keys: Tensor | None = None  # made at the first position
        self.values: Tensor | None = None
        self.length, self.window, self.dtype = length, window, dtype
        self.capacity, self.growth = 0, max(16, length // 16)

    def slots(self, places: Tensor, num_heads: int, features: Tensor) -> Slots:
        """The slots of positions `(B, W)` for features of this type, here and in the caches of the
        other layers."""
        rows: Tensor | slice | None = None
        needed = self.length
        if grows(places):
            first, last = int(places.min()), int(places.max())
            needed = min(self.length, -(-(last + 1) // self.growth) * self.growth)
            if last - first == places.shape[1] - 1:
                rows = slice(first, last + 1)
        capacity, batch = max(self.capacity, needed), len(places)
        if rows is None:
            heads = torch.arange(batch * num_heads, device=places.device).view(batch, num_heads, 1)
            rows = (heads * capacity + places[:, None]).flatten()
        keys, queries = torch.arange(capacity, device=places.device), places[:, None, :, None]
        seen = (keys <= queries) & (keys >= queries - (self.window or self.length))
        mask = torch.zeros(seen.shape, dtype=self._kept(features), device=places.device)
        return Slots(rows, mask.masked_fill(~seen, -torch.inf))

    def attend(self, slots: Slots, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the keys and values of W positions, `(B, n, W, d)`, in place of what their slots
        held, and attend to what each position sees, `(B, n, W, d)`."""
        keys, values = self._reserve(slots.mask.shape[3], k)
        given, kept, width = q.dtype, slots.mask.dtype, q.shape[3]
        for cache, new in ((keys, k), (values, v)):
            if isinstance(slots.rows, slice):
                cache[:, :, slots.rows] = new
            else:
                rows = new.to(kept).reshape(-1, width)
                cache.view(-1, width).index_copy_(0, slots.rows, rows)
        on_cpu = q.device.type == "cpu"
        if on_cpu and (kept == torch.bfloat16 or self.length <= SHORT):
            attended = attend_written_out(q.to(kept), keys, values, slots.mask)
        else:
            mask = slots.mask
            attended = F.scaled_dot_product_attention(q.to(kept), keys, values, attn_mask=mask)
        return attended.to(given)

    def _kept(self, features: Tensor) -> torch.dtype:
        in_bf16 = self.dtype == torch.bfloat16 and bf16_keys_pay(features.device.type)
        return torch.bfloat16 if in_bf16 else features.dtype

    def _reserve(self, capacity: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, of at least this capacity."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], capacity, k.shape[3])
            self.keys, self.values = (k.new_zeros(shape, dtype=self._kept(k)) for _ in range(2))
        elif capacity > self.capacity:
            more = (0, 0, 0, capacity - self.capacity)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.capacity = capacity
        return self.keys, self.values
