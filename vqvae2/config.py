"""Configuration of stage 1. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

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
    recipe_only,
)
from vqvae2.common.vocabulary import describe_grids

LARGEST_SIDE = 1 << 14  # pixels of an image
MOST_CHANNELS = 1024  # of an image
MOST_WORKERS = 1024  # processes or threads
LONGEST_SHARD = 1 << 24  # rows


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig(Config):
    """How a file becomes an image. Part of the model: all stages prepare images in the same way."""

    size: tuple[int, ...] = (64,)
    """Height and width in pixels, or one number for both."""
    channels: int = 3
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha: picture files are converted to it. Arrays
    (.npy, TIFF) must have as many; grey ones may become RGB."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """Values of black and white: (0, 255) for 8-bit pictures, (0, 65535) for 16 bits, the data's
    own range for floats."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """crop: resize until both sides cover the size and cut out the centre. pad: shrink until it
    fits and centre it on the background. stretch: resize exactly."""
    background: str = "white"
    """Colour behind padding and transparency, a name or #rrggbb (arrays: their lowest value)."""
    validation_fraction: float = 0.05
    """Share of the images held out, chosen by their names, if the data has no held-out set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = len(self.size) in (1, 2) and min(self.size) > 0
        check(sides, "size", self.size, "one positive number, or height and width")
        check_between(self, 1, LARGEST_SIDE, "size")
        check_between(self, 1, MOST_CHANNELS, "channels")
        check_between(self, -1e30, 1e30, "value_range")
        rising = self.value_range[0] < self.value_range[1]
        check(rising, "value_range", self.value_range, "two rising numbers")
        check_share(self, "validation_fraction")

    @property
    def height_width(self) -> tuple[int, int]:
        """`(H, W)` in pixels."""
        return self.size[0], self.size[-1]


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig(Config):
    """How features become codes, on every level."""

    kind: Literal["gradient", "ema", "cosine", "fsq"] = "gradient"
    """gradient: codes learn by gradient descent. ema, the paper's: each code is a running average
    of its features. cosine: like ema, with unit-length features and codes (suits small code_dims).
    fsq: no codebook to learn, each dimension is rounded to a few values."""
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    """How the decoder's gradient reaches the encoder: unchanged, or rotated and scaled as the
    features would be to become the code, which did worse where we compared them (not for fsq)."""
    beta: float = recipe_only(0.25)
    """Weight of the commitment loss, which trains the encoder: ||z - sg(e)||^2."""
    decay: float = 0.99
    """Decay of the running averages: of the codes (ema, cosine) and of how often each is used."""
    start_from_data: bool = True
    """Start the codebook from clusters (k-means) of the first features, not from random numbers."""
    revival_threshold: float = 0.03
    """Replace a code when its share of the assignments falls below this times 1/K; 0 is off."""
    fsq_levels: tuple[int, ...] = (8, 8, 8)
    """fsq: values per dimension of a code. Their product is the number of codes."""
    search_megabytes: float = recipe_only(64.0)
    """Memory for the distances between features and codes that are compared at once, when codes
    are searched. (fsq takes nothing of all this but fsq_levels.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1e6, "beta")
        check(0 < self.decay < 1, "decay", self.decay, "in (0, 1)")
        check_share(self, "revival_threshold")
        levels = self.fsq_levels
        fits = min(levels, default=0) >= 2 and math.prod(levels) <= MOST_CODES
        allowed = f"numbers of at least 2, whose product is at most {MOST_CODES:,}"
        check(fits, "fsq_levels", levels, allowed)
        check_between(self, 1e-3, 1e6, "search_megabytes")


