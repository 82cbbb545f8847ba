"""A causal transformer over one level's codes in raster order, conditioned on the coarser levels and a class label.

Letters: B batch, h w code grid, T = h*w positions, W width, n heads, d = W/n, K codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from prior.attention import KVCache, attend
from prior.base import Prior
from prior.config import TransformerConfig, TransformerPriorConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        width = config.width
        self.causal, self.num_heads, self.dropout = causal, config.num_heads, config.dropout
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: KVCache | None = None, position: int = 0) -> Tensor:
        """`(B, T, W)` to the same; with a cache, T = 1 and x is at `position`."""
        q, k, v = rearrange(self.to_qkv(self.norm_attention(x)), "b t (three n d) -> three b n t d", three=3, n=self.num_heads)
        if cache is not None:
            k, v = cache.append(position, k, v)
        attended = rearrange(attend(q, k, v, causal=self.causal and cache is None), "b n t d -> b t (n d)")
        x = x + F.dropout(self.from_heads(attended), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh")), self.dropout, self.training)


class Positions(nn.Module):
    """A learned vector per row plus one per column of a grid."""

    def __init__(self, height: int, width: int, features: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.zeros(height, features)), nn.Parameter(torch.zeros(width, features))

    def forward(self) -> Tensor:
        """`(T, W)` in raster order."""
        return rearrange(self.rows[:, None] + self.columns[None], "h w c -> (h w) c")


class ConditionNetwork(nn.Module):
    """Reads the codes of the coarser levels, all of them at every position, and lays what it read over the level's grid.

    From coarse to fine: each coarser level's codes join what the levels before said, blocks that see the whole grid read it, and each
    position is repeated over the finer positions that it covers.
    """

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        network = config.network
        self.grids = config.grids
        self.embeddings = nn.ModuleList(nn.Embedding(size, network.width) for size in config.codebook_sizes[:-1])
        self.positions = nn.ModuleList(Positions(h, w, network.width) for h, w in config.grids[:-1])
        self.blocks = nn.ModuleList(nn.Sequential(*(Block(network, causal=False) for _ in range(network.num_condition_layers))) for _ in self.embeddings)
        self.norm = nn.RMSNorm(network.width)

    def forward(self, condition: Sequence[Tensor], context: Tensor) -> Tensor:
        """Coarser codes `(B, h', w')` each, and a context `(B, 1, W)` that every position gets, to `(B, T, W)`."""
        x = context
        for level, codes in enumerate(condition):
            x = x + self.embeddings[level](rearrange(codes, "b h w -> b (h w)")) + self.positions[level]()
            x = self.blocks[level](x)
            (h, w), (finer_h, finer_w) = self.grids[level], self.grids[level + 1]
            x = repeat(x, "b (h w) c -> b (h up w across) c", h=h, w=w, up=finer_h // h, across=finer_w // w)
        return self.norm(x)


@dataclass
class SamplingState:
    """What the transformer keeps between positions."""

    background: Tensor
    """`(B, T, W)`: all that a position's input holds besides the code before it."""
    caches: list[KVCache]
    """One per block."""


class TransformerPrior(Prior):
    """The transformer prior of any level. The input at a position is the code *before* it, so causal attention is all the masking there is."""

    config_class = TransformerPriorConfig
    config: TransformerPriorConfig

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        self.config = config
        network = config.network
        height, width = config.grids[-1]
        self.codebook_size = config.codebook_sizes[-1]
        self.embedding = nn.Embedding(self.codebook_size + 1, network.width)  # the last entry stands before the first position
        self.positions = Positions(height, width, network.width)
        # The last entry stands for a hidden label.
        self.labels = nn.Embedding(config.num_classes + 1, network.width) if config.num_classes else None
        self.condition = ConditionNetwork(config) if config.level else None
        self.blocks = nn.ModuleList(Block(network, causal=True) for _ in range(network.num_layers))
        self.norm = nn.RMSNorm(network.width)
        self.head = nn.Linear(network.width, self.codebook_size)
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(module, Block):  # residual branches start small, the smaller the more there are (Radford et al. 2019)
                nn.init.normal_(module.from_heads.weight, std=0.02 / (2 * network.num_layers) ** 0.5)
                nn.init.normal_(module.down.weight, std=0.02 / (2 * network.num_layers) ** 0.5)

    def forward(self, codes: Tensor, condition: Sequence[Tensor] = (), labels: Tensor | None = None) -> Tensor:
        """Logits `(B, K, h, w)` of codes `(B, h, w)`; see `Prior.forward`."""
        flat = rearrange(codes, "b h w -> b (h w)")
        before = F.pad(flat[:, :-1], (1, 0), value=self.codebook_size)  # position t reads the code at t - 1
        x = self.embedding(before) + self.background(len(codes), condition, labels)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.head(self.norm(x)), "b (h w) k -> b k h w", h=codes.shape[1])

    def background(self, batch_size: int, condition: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """What every position knows besides the codes before it: where it is, the class, the coarser levels. `(B, T, W)`."""
        where = self.positions().expand(batch_size, -1, -1)
        context = self.labels(labels)[:, None] if self.labels is not None else torch.zeros_like(where[:, :1])
        return where + context + (self.condition(condition, context) if self.condition is not None else 0)

    def start(self, batch_size: int, condition: Sequence[Tensor], labels: Tensor | None) -> SamplingState:
        """Run the condition network once and take the caches."""
        background = self.background(batch_size, condition, labels)
        heads = self.config.network.num_heads
        caches = [KVCache(batch_size, heads, background.shape[1], background.shape[2] // heads, background) for _ in self.blocks]
        return SamplingState(background, caches)

    def step(self, state: SamplingState, position: int, previous: Tensor | None) -> Tensor:
        """Logits `(B, K)` of one position; see `Prior.step`."""
        background = state.background[:, position : position + 1]
        if previous is None:
            previous = torch.full((len(background),), self.codebook_size, device=background.device)
        x = self.embedding(previous)[:, None] + background
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, cache, position)
        return self.head(self.norm(x))[:, 0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Positions):
        nn.init.normal_(module.rows, std=0.02)
        nn.init.normal_(module.columns, std=0.02)
