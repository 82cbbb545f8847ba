"""A causal transformer over one level's codes, conditioned on the coarser levels, and perhaps on a
class label and a condition vector.

Letters: B batch, h w code grid, T = h*w positions, W width, n heads, d = W/n, K codebook size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prior.attention import Attention, KVCache, Slots, attend
from prior.base import Prior
from prior.config import TransformerConfig, TransformerPriorConfig
from prior.dropout import add_dropped
from prior.packed_linear import pack_linears
from prior.rms_norm import RMSNorm, rms_norm
from prior.vector import VectorNetwork, ViewNetwork


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), as in Llama (Touvron et al. 2023): RMSNorm,
    rotary positions and SwiGLU. Queries and keys are normalised (Dehghani et al. 2023, section
    2.1), which keeps their product from growing without bound."""

    def __init__(self, config: TransformerConfig, grid: tuple[int, ...], *, causal: bool) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.num_heads
        # SwiGLU has three matrices: 8/3 W, a multiple of 8, makes them as large as two of 4 W.
        hidden = -(-8 * width // 24) * 8
        self.causal, self.num_heads, self.dropout = causal, config.num_heads, config.dropout
        self.window = config.attention_rows * grid[1] if causal else 0
        self.norm_attention, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.scale_qk = nn.Parameter(torch.ones(2 * head_dim))
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Tensor, angles: Tensor, cache: KVCache | None = None, slots: Slots | None = None
    ) -> Tensor:
        """`(B, T, W)` to the same, by angles `(2, T, d)`; with a cache, T positions at its slots,
        and angles `(2, B, 1, T, d)`."""
        # Attention: every head reads the earlier positions.
        qkv = self.to_qkv(self.norm_attention(x)).unflatten(2, (3, self.num_heads, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, T, 3, n, d) to (3, B, n, T, d)
        q, k = self._normalise_and_turn(qkv[:2], angles)  # (B, n, T, d) each
        if cache is None or slots is None:
            attended = attend(q, k, qkv[2], causal=self.causal, window=self.window)
        else:
            attended = cache.attend(slots, q, k, qkv[2])
        merged = attended.transpose(1, 2).flatten(2)  # (B, T, W)
        x = add_dropped(x, self.from_heads(merged), self.dropout, training=self.training)

        # MLP: every position by itself.
        gate, up = self.gate_and_up(self.norm_mlp(x)).chunk(2, dim=-1)  # (B, T, hidden) each
        branch = self.down(F.silu(gate) * up)
        return add_dropped(x, branch, self.dropout, training=self.training)

    def _normalise_and_turn(self, qk: Tensor, angles: Tensor) -> Tensor:
        """Queries and keys `(2, B, n, T, d)` to the same, in at least fp32 even under autocast."""
        exact = qk.to(torch.promote_types(qk.dtype, torch.float32))
        exact = rms_norm(exact) * self.scale_qk.view(2, 1, 1, 1, -1)
        # Each pair (i, i + d/2) of the features turns by its angle.
        cosines, sines = angles
        partners = exact.roll(exact.shape[-1] // 2, dims=-1)
        return torch.addcmul(exact * cosines, partners, sines).to(qk.dtype)


def rotary_angles(grid: tuple[int, ...], head_dim: int) -> Tensor:
    """Cosines and signed sines `(2, T, d)` of the angles by which queries and keys turn: rotary
    positions (Su et al. 2021), half of the features for the row and half for the column."""
    # Grids are small: the slowest angle grows by less than one radian in 64 rows.
    speeds = 100.0 ** -torch.linspace(0, 1, head_dim // 4)
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))  # (T, 2)
    angles = (places[..., None] * speeds).flatten(1)  # (T, 2, d/4) to (T, d/2)
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosines, cosines], dim=1), torch.cat([-sines, sines], dim=1)])


class Positions(nn.Module):
    """A learned vector per row plus one per column of a grid."""

    def __init__(self, height: int, width: int, features: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(height, features))
        self.columns = nn.Parameter(torch.zeros(width, features))

    def forward(self) -> Tensor:
        """`(T, W)` in raster order."""
        return rearrange(self.rows[:, None] + self.columns[None], "h w c -> (h w) c")


