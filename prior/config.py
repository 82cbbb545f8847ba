"""Configuration of stage 2. Torch-free."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vqvae2.common.config import (
    MOST,
    MOST_CODES,
    MOST_LAYERS,
    MOST_WIDTH,
    Config,
    TrainingConfig,
    added,
    check,
    check_between,
    check_share,
    may_change,
    newer,
)
from vqvae2.common.vocabulary import (
    LONGEST_VECTOR,
    ORIGINAL,
    describe_grids,
    describe_vectors,
)

LONGEST_SIDE = 4096  # rows or columns of codes
MOST_LEVELS = 16


# The transformer that learns so many training rows without memorising them: rows below which it is
# chosen, width, layers and dropout. See "How large a prior for how many images" in docs/results.md.
SIZES = ((4000, 128, 3, 0.2), (40_000, 192, 4, 0.1), (math.inf, 256, 6, 0.1))
HEAD_WIDTH = 64  # features per head, if the number of heads is not given


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Config):
    """The network of a transformer prior, whose size is chosen by the number of training rows where
    it is not given."""

    width: int | None = None
    """Features per position. By default 128 below 4,000 training rows, 192 below 40,000, else 256.
    """
    num_layers: int | None = None
    """Causal blocks. By default 3, 4 or 6, likewise."""
    num_heads: int | None = None
    """Attention heads; the width must be a multiple of 4 times their number. By default one for
    64 features, or fewer."""
    num_condition_layers: int = 2
    """Blocks of the network that reads the coarser levels' codes; they see all positions."""
    dropout: float | None = None
    """Dropout after attention and MLP. By default 0.2 below 4,000 training rows, else 0.1."""
    reads_neighbours: bool = newer(True, before=False)
    """Feed each position the codes that touch it, left and above, which attention alone would have
    to find: it learns sooner."""
    attention_rows: int = 0
    """Attend to this many rows above only, to save memory and time on large grids; 0 for all."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: a third slower, much less memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("width", MOST_WIDTH), ("num_layers", MOST_LAYERS), ("num_heads", MOST)):
            if getattr(self, name) is not None:
                check_between(self, 1, most, name)
        factor = 4 * (self.num_heads or 1)
        fits = self.width is None or self.width % factor == 0
        check(fits, "width", self.width, f"divisible by 4 x num_heads = {factor}")
        check_between(self, 0, MOST_LAYERS, "num_condition_layers")
        check_between(self, 0, LONGEST_SIDE, "attention_rows")
        if self.dropout is not None:
            check_share(self, "dropout")

    def like(self, other: "TransformerOptions") -> "TransformerOptions":
        """With the sizes of another network where none are given. Raises a `UserError` if they do
        not suit each other."""
        names = ("width", "num_layers", "num_heads", "dropout")
        missing = ["reads_neighbours", *(name for name in names if getattr(self, name) is None)]
        return replace(self, **{name: getattr(other, name) for name in missing})

    def for_rows(self, number: int) -> "TransformerConfig":
        """The network for this many training rows. Raises a `UserError` for a number of heads that
        does not suit the width."""
        _, width, num_layers, dropout = next(size for size in SIZES if number < size[0])
        width = self.width or width
        most = max(1, width // HEAD_WIDTH)
        heads = max((n for n in range(1, most + 1) if width % (4 * n) == 0), default=1)
        return TransformerConfig(
            width=width,
            num_layers=self.num_layers or num_layers,
            num_heads=self.num_heads or heads,
            num_condition_layers=self.num_condition_layers,
            dropout=dropout if self.dropout is None else self.dropout,
            reads_neighbours=self.reads_neighbours,
            attention_rows=self.attention_rows,
            checkpoint_activations=self.checkpoint_activations,
        )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerOptions):
    """The network of a transformer prior, whatever the number of rows."""

    width: int = 256
    num_layers: int = 8
    num_heads: int = 4
    dropout: float = 0.1
    reads_neighbours: bool = added(True, earlier=False)


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig(Config):
    """The network of a PixelSNAIL prior, the paper's."""

    width: int = 128
    """Feature channels."""
    residual_channels: int = 128
    """Channels inside a gated residual block."""
    num_blocks: int = 2
    """Blocks: each a stack of gated residual blocks, and one attention if num_heads is above 0."""
    num_residual_blocks: int = 4
    """Gated residual blocks of two causal convolutions each, per block."""
    kernel_size: int = 5
    """Columns that a causal convolution sees, odd; it sees half as many rows above."""
    num_heads: int = 4
    """Attention heads; 0 for no attention, as on the paper's large grids."""
    num_condition_blocks: int = 4
    """Residual blocks that read the coarser levels' codes, for each of these levels."""
    num_output_blocks: int = 0
    """Gated 1x1 residual blocks between the last block and the logits."""
    dropout: float = 0.1
    """Dropout inside residual blocks and after attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, size, heads = self.width, self.kernel_size, self.num_heads
        check(width >= 2 and width % 2 == 0, "width", width, "an even number")
        check(size in range(3, 256, 2), "kernel_size", size, "an odd number from 3 to 255")
        fits = heads == 0 or (heads > 0 and width // 2 % heads == 0)
        check(fits, "num_heads", heads, f"0, or a divisor of half the width = {width // 2}")
        check_between(self, 1, MOST_WIDTH, "width", "residual_channels")
        check_between(self, 1, MOST_LAYERS, "num_blocks", "num_residual_blocks")
        check_between(self, 0, MOST_LAYERS, "num_condition_blocks", "num_output_blocks")
        blocks = self.num_blocks * self.num_residual_blocks
        check(blocks <= MOST_LAYERS, "num_blocks x num_residual_blocks", blocks, "at most 1,000")
        check_share(self, "dropout")


def check_codes(config: Any) -> None:
    """`check` that each level's grid and number of codes are possible ones."""
    for grid in config.grids:
        fits = len(grid) == 2 and 1 <= min(grid) <= max(grid) <= LONGEST_SIDE
        check(fits, "grids", config.grids, f"(h, w) from 1 to {LONGEST_SIDE} per level")
    check_between(config, 1, MOST_CODES, "codebook_sizes")


