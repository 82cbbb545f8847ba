"""A causal transformer over one level's codes in raster order, conditioned on the coarser levels and a class label.

Letters: B batch, h w code grid, T = h*w positions, W width, n heads, d = W/n, K codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prior.attention import Attention, KVCache, attend
from prior.config import TransformerConfig, TransformerPriorConfig
from prior.cuda_graphs import StaticPrior, hold_still
from prior.packed_linear import pack_linears


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), as in Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU.

    Queries and keys are normalised before their product (Dehghani et al. 2023, section 2.1), which keeps it from growing without bound.
    """

    def __init__(self, config: TransformerConfig, grid: tuple[int, ...], *, causal: bool) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.num_heads
        hidden = (
            -(-8 * width // 24) * 8
        )  # SwiGLU has three matrices: 8/3 W makes them as large as the usual two, and a multiple of 8 is fast
        self.causal, self.num_heads, self.dropout = causal, config.num_heads, config.dropout
        self.window = config.attention_rows * grid[1] if causal else 0
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.scale_qk = nn.Parameter(torch.ones(2 * head_dim))
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.gate_and_up, self.down = (
            nn.Linear(width, 2 * hidden, bias=False),
            nn.Linear(hidden, width, bias=False),
        )

    def forward(
        self, x: Tensor, angles: Tensor, cache: KVCache | None = None, position: int | Tensor = 0
    ) -> Tensor:
        """`(B, T, W)` to the same, `angles` as `rotate` takes them; with a cache, T = 1 and x is at `position`."""
        qkv = (
            self.to_qkv(self.norm_attention(x))
            .unflatten(2, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )  # (3, B, n, T, d)
        q, k = self._normalise_and_turn(qkv[:2], angles)
        v = qkv[2]
        attended = (
            attend(q, k, v, causal=self.causal, window=self.window)
            if cache is None
            else cache.attend(position, q, k, v)
        )
        x = x + F.dropout(
            self.from_heads(attended.transpose(1, 2).flatten(2)), self.dropout, self.training
        )
        gate, up = self.gate_and_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)

    def _normalise_and_turn(self, qk: Tensor, angles: Tensor) -> Tensor:
        """Queries and keys `(2, B, n, T, d)` to the same, computed in at least fp32 whatever autocast says outside."""
        exact = qk.to(torch.promote_types(qk.dtype, torch.float32))
        scales = self.scale_qk.view(2, 1, 1, 1, -1)
        return rotate(F.rms_norm(exact, exact.shape[-1:]) * scales, angles).to(qk.dtype)


def rotary_angles(grid: tuple[int, ...], head_dim: int) -> Tensor:
    """The angles by which queries and keys turn, `(2, T, d)` as cosines and signed sines (Su et al. 2021; here half for the row, half for the column).

    A product of two turned vectors depends on how many rows and columns lie between their positions, not on where they are.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    speeds = 100.0 ** -torch.linspace(
        0, 1, head_dim // 4
    )  # grids are small: the slowest turns by less than one radian in 64 rows
    angles = torch.cat(
        [rows.flatten()[:, None] * speeds, columns.flatten()[:, None] * speeds], dim=1
    )
    return torch.stack(
        [
            torch.cat([angles.cos(), angles.cos()], dim=1),
            torch.cat([-angles.sin(), angles.sin()], dim=1),
        ]
    )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of the features of `(..., T, d)` by its angle `(2, T, d)`."""
    cosines, sines = angles
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)