@dataclass(frozen=True, kw_only=True)
class VQVAE2Config(Config):
    """The autoencoder. Levels are listed coarse to fine: from the top to the bottom."""

    image: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """How files become images."""
    strides: tuple[int, ...] = (2, 4)
    """Per level, how much coarser its grid is than the next finer one (the bottom's: than the
    image). Powers of two. Two levels are a VQ-VAE-2, three the paper's for 1024 pixels."""
    codebook_sizes: tuple[int, ...] = (512,)
    """K, the number of codes: one number for all levels, or one per level (not for fsq)."""
    code_dims: tuple[int, ...] = (16,)
    """D, the dimension of a code: one number for all levels, or one per level (not for fsq). The
    paper's is 64."""
    network: Literal["paper", "resnet"] = added("paper")
    """paper: that of the VQ-VAE-2 paper. resnet: that of VQGAN and LlamaGen, with group norm, and
    attention on the coarsest grid: slower, but at up to 64 x 64 pixels as exact after 20 minutes on
    two CPU cores, or more so, and sharper, with hidden_channels 64 and a learning rate of 0.01."""
    hidden_channels: int = 128
    """E, the width of encoders and decoders, and of the features that they exchange."""
    width_multipliers: tuple[float, ...] = added((), recipe_only=True)
    """resnet: the width at each resolution as a multiple of hidden_channels, from the top's grid to
    the image. If empty: 1 on the code grids, then 1/2, then 1/4."""
    residual_channels: int = recipe_only(32)
    """Width inside a residual block (64 in the paper); not for resnet."""
    num_residual_blocks: int = recipe_only(2)
    """Residual blocks per encoder and decoder; resnet: per resolution, one more in a decoder."""
    level_dropout: float = 0.1
    """Share of the training images decoded without the finer levels, only from the top to a random
    one. Without it the bottom does everything, and the coarser levels carry next to nothing."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How features become codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Every level's numbers.
        powers = [stride >= 2 and stride & (stride - 1) == 0 for stride in self.strides]
        fits = bool(powers) and all(powers)
        check(fits, "strides", self.strides, "powers of two from 2 on, one per level")
        for name in ("codebook_sizes", "code_dims"):
            values = getattr(self, name)
            fits = len(values) in (1, self.num_levels)
            check(fits, name, values, f"one number, or one for each of {self.num_levels} levels")
        check_between(self, 2, MOST_CODES, "codebook_sizes")
        check_between(self, 1, MOST_WIDTH, "code_dims")

        # The network, and the images that it can take.
        even = self.hidden_channels >= 2 and self.hidden_channels % 2 == 0
        check(even, "hidden_channels", self.hidden_channels, "an even number")
        check_between(self, 1, MOST_WIDTH, "hidden_channels", "residual_channels")
        check_between(self, 0, MOST_LAYERS, "num_residual_blocks")
        check_share(self, "level_dropout")
        if self.network == "resnet":
            check_between(self, 1, MOST_LAYERS, "num_residual_blocks")
        stride = math.prod(self.strides)
        if self.width_multipliers:
            is_resnet, number = self.network == "resnet", 1 + int(math.log2(stride))
            fits = is_resnet and len(self.width_multipliers) == number
            allowed = f"{number} numbers (one per resolution), with the network resnet"
            check(fits, "width_multipliers", self.width_multipliers, allowed)
            check_between(self, 1e-3, 1e3, "width_multipliers")
        allowed = f"divisible by {stride}, the product of the strides {self.strides}"
        for name, side in zip(("height", "width"), self.image.height_width, strict=True):
            check(side % stride == 0, f"image.size ({name})", side, allowed)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.strides)

    @property
    def codebook_size_per_level(self) -> tuple[int, ...]:
        """K of every level."""
        if self.quantizer.kind == "fsq":
            return (math.prod(self.quantizer.fsq_levels),) * self.num_levels
        return self.codebook_sizes * (self.num_levels // len(self.codebook_sizes))

    @property
    def code_dim_per_level(self) -> tuple[int, ...]:
        """D of every level."""
        if self.quantizer.kind == "fsq":
            return (len(self.quantizer.fsq_levels),) * self.num_levels
        return self.code_dims * (self.num_levels // len(self.code_dims))

    @property
    def widths(self) -> tuple[int, ...]:
        """resnet: channels at every resolution, from the top's grid to the image."""
        multipliers = self.width_multipliers
        if not multipliers:
            grids, finer = (
                int(math.log2(math.prod(self.strides[:-1]))),
                int(math.log2(self.strides[-1])),
            )
            multipliers = (1.0,) * (grids + 1) + (0.5, *[0.25] * (finer - 1))
        return tuple(max(1, round(factor * self.hidden_channels)) for factor in multipliers)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """`(h, w)` of every level's code grid."""
        height, width = self.image.height_width
        scales = [math.prod(self.strides[level:]) for level in range(self.num_levels)]
        return tuple((height // scale, width // scale) for scale in scales)

    def summary(self) -> str:
        """Images and codes in a few words."""
        sides = " x ".join(map(str, self.image.height_width))
        codes = " + ".join(describe_grids(self.grids, self.codebook_size_per_level))
        return f"images {sides}, channels {self.image.channels}, codes {codes}"


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Config):
    """Where the images are. (A run is bound to the images' names, not to their place.)"""

    path: str = may_change()
    """A folder (with or without class folders, or with train/ and validation/ in it), a picture, a
    list of files (.txt, .csv, .tsv or .jsonl with the columns path and label), Parquet or Arrow
    files or a folder of them, WebDataset tar shards, a .npy or .npz stack, or a Hub dataset id.
    Several files as a pattern: 'cats/*.jpg', 'shards/{000..127}.tar'."""
    validation_path: str | None = may_change(None)
    """An explicit held-out set, of the same kinds."""
    streaming: bool = False
    """Read Parquet shards in order, as tar shards always are: for data larger than your disk. The
    path may then be a URL or a pattern of URLs (https://, s3://, hf://, ...)."""
    on_error: Literal["stop", "skip"] = may_change("stop")
    """If an image cannot be read: stop and name it, or skip it and list it in skipped.jsonl."""
    image_column: str | None = None
    """The column of images in a table or list, if it cannot be guessed."""
    label_column: str | None = None
    """The column of classes in a table or list, if it is not named label; none ignores all
    labels, those of folders and tar shards too."""
    condition_column: str | None = added(None)
    """A column that priors are conditioned on, with or without classes: a number, a list of floats
    (equally many in each row) or, except in a stream, a list of names (attributes)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Config):
    """Random changes of the training images, a function of (seed, epoch, image) alone."""

    horizontal_flip: bool = False
    """Mirror half of the images, at random."""
    crop: Literal["off", "random", "random_resized"] = "off"
    """off: as image.fit says. random: the largest area of the right aspect ratio, placed at random.
    random_resized: an area of random size, aspect ratio and position."""
    crop_area: tuple[float, float] = recipe_only((0.35, 1.0))
    """random_resized: smallest and largest share of the picture's area."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_area
        check(0 < low <= high <= 1, "crop_area", self.crop_area, "two rising shares in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Where the images are, and how they are loaded for training."""

    num_workers: int = may_change(0)
    """Processes (streaming: threads) that load batches for each training process."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of the training images."""
    shuffle_buffer: int = recipe_only(1000)
    """Streaming: rows in memory; the next is drawn from them at random. Shards are shuffled too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, MOST_WORKERS, "num_workers")
        check_between(self, 1, LONGEST_SHARD, "shuffle_buffer")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Config):
    """Decode and resize images once, into Parquet shards that are read at the speed of memory.

    Train with --data.path PREPARED. For random crops, prepare larger images than you train on.

    Example: vqvae2 prepare --data.path photos --image.size 128 --output-dir prepared
    """

    data: ImagesConfig
    """Where the images are."""
    image: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """How files become images: as in the training to come."""
    output_dir: str = may_change()
    """Folder of the prepared images. Repeat the command to continue a killed preparation."""
    shard_size: int = 4096
    """Images per Parquet shard (streaming: each input shard becomes one)."""
    num_threads: int = may_change(0)
    """Threads that decode, for each process; 0 for one per core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1, LONGEST_SHARD, "shard_size")
        check_between(self, 0, MOST_WORKERS, "num_threads")


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(Config):
    """A loss that compares images by the features of a network trained on photographs."""

    weight: float = 0.0
    """Its weight relative to the reconstruction loss; 0 is off. Of vgg 0.1 to 1 is usual, of
    efficientnet 0.01."""
    network: Literal["vgg", "efficientnet"] = added("vgg")
    """vgg, of a file that you have; efficientnet, whose weights come with pip extra evaluate."""
    weights_file: str | None = may_change(None)
    """torchvision's VGG weights (.pth or .safetensors); LPIPS if its lin0 to lin4 are there too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1e6, "weight")
        fits = self.network == "vgg" or self.weights_file is None
        check(fits, "weights_file", self.weights_file, "left out with the network efficientnet")


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Config):
    """A network that learns to tell reconstructions from images, patch by patch (VQGAN).

    The autoencoder learns to fool it: sharper textures, at the price of exactness. With it the last
    weights are kept, not those with the lowest error.
    """

    weight: float = 0.0
    """Weight of fooling it, relative to the reconstruction's gradient; 0 is off, 0.8 is VQGAN's."""
    start_step: int = 5000
    """Step from which the autoencoder tries to fool it; reconstructions should be good by then."""
    learning_rate_factor: float = recipe_only(0.1)
    """Its learning rate, as a multiple of the autoencoder's."""
    adam_betas: tuple[float, float] = recipe_only((0.5, 0.9))
    """Its AdamW decay rates."""
    hidden_channels: int = recipe_only(64)
    """Width of its first layer; it doubles with each further one, to at most 8 times this."""
    num_layers: int = 3
    """Halvings of the image before a patch is judged: 3 for patches of 70 pixels, 2 of 34."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1e6, "weight")
        check_between(self, 1, MOST, "start_step")
        check_between(self, 1, 16, "num_layers")
        check_between(self, 1, MOST_WIDTH, "hidden_channels")
        check_share(self, "adam_betas")
        factor, hidden = self.learning_rate_factor, self.hidden_channels
        check(0 < factor <= 1e6, "learning_rate_factor", factor, "above 0, and at most 1,000,000")
        check(hidden >= 8 and hidden % 8 == 0, "hidden_channels", hidden, "a multiple of 8")


@dataclass(frozen=True, kw_only=True)
class TrainVQVAEConfig(TrainingConfig):
    """Train the autoencoder (stage 1) on images.

    Example: vqvae2 train --data.path photos --image.size 128 --output-dir runs/photos/vqvae
    """

    output_dir: str = may_change()
    """Folder of the run. Repeat the command to continue it."""
    data: DataConfig
    """Where the images are."""
    model: VQVAE2Config = field(default_factory=VQVAE2Config)
    """The autoencoder."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    reconstruction_loss: Literal["mse", "l1"] = "mse"
    """What is minimised between image and reconstruction, in [-1, 1]."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """An optional perceptual loss."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """An optional patch discriminator."""
    code_noise: float = 0.0
    """Share of the training images in which codes are replaced by near neighbours before the image
    decoder reads them: it learns to tolerate errors of priors. The last weights are kept."""
    finetune: Literal["all", "decoder"] = "all"
    """What is trained after --init-from. decoder: the image decoder alone; the rest of that model
    and its settings stay as they are, so that codes and priors made with it remain valid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, "code_noise")
        fits = self.finetune == "all" or self.init_from is not None
        check(fits, "finetune", self.finetune, "used with --init-from, the model to fine-tune")
        side, layers = min(self.model.image.height_width), self.discriminator.num_layers
        unknown = self.finetune == "decoder" and self.model == VQVAE2Config()  # --init-from's
        fits = side >= 3 * 2**layers or not self.discriminator.weight or unknown
        allowed = f"so small that {layers} halvings of {side} pixels leave 3 or more"
        check(fits, "discriminator.num_layers", layers, allowed)
