"""Configuration of the commands that need both stages. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from prior.config import TrainPriorConfig
from vqvae2.common.config import check, may_change
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Turn images into a code dataset, with a trained autoencoder.

    Example: vqvae2 extract --vqvae runs/photos/vqvae --data.path photos --output-dir runs/photos/codes
    """

    vqvae: str = may_change()
    """The trained autoencoder: a folder, or a Hub id."""
    data: ImagesConfig
    """Where the images are: those that the autoencoder was trained on."""
    output_dir: str = may_change()
    """Folder of the code dataset. The same command again continues a killed extraction."""
    shard_size: int = 8192
    """Images per Parquet shard (of a stream, each shard becomes one)."""
    views: tuple[str, ...] = ("original",)
    """Rows per training image: original, flip, top_left, top_right, bottom_left, bottom_right (parts of nine tenths), flip_top_left, ... The
    prior then sees them too. Held-out images are never changed."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 is faster where the hardware computes in it, and changes a few codes: how many is printed."""

    def __post_init__(self) -> None:
        check(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1")
        check(
            len(set(self.views)) == len(self.views) >= 1,
            "views",
            self.views,
            "one or more different views",
        )


@dataclass(frozen=True, kw_only=True)
class TrainPriorCommandConfig(TrainPriorConfig):
    __doc__ = TrainPriorConfig.__doc__

    vqvae: str | None = may_change(None)
    """The autoencoder of the codes: if given, pictures of samples are drawn at intervals (the coarser levels' codes are real ones)."""


@dataclass(frozen=True, kw_only=True)
class CodesInfoConfig:
    """Show what a code dataset holds: rows, grids, codebook use, size on disk, origin.

    Example: vqvae2 codes info --codes runs/photos/codes
    """

    codes: str = may_change()
    """The code dataset."""


@dataclass(frozen=True, kw_only=True)
class CodesViewConfig:
    """Decode rows of a code dataset to a picture, rows.png.

    Example: vqvae2 codes view --codes runs/x/codes --vqvae runs/x/vqvae --rows 0 5 --output-dir out
    """

    codes: str = may_change()
    """The code dataset."""
    vqvae: str
    """The autoencoder that made the codes: a folder, or a Hub id."""
    rows: tuple[int, ...] = tuple(range(16))
    """Which rows, counted from 0 over the shards of the split."""
    split: Literal["train", "validation"] = "train"
    """Training or held-out rows."""
    output_dir: str
    """The folder that rows.png is written to."""

    def __post_init__(self) -> None:
        check(len(self.rows) >= 1, "rows", self.rows, "one number or more")


@dataclass(frozen=True, kw_only=True)
class CodesVerifyConfig:
    """Check a code dataset: every shard's checksum, rows, codes and labels, and that no row repeats.
    A line for each problem, then exit code 1.

    Example: vqvae2 codes verify --codes runs/photos/codes
    """

    codes: str = may_change()
    """The code dataset."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Encode and decode images: one PNG each, and a sheet with the originals above their reconstructions.

    Example: vqvae2 reconstruct --vqvae runs/photos/vqvae holiday --output-dir out
    """

    images: tyro.conf.Positional[str]
    """A folder, a Parquet file, or a Hub dataset id."""
    vqvae: str = may_change()
    """The trained autoencoder: a folder, or a Hub id."""
    output_dir: str = may_change()
    """Where the PNG files go."""
    num_images: int = may_change(64)
    """At most this many images, the first ones; 0 for all."""
    held_out: bool = False
    """Only images that the autoencoder's training held out."""

    def __post_init__(self) -> None:
        check(self.num_images >= 0, "num_images", self.num_images, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what an autoencoder has learned: use of the codebooks, what each level carries, quality of held-out reconstructions.

    Example: vqvae2 inspect runs/photos/vqvae --data.path photos
    """

    vqvae: tyro.conf.Positional[str] = may_change()
    """The trained autoencoder: a folder, or a Hub id."""
    data: ImagesConfig
    """Images to inspect it with: the held-out ones among them, or all if none are held out."""
    output_dir: str | None = may_change(None)
    """Where the page goes; report/ in the model's folder if not given."""


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """What a pipeline is made of."""

    vqvae: str | None = may_change(None)
    """The trained autoencoder."""
    priors: tuple[str, ...] = may_change(())
    """One trained prior per level, the top first."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(PartsConfig):
    """Sample new images: one PNG each, and a sheet of them with the class names beside the rows.

    Example: vqvae2 sample --pipeline runs/photos/pipeline --num-images 64 --temperature 1.0 0.9 --output-dir out
    """

    pipeline: str | None = may_change(None)
    """A pipeline folder or Hub id, instead of --vqvae and --priors."""
    output_dir: str = may_change()
    """Where the PNG files go."""
    num_images: int = may_change(64)
    """How many images. A larger number continues a set."""
    labels: tuple[str, ...] = ()
    """Class names or numbers, or none for no label, taken in turns; all classes in turns if nothing is given."""
    temperature: tuple[float, ...] = (1.0,)
    """Below 1 for likelier, above 1 for more varied codes; 0 for the likeliest. One value, or one per level."""
    top_k: tuple[int, ...] = ()
    """Draw from the k likeliest codes only. One value, or one per level."""
    top_p: tuple[float, ...] = ()
    """Draw from the smallest set of codes that has this probability. One value, or one per level."""
    min_p: tuple[float, ...] = ()
    """Draw from codes at least this share as likely as the likeliest only. One value, or one per level."""
    guidance_scale: tuple[float, ...] = (1.0,)
    """Above 1 for images more typical of their class (and less varied): classifier-free guidance. One value, or one per level."""
    seed: int = 0
    """Image i is a function of (seed, i, its label), whatever the number of images and processes."""
    lanes: int = 16
    """Images computed side by side: more is faster on a GPU. Always as many, so that nothing else decides an image's last bits."""
    bf16: bool = False
    """Multiply in bfloat16 in the priors: faster, and other images."""
    init_image: str | None = None
    """Start from this image: with --mask it is repainted where the mask is white, without its coarsest levels are kept (--keep-levels)."""
    mask: str | None = None
    """With --init-image: a picture of the same size, white where the image is to be repainted."""
    keep_levels: int | None = None
    """With --init-image and no --mask: how many levels, from the top, are kept (1 if not given); the finer ones are drawn anew."""
    npz: bool = may_change(False)
    """Also write samples.npz (arr_0: uint8 images (N, H, W, C); arr_1: labels), which evaluators read."""

    def __post_init__(self) -> None:
        check(self.num_images >= 1, "num_images", self.num_images, "at least 1")
        check(self.lanes >= 1, "lanes", self.lanes, "at least 1")
        check(self.seed >= 0, "seed", self.seed, "0 or more")
        check(
            self.mask is None or self.init_image is not None,
            "mask",
            self.mask,
            "used together with init_image",
        )
        alone = self.init_image is not None and self.mask is None
        check(
            self.keep_levels is None or alone,
            "keep_levels",
            self.keep_levels,
            "used together with init_image and without mask",
        )


@dataclass(frozen=True, kw_only=True)
class ExtractedImagesConfig(ImagesConfig):
    """The images that the code dataset was extracted from."""

    path: str = may_change("")
    """Where they are; by default where the dataset's own record says, if they are still there."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PartsConfig):
    """Find silent errors of trained parts, in seconds: a line per check, exit code 1 if any fails.

    Give a pipeline, or any of autoencoder, codes and priors; the more, the more is checked. Of
    every prior: no logit sees the code it predicts or a later one (to the last bit), cached
    sampling equals the plain loop, condition and labels reach the logits, every weight receives a
    gradient, the loss starts at ln K. With codes: held-out rows cost less given their own
    condition than given another image's, and less than by frequency alone. Of the autoencoder:
    every code survives a round trip. Of the codes: all rows are there, and some images encoded
    again get the codes that are stored. Of all together: they belong to the same encoder.

    Example: vqvae2 doctor --pipeline runs/photos/pipeline --codes runs/photos/codes
    """

    pipeline: str | None = may_change(None)
    """A pipeline folder or Hub id, instead of --vqvae and --priors."""
    codes: str | None = may_change(None)
    """The code dataset."""
    data: ExtractedImagesConfig = field(default_factory=ExtractedImagesConfig)
    """Images to encode again."""

    def __post_init__(self) -> None:
        if self.pipeline is not None and (self.vqvae is not None or self.priors):
            raise UserError("--pipeline replaces --vqvae and --priors: give one or the other.")
        decodes = self.vqvae is not None or self.pipeline is not None
        if self.data.path and (self.codes is None or not decodes):
            raise UserError("--data.path needs codes: give --codes DIR and the autoencoder too.")
        if self.data.validation_path is not None and not self.data.path:
            raise UserError("--data.validation-path is given without --data.path: give both.")


@dataclass(frozen=True, kw_only=True)
class AssembleConfig(PartsConfig):
    """Put an autoencoder and its priors into one folder, for VQVAE2Pipeline.from_pretrained and vqvae2 sample --pipeline.

    Example: vqvae2 assemble --vqvae runs/x/vqvae --priors runs/x/prior_0 runs/x/prior_1 --output-dir runs/x/pipeline
    """

    output_dir: str = may_change()
    """The pipeline folder."""


@dataclass(frozen=True, kw_only=True)
class ImportWeightsConfig:
    """Make a model folder of a stage-1 checkpoint of rosinality/vq-vae-2-pytorch.

    Example: vqvae2 import-weights vqvae_560.pt --size 256 --output-dir runs/imported/vqvae
    """

    checkpoint: tyro.conf.Positional[str]
    """The .pt file."""
    output_dir: str = may_change()
    """The model folder."""
    size: tuple[int, ...] = (256,)
    """Height and width of the images that it was trained on, or one number for both (the file does not say)."""


@dataclass(frozen=True, kw_only=True)
class ImportCodesConfig:
    """Make a code dataset of the LMDB file of codes that rosinality/vq-vae-2-pytorch extracts.

    The classes are the folders that its images lay in, if there is more than one. No code that the file may hold is run.

    Example: vqvae2 import-codes codes.lmdb --vqvae runs/imported/vqvae --output-dir runs/imported/codes
    """

    lmdb: tyro.conf.Positional[str]
    """The LMDB file or folder."""
    vqvae: str = may_change()
    """The autoencoder that made the codes: the folder that vqvae2 import-weights wrote of its checkpoint."""
    output_dir: str = may_change()
    """Folder of the code dataset."""
    validation_fraction: float = 0.05
    """Share of the rows held out; an image's own name decides."""
    shard_size: int = 8192
    """Rows per Parquet shard."""

    def __post_init__(self) -> None:
        check(
            0 <= self.validation_fraction < 1,
            "validation_fraction",
            self.validation_fraction,
            "in [0, 1)",
        )
        check(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say what the trainings of a recipe will need before they start: parameters, memory for a step, hours, and whether it fits the device.

    No weights are made: a network of any size is planned in seconds.

    Example: vqvae2 plan ffhq256 --num-images 70000 --device cuda --memory-gibibytes 24
    """

    recipe: tyro.conf.Positional[str]
    """The recipe: its name, or a YAML file."""
    num_images: int | None = None
    """Training images, for the hours per epoch; without it an epoch is a million images."""
    num_classes: int = 0
    """Classes that the priors are conditioned on (a training reads them from the codes)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to plan for; auto is what a training on this machine would use. cuda may be planned where there is none, with --memory-gibibytes."""
    memory_gibibytes: float | None = None
    """Memory of the device, if it is not this machine's."""
    num_devices: int = 1
    """Processes that share a batch, each on a device of its own."""
    measure: bool = False
    """Time a real step of every training on this device, with as many images as take a few seconds. Without it, hours follow from how fast
    the device multiplies matrices, which no training reaches: they are then the least it can take."""
    images_per_second: tuple[float, ...] = ()
    """A rate that you measured (`images_per_second` in metrics.jsonl): one number for all trainings, or one for each. Wins over --measure."""

    def __post_init__(self) -> None:
        check(
            self.num_images is None or self.num_images >= 1,
            "num_images",
            self.num_images,
            "at least 1",
        )
        check(self.num_classes >= 0, "num_classes", self.num_classes, "0 (none) or more")
        check(
            self.memory_gibibytes is None or self.memory_gibibytes > 0,
            "memory_gibibytes",
            self.memory_gibibytes,
            "above 0",
        )
        check(self.num_devices >= 1, "num_devices", self.num_devices, "at least 1")
        check(
            all(rate > 0 for rate in self.images_per_second),
            "images_per_second",
            self.images_per_second,
            "above 0",
        )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train everything on the Fashion-MNIST images that come with the package, and sample new ones.

    About 6 minutes on two CPU cores. Run again, it skips what is finished; killed, it continues.
    """

    output_dir: str = may_change("runs/demo")
    """Where everything goes."""
    budget: float = 1.0
    """Share of the training steps: 0.25 for a quick look."""

    def __post_init__(self) -> None:
        check(self.budget > 0, "budget", self.budget, "above 0")