class Positions(nn.Module):
    """A learned vector per row plus one per column of a grid."""

    def __init__(self, height: int, width: int, features: int) -> None:
        super().__init__()
        self.rows, self.columns = (
            nn.Parameter(torch.zeros(height, features)),
            nn.Parameter(torch.zeros(width, features)),
        )

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
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, network.width) for size in config.codebook_sizes[:-1]
        )
        self.positions = nn.ModuleList(Positions(h, w, network.width) for h, w in config.grids[:-1])
        numbers = [
            network.num_condition_layers if grid != (1, 1) else 0 for grid in config.grids[:-1]
        ]  # one position has nothing to attend to
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(network, grid, causal=False) for _ in range(number))
            for number, grid in zip(numbers, config.grids[:-1], strict=True)
        )
        for level, grid in enumerate(config.grids[:-1]):
            self.register_buffer(
                f"angles_{level}",
                rotary_angles(grid, network.width // network.num_heads),
                persistent=False,
            )
        self.norm = nn.RMSNorm(network.width)

    def forward(self, condition: Sequence[Tensor], context: Tensor) -> Tensor:
        """Coarser codes `(B, h', w')` each, and a context `(B, 1, W)` that every position gets, to `(B, T, W)`."""
        x = context
        for level, codes in enumerate(condition):
            x = (
                x
                + self.embeddings[level](rearrange(codes, "b h w -> b (h w)"))
                + self.positions[level]()
            )
            for block in cast(nn.ModuleList, self.blocks[level]):
                x = block(x, getattr(self, f"angles_{level}"))
            (h, w), (finer_h, finer_w) = self.grids[level], self.grids[level + 1]
            x = repeat(
                x,
                "b (h w) c -> b (h up w across) c",
                h=h,
                w=w,
                up=finer_h // h,
                across=finer_w // w,
            )
        return self.norm(x)


@dataclass
class SamplingState:
    """What the transformer keeps between positions."""

    background: Tensor
    """`(B, T, W)`: all that a position's input holds besides the code before it."""
    blocks: list[tuple[Block, KVCache]]
    """Each block, with packed weights, and its keys and values."""
    output: nn.Module
    """From features to logits, with packed weights."""


class TransformerPrior(StaticPrior):
    """The transformer prior of any level. The input at a position is the code *before* it, so causal attention is all the masking there is."""

    config_class = TransformerPriorConfig
    config: TransformerPriorConfig
    angles: Tensor

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        self.config = config
        network = config.network
        height, width = config.grids[-1]
        self.codebook_size = config.codebook_sizes[-1]
        self.embedding = nn.Embedding(
            self.codebook_size + 1, network.width
        )  # the last entry stands before the first position
        self.positions = Positions(height, width, network.width)
        # The last entry stands for a hidden label.
        self.labels = (
            nn.Embedding(config.num_classes + 1, network.width) if config.num_classes else None
        )
        self.condition = ConditionNetwork(config) if config.level else None
        self.blocks = nn.ModuleList(
            Block(network, config.grids[-1], causal=True) for _ in range(network.num_layers)
        )
        self.register_buffer(
            "angles",
            rotary_angles(config.grids[-1], network.width // network.num_heads),
            persistent=False,
        )
        self.norm = nn.RMSNorm(network.width)
        self.head = nn.Linear(network.width, self.codebook_size)
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(
                module, Block
            ):  # residual branches start small, the smaller the more there are (Radford et al. 2019)
                nn.init.normal_(
                    module.from_heads.weight, std=0.02 / (2 * network.num_layers) ** 0.5
                )
                nn.init.normal_(module.down.weight, std=0.02 / (2 * network.num_layers) ** 0.5)

    def forward(
        self, codes: Tensor, condition: Sequence[Tensor] = (), labels: Tensor | None = None
    ) -> Tensor:
        """Logits `(B, K, h, w)` of codes `(B, h, w)`; see `Prior.forward`."""
        flat = rearrange(codes, "b h w -> b (h w)")
        before = F.pad(
            flat[:, :-1], (1, 0), value=self.codebook_size
        )  # position t reads the code at t - 1
        x = self.embedding(before) + self.background(len(codes), condition, labels)
        for block in self.blocks:
            if self.training and self.config.network.checkpoint_activations:
                x = checkpoint(block, x, self.angles, use_reentrant=False)
            else:
                x = block(x, self.angles)
        return rearrange(self.head(self.norm(x)), "b (h w) k -> b k h w", h=codes.shape[1])

    def background(
        self, batch_size: int, condition: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """What every position knows besides the codes before it: where it is, the class, the coarser levels. `(B, T, W)`."""
        where = self.positions().expand(batch_size, -1, -1)
        context = (
            self.labels(labels)[:, None]
            if self.labels is not None
            else torch.zeros_like(where[:, :1])
        )
        return (
            where
            + context
            + (self.condition(condition, context) if self.condition is not None else 0)
        )

    def attention(self) -> Attention:
        """See `Prior.attention`."""
        block = cast(Block, self.blocks[0])
        return Attention(
            block.num_heads, self.config.network.width // block.num_heads, block.window
        )

    def start(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> SamplingState:
        """Run the condition network once, pack the weights, and take the caches."""
        background = self.background(batch_size, condition, labels)
        heads, width = self.config.network.num_heads, self.config.network.width
        return SamplingState(
            background=background,
            blocks=[
                (
                    cast(Block, pack_linears(block, batch_size, dtype)),
                    KVCache(
                        batch_size,
                        heads,
                        background.shape[1],
                        width // heads,
                        background,
                        window=block.window,
                    ),
                )
                for block in cast(Sequence[Block], self.blocks)
            ],
            output=pack_linears(nn.Sequential(self.norm, self.head), batch_size, dtype),
        )

    def step(self, state: SamplingState, position: int | Tensor, previous: Tensor | None) -> Tensor:
        """Logits `(B, K)` of one position; see `Prior.step`. It may be given as a tensor `(1,)`: then no shape depends on it."""
        background = _at(state.background, position)
        if previous is None:
            previous = torch.full((len(background),), self.codebook_size, device=background.device)
        x = self.embedding(previous)[:, None] + background
        angles = _at(self.angles, position)
        for block, cache in state.blocks:
            x = block(x, angles, cache, position)
        return state.output(x)[:, 0]

    def start_static(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> SamplingState:
        """See `StaticPrior.start_static`."""
        state = self.start(batch_size, condition, labels, dtype=dtype)
        hold_still(
            state.background,
            *(buffer for _, cache in state.blocks for buffer in (cache.keys, cache.values)),
        )
        return state

    def restart(
        self, state: SamplingState, condition: Sequence[Tensor], labels: Tensor | None
    ) -> None:
        """See `StaticPrior.restart`. What the caches hold of later positions is not attended to."""
        state.background.copy_(self.background(len(state.background), condition, labels))

    def step_static(self, state: SamplingState, position: Tensor, previous: Tensor) -> Tensor:
        """See `StaticPrior.step_static`."""
        return self.step(state, position, previous)


def _at(features: Tensor, position: int | Tensor) -> Tensor:
    """`(B, T, W)` at one position, `(B, 1, W)`."""
    return (
        features.index_select(1, position)
        if isinstance(position, Tensor)
        else features[:, position : position + 1]
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Positions):
        nn.init.normal_(module.rows, std=0.02)
        nn.init.normal_(module.columns, std=0.02)