class Neighbours(nn.Module):
    """Features of the four codes before a position that touch it (left of it, and the three above),
    by a linear map of their embeddings. They tell most of what a code will be, and attention alone
    would need long to find them."""

    slots: Tensor

    def __init__(self, grid: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.map = nn.Linear(4 * width, width, bias=False)
        self.register_buffer("slots", neighbour_slots(grid), persistent=False)

    def tables(self, embedding: Tensor) -> Tensor:
        """The features `(4, K + 1, W)` of each code at each of the places: as there are fewer codes
        than positions in a batch, they are mapped first, and looked up then."""
        parts = self.map.weight.chunk(4, dim=1)
        tables = torch.stack([F.linear(embedding, part) for part in parts])
        # Not in bf16: there the sum of a frequent code's gradients would soon stop growing.
        return tables.to(embedding.dtype)

    def look_up(self, tables: Tensor, read: Tensor, places: Tensor | slice) -> Tensor:
        """Features `(B, W', W)` of these W' positions (`(B, W')`, or a slice for all images), by
        codes `(B, T + 1)`, of which number t is the one before position t."""
        slots = self.slots[places]  # (B, W', 4) or (W', 4)
        lanes = torch.arange(len(read), device=read.device)[:, None, None]
        codes = read[lanes, slots]  # (B, W', 4)
        features = [F.embedding(codes[..., i], table) for i, table in enumerate(tables)]
        return torch.stack(features).sum(dim=0)


def neighbour_slots(grid: tuple[int, ...]) -> Tensor:
    """Which codes lie left, above left, above and above right of each position, `(T, 4)`: 1 + their
    position in raster order, or 0 for outside of the grid."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    slots = []
    for up, aside in ((0, -1), (1, -1), (1, 0), (1, 1)):
        row, column = rows - up, columns + aside
        inside = (row >= 0) & (column >= 0) & (column < grid[1])
        slots.append(torch.where(inside, row * grid[1] + column + 1, 0))
    return torch.stack(slots, dim=-1).flatten(0, 1)


class ConditionNetwork(nn.Module):
    """Reads the codes of all coarser levels, from coarse to fine: a level's codes are added to what
    the levels before it gave, blocks that see the whole grid read the sum, and each position is
    repeated over the finer ones it covers."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        network, coarser = config.network, config.grids[:-1]
        width, head_dim = network.width, network.width // network.num_heads
        self.grids = config.grids
        self.embeddings = nn.ModuleList(nn.Embedding(k, width) for k in config.codebook_sizes[:-1])
        self.positions = nn.ModuleList(Positions(h, w, width) for h, w in coarser)
        self.blocks = nn.ModuleList()
        for level, grid in enumerate(coarser):
            # A single position has nothing to attend to.
            number = network.num_condition_layers if grid != (1, 1) else 0
            blocks = (Block(network, grid, causal=False) for _ in range(number))
            self.blocks.append(nn.ModuleList(blocks))
            angles = rotary_angles(grid, head_dim)
            self.register_buffer(f"angles_{level}", angles, persistent=False)
        self.norm = RMSNorm(width)

    def forward(self, condition: Sequence[Tensor], context: Tensor) -> Tensor:
        """Coarser codes `(B, h', w')` each, and a context `(B, 1, W)`, to `(B, T, W)`."""
        x = context
        for level, codes in enumerate(condition):
            embedded = self.embeddings[level](rearrange(codes, "b h w -> b (h w)"))
            x = x + embedded + self.positions[level]()  # (B, T', W), T' = h'*w'
            for block in cast(nn.ModuleList, self.blocks[level]):
                x = block(x, getattr(self, f"angles_{level}"))
            (h, w), finer = self.grids[level], self.grids[level + 1]
            sizes = {"h": h, "w": w, "up": finer[0] // h, "across": finer[1] // w}
            x = repeat(x, "b (h w) c -> b (h up w across) c", **sizes)  # one level finer
        return self.norm(x)


class SamplingState(NamedTuple):
    """What the transformer keeps between positions."""

    background: Tensor  # (B, T, W): a position's input, but for the level's own codes
    read: Tensor  # (B, T + 1): the code before each position, K for none
    neighbours: Tensor | None  # see `Neighbours.tables`
    blocks: list[tuple[Block, KVCache]]  # with packed weights; with its keys and values
    output: nn.Module  # from features to logits, with packed weights


class TransformerPrior(Prior):
    """The transformer prior of any level. A position's input is the code *before* it."""

    config_class = TransformerPriorConfig
    config: TransformerPriorConfig
    fixed_shapes, has_windows = True, True
    angles: Tensor

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        self.config = config
        network, grid, classes = config.network, config.grids[-1], config.num_classes
        width, layers = network.width, network.num_layers

        # A position's input. The last code means "before the first position", the last label none.
        self.codebook_size = config.codebook_sizes[-1]
        self.embedding = nn.Embedding(self.codebook_size + 1, width)
        self.neighbours = Neighbours(grid, width) if network.reads_neighbours else None
        self.positions = Positions(grid[0], grid[1], width)
        self.labels = nn.Embedding(classes + 1, width) if classes else None
        self.vector = VectorNetwork(config.vector_size, width) if config.vector_size else None
        self.views = ViewNetwork(len(config.views), width) if config.views else None
        self.condition = ConditionNetwork(config) if config.level else None

        # The causal network itself.
        self.blocks = nn.ModuleList(Block(network, grid, causal=True) for _ in range(layers))
        angles = rotary_angles(grid, width // network.num_heads)
        self.register_buffer("angles", angles, persistent=False)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, self.codebook_size)

        # Residual branches start small, the smaller the more there are (Radford et al. 2019).
        self.apply(_initialise)
        small = 0.02 / (2 * layers) ** 0.5
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.normal_(module.from_heads.weight, std=small)
                nn.init.normal_(module.down.weight, std=small)

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        """Logits `(B, K, h, w)` of codes `(B, h, w)`; see `Prior.forward`."""
        # Position t reads the code at t - 1.
        read = F.pad(rearrange(codes, "b h w -> b (h w)"), (1, 0), value=self.codebook_size)
        x = self.embedding(read[:, :-1]) + self.background(len(codes), condition, labels, views)
        if self.neighbours is not None:
            tables = self.neighbours.tables(self.embedding.weight)
            x = x + self.neighbours.look_up(tables, read, slice(None))  # (B, T, W)
        for block in self.blocks:
            if self.training and self.config.network.checkpoint_activations:
                x = checkpoint(block, x, self.angles, use_reentrant=False)
            else:
                x = block(x, self.angles)
        return rearrange(self.head(self.norm(x)), "b (h w) k -> b k h w", h=codes.shape[1])

    def background(
        self, batch_size: int, condition: Sequence[Tensor], labels: Any, views: Any = None
    ) -> Tensor:
        """The place, class, vector, view and coarser codes at every position, `(B, T, W)`."""
        where = self.positions().expand(batch_size, -1, -1)
        context = torch.zeros_like(where[:, :1])
        if self.labels is not None:
            context = self.labels(labels)[:, None]  # (B, 1, W)
        if self.vector is not None:
            *condition, vectors = condition
            context = context + self.vector(vectors)[:, None]
        if self.views is not None and views is not None:
            context = context + self.views(views)[:, None]
        coarser = self.condition(condition, context) if self.condition is not None else 0
        return where + context + coarser

    def attention(self) -> Attention:
        """See `Prior.attention`."""
        heads, block = self.config.network.num_heads, cast(Block, self.blocks[0])
        return Attention(heads, self.config.network.width // heads, block.window)

    def start(
        self,
        batch_size: int,
        condition: Any,
        labels: Any,
        *,
        dtype: torch.dtype = torch.float32,
        window: int = 1,
    ) -> SamplingState:
        """Compute once what depends on no code of this level, and pack the weights; see
        `Prior.start`."""
        blocks, rows = [], batch_size * window
        for block in cast(Sequence[Block], self.blocks):
            cache = KVCache(self.config.num_positions, window=block.window, dtype=dtype)
            blocks.append((cast(Block, pack_linears(block, rows, dtype)), cache))
        output = pack_linears(nn.Sequential(self.norm, self.head), rows, dtype)
        background = self.background(batch_size, condition, labels)
        shape = (batch_size, self.config.num_positions + 1)
        read = torch.full(shape, self.codebook_size, device=self.device)
        tables = None
        if self.neighbours is not None:
            tables = self.neighbours.tables(self.embedding.weight)
        return SamplingState(background, read, tables, blocks, output)

    def step(self, state: SamplingState, positions: Any, previous: Tensor) -> Tensor:
        """Logits `(B, W, K)` of windows of positions; see `Prior.step`."""
        places = positions[:, None] + torch.arange(previous.shape[1], device=previous.device)
        lanes = torch.arange(len(places), device=places.device)[:, None]
        x = self.embedding(previous) + state.background[lanes, places]  # (B, W, width)
        if self.neighbours is not None and state.neighbours is not None:
            state.read.scatter_(1, places, previous)
            x = x + self.neighbours.look_up(state.neighbours, state.read, places)
        angles = self.angles[:, places][:, :, None]  # (2, B, 1, W, d)
        slots = state.blocks[0][1].slots(places, self.config.network.num_heads, x)
        for block, cache in state.blocks:
            x = block(x, angles, cache, slots)
        return state.output(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Positions):
        nn.init.normal_(module.rows, std=0.02)
        nn.init.normal_(module.columns, std=0.02)
