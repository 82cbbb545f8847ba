"""PixelSNAIL (Chen, Mishra, Rohaninejad, Abbeel 2018): causal convolutions and causal attention.

Features are `(B, h, w, W)`. Letters: B batch, h w code grid, T = h*w positions in raster order,
W width, R residual channels, K codebook size, k kernel size, r = k//2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from prior.attention import Attention, KVCache, attend
from prior.base import Prior
from prior.causal_conv import CausalConv, CausalConvSteps, Conv3x3
from prior.config import PixelSNAILConfig, PixelSNAILPriorConfig
from prior.cuda_graphs import at
from prior.packed_linear import pack_linears
from prior.vector import VectorNetwork, ViewNetwork

Layer = Callable[[int, int], nn.Module]  # from numbers of input and output features
read_earlier = partial(attend, causal=True)


class GatedBlock(nn.Module):
    """x + a * sigmoid(b), where a and b come from two layers over x: PixelSNAIL's residual block.

    The gate is that of van den Oord et al. 2016 (equation 4) without the tanh. A context of this
    many features (0 for none) shifts a and b; a second input `beside` joins the hidden features.
    """

    def __init__(
        self, size: int, hidden: int, make: Layer, dropout: float, context: int = 0, beside: int = 0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.first, self.second = make(size, hidden), make(hidden, 2 * size)
        self.from_context = nn.Linear(context, 2 * size, bias=False) if context else None
        self.from_beside = nn.Linear(beside, hidden, bias=False) if beside else None

    def forward(self, x: Tensor, context: Any = None, beside: Any = None) -> Tensor:
        """`(..., size)` to the same; leading dimensions of context and beside may be 1."""
        hidden = self.first(F.elu(x))
        if self.from_beside is not None:
            hidden = hidden + self.from_beside(F.elu(beside))
        gated = self.second(F.dropout(F.elu(hidden), self.dropout, self.training))
        if self.from_context is not None:
            gated = gated + self.from_context(context)
        return x + F.glu(gated, dim=-1)


class CausalAttention(nn.Module):
    """The attention block of PixelSNAIL: each position reads all positions up to itself.

    Keys and values come from the code just before a position, its features and its coordinates,
    queries from the latter two. None of these contains its own code, so it may attend to itself.
    """

    def __init__(self, config: PixelSNAILConfig) -> None:
        super().__init__()
        width, half, dropout = config.width, config.width // 2, config.dropout
        self.num_heads, self.dropout = config.num_heads, dropout
        self.read_keys = GatedBlock(2 * width + 2, width, nn.Linear, dropout)
        self.to_keys_values = nn.Linear(2 * width + 2, 2 * half)
        self.read_queries = GatedBlock(width + 2, width, nn.Linear, dropout)
        self.to_queries = nn.Linear(width + 2, half)
        self.merge = GatedBlock(width, width, nn.Linear, dropout, beside=half)

    def forward(
        self, x: Tensor, before: Tensor, places: Tensor, attend: Callable = read_earlier
    ) -> Tensor:
        """`(B, T, W)` to the same, by embeddings of the codes just before, `(B, T, W)`, and
        coordinates `(B, T, 2)`. In sampling T = 1, and `attend` is that of the cache."""
        placed = torch.cat([x, places], dim=-1)
        q = self.to_queries(self.read_queries(placed))
        kv = self.to_keys_values(self.read_keys(torch.cat([before, placed], dim=-1)))
        heads = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, *kv.chunk(2, dim=-1)))
        attended = attend(*(y.transpose(1, 2) for y in heads))  # (B, n, T, d), like q, k and v
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, W/2)
        return self.merge(x, beside=F.dropout(attended, self.dropout, self.training))


class ConditionNetwork(nn.Module):
    """Reads the codes of all coarser levels, from coarse to fine: a level's codes are added to the
    result of the levels before it, residual blocks (the conditioning stack of the VQ-VAE-2 paper,
    section 3.2) read the sum, and each position is repeated over the finer ones it covers, plus an
    offset for each of these."""

    def __init__(self, config: PixelSNAILPriorConfig) -> None:
        super().__init__()
        network, width = config.network, config.network.width
        self.embeddings = nn.ModuleList(nn.Embedding(k, width) for k in config.codebook_sizes[:-1])
        self.stacks, self.offsets = nn.ModuleList(), nn.ParameterList()
        for coarse, fine in zip(config.grids[:-1], config.grids[1:], strict=True):
            sizes = (width, network.residual_channels, Conv3x3, network.dropout)
            blocks = (GatedBlock(*sizes) for _ in range(network.num_condition_blocks))
            self.stacks.append(nn.Sequential(*blocks))
            up, across = fine[0] // coarse[0], fine[1] // coarse[1]
            self.offsets.append(nn.Parameter(torch.zeros(up, across, width)))

    def forward(self, condition: Sequence[Tensor], context: Tensor) -> Tensor:
        """Coarser codes `(B, h', w')` each, and a context `(B, 1, 1, W)`, to `(B, h, w, W)`."""
        x = context
        networks = zip(condition, self.embeddings, self.stacks, self.offsets, strict=True)
        for codes, embedding, stack, offsets in networks:
            x = stack(x + embedding(codes))  # (B, h', w', W)
            up, across, _ = offsets.shape
            x = repeat(x, "b h w c -> b (h up) (w across) c", up=up, across=across)
            x = x + offsets.repeat(*codes.shape[1:], 1)
        return x


class Block(nn.Module):
    """Gated residual blocks of causal convolutions, then one attention if the network has any."""

    def __init__(self, config: PixelSNAILConfig, *, context: int) -> None:
        super().__init__()
        conv = partial(CausalConv, kernel_size=config.kernel_size)
        sizes = (config.width, config.residual_channels, conv, config.dropout, context)
        residuals = (GatedBlock(*sizes) for _ in range(config.num_residual_blocks))
        self.residuals = nn.ModuleList(residuals)
        self.attention = CausalAttention(config) if config.num_heads else None

    def forward(self, x: Tensor, before: Tensor, places: Tensor, context: Tensor) -> Tensor:
        """`(B, h, w, W)` to the same; the rest as in `GatedBlock` and `CausalAttention`."""
        for residual in self.residuals:
            x = residual(x, context)
        if self.attention is None:
            return x
        return self.attention(x.flatten(1, 2), before, places).unflatten(1, x.shape[1:3])


class GatedBlockSteps:
    """A causal `GatedBlock`, position after position."""

    def __init__(self, block: Any, batch_size: int, width: int, dtype: torch.dtype) -> None:
        self.first = CausalConvSteps(block.first, batch_size, width, dtype)
        self.second = CausalConvSteps(block.second, batch_size, width, dtype)
        rows = batch_size * width
        self.from_context = block.from_context and pack_linears(block.from_context, rows, dtype)

    def start_row(self, context: Tensor) -> None:
        """Move on to the next row, whose context is `(B, w, W)` or `(B, 1, W)`."""
        self.first.start_row()
        self.second.start_row(None if self.from_context is None else self.from_context(context))

    def step(self, x: Tensor, places: Tensor) -> Tensor:
        """`(B, W)` to the same; places as in `CausalConvSteps.output`."""
        own = places[-1:]
        self.first.put(F.elu(x), own)
        self.second.put(F.elu(self.first.output(places)), own)
        return x + F.glu(self.second.output(places))


class SamplingState(NamedTuple):
    """What a PixelSNAIL keeps between positions."""

    embedding: Tensor  # (K + 1, W); the last, zeros, stands before the first position
    places: Tensor  # (r + 1,), those of column 0: see CausalConvSteps.output
    context: Tensor  # (B, h, w, W) or (B, 1, 1, W): the class and the coarser codes
    stem: CausalConvSteps
    blocks: list[tuple[list[GatedBlockSteps], nn.Module | None, KVCache]]
    output: nn.Module  # from features to logits (packed)


class PixelSNAIL(Prior):
    """The PixelSNAIL prior of any level. The class and the coarser codes shift the gates of all
    residual blocks. The stem leaves out a position's own code, and attention gets the one before.
    """

    config_class = PixelSNAILPriorConfig
    config: PixelSNAILPriorConfig
    fixed_shapes = True
    places: Tensor

    def __init__(self, config: PixelSNAILPriorConfig) -> None:
        super().__init__()
        self.config = config
        network, classes, width = config.network, config.num_classes, config.network.width

        # What positions read: codes, the class (the last entry means no label), coarser codes.
        self.codebook_size = config.codebook_sizes[-1]
        self.embedding = nn.Embedding(self.codebook_size, width)
        self.labels = nn.Embedding(classes + 1, width) if classes else None
        self.condition = ConditionNetwork(config) if config.level else None
        self.vector = VectorNetwork(config.vector_size, width) if config.vector_size else None
        self.views = ViewNetwork(len(config.views), width) if config.views else None
        read = (self.labels, self.condition, self.vector, self.views)
        context = width if any(part is not None for part in read) else 0

        # The causal network and its head.
        self.stem = CausalConv(width, width, network.kernel_size, strict=True)
        blocks = (Block(network, context=context) for _ in range(network.num_blocks))
        self.blocks = nn.ModuleList(blocks)
        sizes = (width, network.residual_channels, nn.Linear, network.dropout)
        gated = (GatedBlock(*sizes) for _ in range(network.num_output_blocks))
        self.output = nn.Sequential(*gated, nn.ELU(), nn.Linear(width, self.codebook_size))

        # Coordinates from -1 to 1, for attention.
        rows, columns = (torch.linspace(-1, 1, size) for size in config.grids[-1])
        self.register_buffer("places", torch.cartesian_prod(rows, columns)[None], persistent=False)
        _initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster here

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        """Logits `(B, K, h, w)` of codes `(B, h, w)`; see `Prior.forward`."""
        context = self.context(len(codes), condition, labels, views)
        places = self.places.expand(len(codes), -1, -1)
        embedded = self.embedding(codes)
        before = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0))  # position t reads code t - 1
        x = self.stem(embedded)
        for block in self.blocks:
            x = block(x, before, places, context)
        return rearrange(self.output(x), "b h w k -> b k h w")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: all by AdamW, for with Muon it learned more slowly."""
        return [{"params": list(self.parameters()), "muon": False}]

    def context(
        self, batch_size: int, condition: Sequence[Tensor], labels: Any, views: Any = None
    ) -> Tensor:
        """The class, vector, view and coarser codes: `(B, h, w, W)`; on the top `(B, 1, 1, W)`."""
        context = self.places.new_zeros(batch_size, 1, 1, self.config.network.width)
        if self.labels is not None:
            context = self.labels(labels)[:, None, None]
        if self.vector is not None:
            *condition, vectors = condition
            context = context + self.vector(vectors)[:, None, None]
        if self.views is not None and views is not None:
            context = context + self.views(views)[:, None, None]
        return context if self.condition is None else self.condition(condition, context)

    def attention(self) -> Attention | None:
        """See `Prior.attention`."""
        heads = self.config.network.num_heads
        return Attention(heads, self.config.network.width // 2 // heads, 0) if heads else None

    def start(
        self, batch_size: int, condition: Any, labels: Any, *, dtype: torch.dtype = torch.float32
    ) -> SamplingState:
        """Run the condition network once, pack the weights, and take the buffers."""
        width, blocks = self.config.grids[-1][1], []
        for block in cast(Any, self.blocks):
            steps = [GatedBlockSteps(each, batch_size, width, dtype) for each in block.residuals]
            attention = block.attention and pack_linears(block.attention, batch_size, dtype)
            cache = KVCache(self.config.num_positions, dtype=dtype)
            blocks.append((steps, attention, cache))
        embedding = F.pad(self.embedding.weight, (0, 0, 0, 1))
        places = torch.arange(self.stem.reach + 1, device=self.device)
        context = self.context(batch_size, condition, labels)
        stem = CausalConvSteps(self.stem, batch_size, width, dtype)
        output = pack_linears(self.output, batch_size, dtype)
        return SamplingState(embedding, places, context, stem, blocks, output)

    def start_row(self, state: SamplingState, position: int | Tensor, previous: Tensor) -> None:
        """What the rows above and the context give to a whole row; see `Prior.start_row`."""
        width, context = self.config.grids[-1][1], state.context
        state.stem.put(F.embedding(previous, state.embedding), state.places[-1:] + (width - 1))
        state.stem.start_row()
        row = position // width % context.shape[1]
        row_context = at(context, row)[:, 0]  # (B, w, W) or (B, 1, W)
        for residuals, _, _ in state.blocks:
            for residual in residuals:
                residual.start_row(row_context)

    def step(self, state: SamplingState, position: int | Tensor, previous: Tensor) -> Tensor:
        """Logits `(B, 1, K)` of one position; see `Prior.step`."""
        width, previous = self.config.grids[-1][1], previous[:, 0]
        if isinstance(position, int) and position % width == 0:
            self.start_row(state, position, previous)

        # The stem reads the code before. At the start of a row that belongs to the row above and is
        # read already; its place here, the last one, is overwritten before it is read.
        before = F.embedding(previous, state.embedding)  # (B, W)
        state.stem.put(before, state.places[-1:] + (position - 1) % width)
        places = state.places + position % width
        x = state.stem.output(places)  # (B, W)

        coordinates = at(self.places, position).expand(len(x), -1, -1)  # (B, 1, 2)
        # (As a tensor from the CPU, a number would make the host wait for the GPU.)
        if not isinstance(position, Tensor):
            position = torch.full((1,), position, device=x.device)
        at_once = position.expand(len(x), 1)
        slots = None
        for residuals, attention, cache in state.blocks:
            for residual in residuals:
                x = residual.step(x, places)
            if attention is not None:
                slots = slots or cache.slots(at_once, cast(Any, attention).num_heads, x)
                cached = partial(cache.attend, slots)
                x = attention(x[:, None], before[:, None], coordinates, cached)[:, 0]
        return state.output(x)[:, None]


def _initialise(prior: PixelSNAIL) -> None:
    """Layers keep the variance of their input, residual branches and logits start small."""
    gated = [module for module in prior.modules() if isinstance(module, GatedBlock)]
    for module in prior.modules():
        if isinstance(module, CausalConv | Conv3x3 | nn.Linear):
            weights = [each for each in module.parameters() if each.ndim > 1]
            fan_in = sum(weight[0].numel() for weight in weights)  # a CausalConv's are one sum
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=fan_in**-0.5)
                else:
                    nn.init.zeros_(parameter)
        elif isinstance(module, ConditionNetwork):
            for offsets in module.offsets:
                nn.init.normal_(offsets, std=0.02)
    with torch.no_grad():
        for block in gated:
            for parameter in block.second.parameters():
                parameter.mul_(len(gated) ** -0.5)
        cast(nn.Linear, prior.output[-1]).weight.mul_(0.1)