def check_vectors(config: Any) -> None:
    """`check` that the vectors have a possible length, and as many names, if any."""
    check_between(config, 0, LONGEST_VECTOR, "vector_size")
    fits = len(config.vector_names) in (0, config.vector_size)
    check(fits, "vector_names", config.vector_names, f"{config.vector_size} names, or none")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Config):
    """What a prior's codes are, from the code dataset's manifest; each family adds its network."""

    level: int  #: 0 is the top; the levels before it are its condition
    grids: tuple[tuple[int, ...], ...]  #: (h, w) of level 0 up to this one
    codebook_sizes: tuple[int, ...]  #: K of level 0 up to this one
    class_names: tuple[str, ...] = ()  #: of the classes it is conditioned on; empty for none
    label_dropout: float = 0.0  #: share of hidden labels; above 0, sampling may do without labels
    encoder_hash: str = ""  #: content hash of the encoder that made the codes
    codes_hash: str = ""  #: content hash of the code dataset that it was trained on
    vector_size: int = added(0)  #: length V of the vectors it is conditioned on besides; 0 for none
    vector_names: tuple[str, ...] = added(())  #: of attributes, what the V places stand for
    views: tuple[str, ...] = added(())  #: of images, besides the original, that it is told apart

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, MOST_LEVELS - 1, "level")
        fits = len(self.grids) == len(self.codebook_sizes) == self.level + 1
        fits = fits and all(len(grid) == 2 and min(grid) >= 1 for grid in self.grids)
        check(fits, "grids", self.grids, f"one (h, w) for each level from 0 to {self.level}")
        check_codes(self)
        check_vectors(self)
        check_share(self, "label_dropout")
        different = len({ORIGINAL, *self.views}) == 1 + len(self.views)
        check(different, "views", self.views, f"different views, and not {ORIGINAL}")
        for coarse, fine in zip(self.grids[:-1], self.grids[1:], strict=True):
            fits = all(f % c == 0 for c, f in zip(coarse, fine, strict=True))
            check(fits, "grids", self.grids, "whole multiples of the next coarser grid")

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when unconditional."""
        return len(self.class_names)

    @property
    def can_be_guided(self) -> bool:
        """Whether it knows classes or vectors, and what comes without them."""
        return bool(self.num_classes or self.vector_size) and self.label_dropout > 0

    @property
    def num_positions(self) -> int:
        """Codes per image on this level."""
        return math.prod(self.grids[-1])

    def summary(self) -> str:
        """Codes and classes in a few words."""
        *coarser, own = describe_grids(self.grids, self.codebook_sizes)
        given = f" given {' + '.join(coarser)}" if coarser else ""
        summary = f"level {self.level}, codes {own}{given}, {self.num_classes or 'no'} classes"
        vectors = describe_vectors(self.vector_size, self.vector_names)
        return f"{summary}, {vectors}" if self.vector_size else summary


@dataclass(frozen=True, kw_only=True)
class TransformerPriorConfig(PriorConfig):
    """A transformer prior."""

    network: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass(frozen=True, kw_only=True)
class PixelSNAILPriorConfig(PriorConfig):
    """A PixelSNAIL prior."""

    network: PixelSNAILConfig = field(default_factory=PixelSNAILConfig)


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig(TrainingConfig):
    """Train the prior of one level (stage 2) on a code dataset.

    Example: vqvae2 train-prior --codes runs/a/codes --level top --output-dir runs/a/prior_0
    """

    codes: str = may_change()
    """The code dataset that `vqvae2 extract` wrote."""
    level: str
    """top, bottom, or the level's number (0 is the top)."""
    output_dir: str = may_change()
    """Folder of this run: model, metrics, pictures, checkpoints. Repeat the command to resume."""
    family: Literal["transformer", "pixelsnail"] = "transformer"
    """transformer: attention over all codes. pixelsnail: the paper's convolutions and attention."""
    transformer: TransformerOptions = field(default_factory=TransformerOptions)
    """The network of the family transformer."""
    pixelsnail: PixelSNAILConfig = field(default_factory=PixelSNAILConfig)
    """The network of the family pixelsnail."""
    codes_cache: str | None = may_change(None)
    """Folder on a fast local disk for decoded codes above 2 GiB; by default the dataset's own."""
    class_conditional: bool = True
    """Condition on the class labels where the code dataset has them. (Condition vectors are used in
    any case, with labels or without.)"""
    view_conditional: bool = newer(True, before=False)
    """Where rows are mirrored and cropped images, too (`vqvae2 extract --views`), tell the prior
    which view each is: it learns from all of them, and samples originals. (A fine-tuning does as
    its first weights.)"""
    label_dropout: float = 0.1
    """Share of rows whose label is hidden in training, which classifier-free guidance needs;
    likewise for condition vectors, together with the label or alone."""
    token_corruption: float = 0.0
    """Share of codes replaced by random ones in what the prior reads, not in what it predicts:
    sampling then tolerates its own mistakes."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on matrices only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_dropout", "token_corruption")
