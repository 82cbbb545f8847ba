"""Configuration of stage 2. Torch-free."""

from dataclasses import dataclass, field

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

    def __post_init__(self) -> None:
        check(self.num_heads >= 1 and self.width >= 1 and self.width % self.num_heads == 0, "width", self.width, f"divisible by num_heads = {self.num_heads}")
        check(self.num_layers >= 1, "num_layers", self.num_layers, "at least 1")
        check(self.num_condition_layers >= 0, "num_condition_layers", self.num_condition_layers, "0 or more")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A prior: its network, and the facts about its codes, which come from the code dataset's manifest and never from a flag."""

    level: int
    """Which level it models: 0 is the top. The levels before it are its condition."""
    grids: tuple[tuple[int, ...], ...]
    """`(h, w)` of level 0 up to this one."""
    codebook_sizes: tuple[int, ...]
    """K of level 0 up to this one."""
    class_names: tuple[str, ...] = ()
    """Names of the classes it is conditioned on; empty for none."""
    encoder_hash: str = ""
    """Content hash of the encoder that made the codes."""
    network: TransformerConfig = field(default_factory=TransformerConfig)
    """Sizes of the network."""

    def __post_init__(self) -> None:
        check(len(self.grids) == len(self.codebook_sizes) == self.level + 1, "grids", self.grids, f"one (h, w) for each level from 0 to {self.level}")
        for coarse, fine in zip(self.grids[:-1], self.grids[1:], strict=True):
            check(all(f % c == 0 for c, f in zip(coarse, fine, strict=True)), "grids", self.grids, "whole multiples of the next coarser grid")

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
    network: TransformerConfig = field(default_factory=TransformerConfig)
    """Sizes of the network."""
    class_conditional: bool = True
    """Condition on the class labels where the code dataset has them."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay, on matrices only."""
