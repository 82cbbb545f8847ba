"""Configuration of stage 2. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from vqvae2.common.config import TrainingConfig, check, may_change


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The network of a transformer prior."""

    width: int = 256
    """Features per position."""
    num_layers: int = 8
    """Causal blocks."""
    num_heads: int = 4
    """Attention heads; they divide the width."""
    num_condition_layers: int = 2
    """Blocks of the network that reads the coarser levels' codes (it sees all of them, so it is not causal)."""
    dropout: float = 0.1
    """Dropout after attention and MLP."""
    attention_rows: int = 0
    """Each position attends to this many rows above it only, which saves memory and time on large grids; 0 for all."""
    checkpoint_activations: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: a third slower, much less memory."""

    def __post_init__(self) -> None:
        fits = self.num_heads >= 1 and self.width >= 1 and self.width % (4 * self.num_heads) == 0
        check(fits, "width", self.width, f"divisible by 4 x num_heads = {4 * self.num_heads}")
        check(self.attention_rows >= 0, "attention_rows", self.attention_rows, "0 (all) or more")
        check(self.num_layers >= 1, "num_layers", self.num_layers, "at least 1")
        check(
            self.num_condition_layers >= 0,
            "num_condition_layers",
            self.num_condition_layers,
            "0 or more",
        )
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig:
    """The network of a PixelSNAIL prior, the paper's."""

    width: int = 128
    """Feature channels."""
    residual_channels: int = 128
    """Channels inside a gated residual block."""
    num_blocks: int = 2
    """Blocks, each a stack of gated residual blocks and (with num_heads above 0) one attention."""
    num_residual_blocks: int = 4
    """Gated residual blocks of two causal convolutions each, per block."""
    kernel_size: int = 5
    """Columns that a causal convolution sees; it sees half as many rows above and positions to the left. Odd."""
    num_heads: int = 4
    """Attention heads; 0 for no attention, as on the paper's large grids."""
    num_condition_blocks: int = 4
    """Residual blocks of the network that reads the coarser levels' codes, for each of these levels."""
    num_output_blocks: int = 0
    """Gated 1x1 residual blocks between the last block and the logits."""
    dropout: float = 0.1
    """Dropout inside residual blocks and after attention."""

    def __post_init__(self) -> None:
        check(self.width >= 2 and self.width % 2 == 0, "width", self.width, "an even number")
        check(
            self.residual_channels >= 1, "residual_channels", self.residual_channels, "at least 1"
        )
        check(self.num_blocks >= 1, "num_blocks", self.num_blocks, "at least 1")
        check(
            self.num_residual_blocks >= 1,
            "num_residual_blocks",
            self.num_residual_blocks,
            "at least 1",
        )
        check(
            self.kernel_size >= 3 and self.kernel_size % 2 == 1,
            "kernel_size",
            self.kernel_size,
            "an odd number from 3 on",
        )
        heads = self.num_heads
        check(
            heads == 0 or (heads > 0 and self.width // 2 % heads == 0),
            "num_heads",
            heads,
            f"0, or a divisor of half the width = {self.width // 2}",
        )
        check(
            self.num_condition_blocks >= 0,
            "num_condition_blocks",
            self.num_condition_blocks,
            "0 or more",
        )
        check(self.num_output_blocks >= 0, "num_output_blocks", self.num_output_blocks, "0 or more")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The facts about a prior's codes, which come from the code dataset's manifest and never from a flag. Each family adds its network."""

    level: int
    """Which level it models: 0 is the top. The levels before it are its condition."""
    grids: tuple[tuple[int, ...], ...]
    """`(h, w)` of level 0 up to this one."""
    codebook_sizes: tuple[int, ...]
    """K of level 0 up to this one."""
    class_names: tuple[str, ...] = ()
    """Names of the classes it is conditioned on; empty for none."""
    label_dropout: float = 0.0
    """Share of the training rows whose label was hidden; above 0, labels may be left out and guidance is possible."""
    encoder_hash: str = ""
    """Content hash of the encoder that made the codes."""
    codes_hash: str = ""
    """Content hash of the code dataset that it was trained on."""

    def __post_init__(self) -> None:
        check(
            len(self.grids) == len(self.codebook_sizes) == self.level + 1,
            "grids",
            self.grids,
            f"one (h, w) for each level from 0 to {self.level}",
        )
        for coarse, fine in zip(self.grids[:-1], self.grids[1:], strict=True):
            check(
                all(f % c == 0 for c, f in zip(coarse, fine, strict=True)),
                "grids",
                self.grids,
                "whole multiples of the next coarser grid",
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when unconditional."""
        return len(self.class_names)

    @property
    def num_positions(self) -> int:
        """Codes per image on this level."""
        height, width = self.grids[-1]
        return height * width


@dataclass(frozen=True, kw_only=True)
class TransformerPriorConfig(PriorConfig):
    """A transformer prior."""

    network: TransformerConfig = field(default_factory=TransformerConfig)
    """Sizes of the network."""


@dataclass(frozen=True, kw_only=True)
class PixelSNAILPriorConfig(PriorConfig):
    """A PixelSNAIL prior."""

    network: PixelSNAILConfig = field(default_factory=PixelSNAILConfig)
    """Sizes of the network."""


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig(TrainingConfig):
    """Train the prior of one level (stage 2) on a code dataset.

    Example: vqvae2 train-prior --codes runs/photos/codes --level top --output-dir runs/photos/prior_0
    """

    codes: str = may_change()
    """The code dataset that `vqvae2 extract` wrote."""
    level: str
    """top, bottom, or the level's number (0 is the top)."""
    output_dir: str = may_change()
    """Folder of this run: model, metrics, pictures, checkpoints. The same command again continues it."""
    family: Literal["transformer", "pixelsnail"] = "transformer"
    """transformer: attention over the codes in raster order. pixelsnail: the paper's causal convolutions with attention between them."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """Sizes of the network, for family transformer; the other family leaves it unread."""
    pixelsnail: PixelSNAILConfig = field(default_factory=PixelSNAILConfig)
    """Sizes of the network, for family pixelsnail; the other family leaves it unread."""
    codes_cache: str | None = may_change(None)
    """Where a code dataset of more than 2 GiB is decoded to, once, and read from: a fast local disk. In the dataset's own folder if not given."""
    class_conditional: bool = True
    """Condition on the class labels where the code dataset has them."""
    label_dropout: float = 0.1
    """Share of the rows whose label is hidden, so that the prior learns to do without, which classifier-free guidance needs."""
    token_corruption: float = 0.0
    """Share of the codes that are replaced by random ones where they are read (not where they are predicted): sampling then survives its own mistakes."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay, on matrices only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")
        check(
            0 <= self.token_corruption < 1, "token_corruption", self.token_corruption, "in [0, 1)"
        )
