"""Configuration of the commands that need both stages. Torch-free."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from prior.config import MOST_LEVELS, TrainPriorConfig
from vqvae2.common.config import (
    MOST_ROWS,
    MOST_THREADS,
    Config,
    added,
    check,
    check_between,
    check_share,
    may_change,
)
from vqvae2.common.errors import UserError
from vqvae2.config import LONGEST_SHARD, ImagesConfig

MOST_FILES = 10**7  # that one command writes
MOST_CHOSEN = 400_000  # images of --reject, whose numbers the record of the set holds
LANES = 16  #: images that a pipeline computes side by side, on which their last bits depend


@dataclass(frozen=True, kw_only=True)
class ModelToFolderConfig(Config):
    """A command that reads an autoencoder and writes a folder."""

    vqvae: str = may_change()
    """The trained autoencoder: a folder, or a Hub id."""
    output_dir: str = may_change()
    """The folder to write."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ModelToFolderConfig):
    """Turn images into a code dataset. Repeat the command to continue a killed extraction.

    Example: vqvae2 extract --vqvae runs/x/vqvae --data.path photos --output-dir runs/x/codes
    """

    data: ImagesConfig
    """Where the images are: those that the autoencoder was trained on."""
    shard_size: int = 8192
    """Images per Parquet shard (streaming: each input shard becomes one)."""
    views: tuple[str, ...] = ("original",)
    """Rows per training image: original, flip, top_left, top_right, bottom_left, bottom_right
    (crops of nine tenths), flip_top_left, ... Held-out images are never changed."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 is faster where the hardware supports it, and changes a few codes: how many is shown."""
    num_threads: int = 0
    """Threads that compute on a CPU; 0: as PyTorch chooses. Up to 128 x 128 pixels each encodes
    its own images; above, all work on the same, and 1 may be fastest on a busy machine."""
    deterministic: bool = may_change(False)
    """On a GPU, sum in a fixed order: the same command gives the same codes again, but slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1, LONGEST_SHARD, "shard_size")
        check_between(self, 0, MOST_THREADS, "num_threads")
        different = len(set(self.views)) == len(self.views) >= 1
        check(different, "views", self.views, "one or more different views")


@dataclass(frozen=True, kw_only=True)
class TrainPriorCommandConfig(TrainPriorConfig):
    __doc__ = TrainPriorConfig.__doc__

    vqvae: str | None = may_change(None)
    """The autoencoder that made the codes: with it, pictures of samples are saved at intervals."""


@dataclass(frozen=True, kw_only=True)
class CodesInfoConfig(Config):
    """Show what a code dataset holds: rows, grids, codebook use, size on disk, origin.

    Example: vqvae2 codes info --codes runs/photos/codes
    """

    codes: str = may_change()
    """The code dataset."""


@dataclass(frozen=True, kw_only=True)
class CodesViewConfig(ModelToFolderConfig, CodesInfoConfig):
    """Decode rows of a code dataset, with the autoencoder that made it, to a picture: rows.png.

    Example: vqvae2 codes view --codes runs/x/codes --vqvae runs/x/vqvae --rows 0 5 --output-dir out
    """

    rows: tuple[int, ...] = tuple(range(16))
    """Which rows, counted from 0 over the shards of the split."""
    split: Literal["train", "validation"] = "train"
    """Training or held-out rows."""


@dataclass(frozen=True, kw_only=True)
class CodesVerifyConfig(CodesInfoConfig):
    """Check a code dataset's files, rows, codes and labels: a line per problem, then exit code 1.

    Example: vqvae2 codes verify --codes runs/photos/codes
    """


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(ModelToFolderConfig):
    """Encode and decode images: one file each, in images/ under its own name, and a sheet.

    Example: vqvae2 reconstruct --vqvae runs/x/vqvae --data.path holiday --output-dir out
    """

    data: ImagesConfig
    """Where the images are."""
    num_images: int = may_change(64)
    """At most this many images, the first ones; 0 for all."""
    held_out: bool = False
    """Only images that the autoencoder's training held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, MOST_FILES, "num_images")
        check(not self.data.streaming, "data.streaming", True, "off, to take images in any order")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Config):
    """Show what an autoencoder has learned: its codebooks, each level's share, its quality.

    Example: vqvae2 inspect --vqvae runs/photos/vqvae --data.path photos
    """

    vqvae: str = may_change()
    """The trained autoencoder: a folder, or a Hub id."""
    data: ImagesConfig
    """Images to inspect it with: the held-out ones among them, or all if none are held out."""
    output_dir: str | None = may_change(None)
    """Where the page goes; report/ in the model's folder if not given."""


@dataclass(frozen=True, kw_only=True)
class PartsConfig(Config):
    """A pipeline, or the parts that make one."""

    pipeline: str | None = may_change(None)
    """A pipeline: a folder, or a Hub id. Instead of --vqvae and --priors."""
    vqvae: str | None = may_change(None)
    """The trained autoencoder."""
    priors: tuple[str, ...] = may_change(())
    """One trained prior per level, the top first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline is not None and (self.vqvae is not None or self.priors):
            raise UserError("--pipeline replaces --vqvae and --priors: give one or the other.")


@dataclass(frozen=True, kw_only=True)
class EditConfig(PartsConfig):
    """A pipeline, and perhaps an image that it edits."""

    init_image: str | None = None
    """Edit this image. With --mask, repaint the white area; without it, keep the coarsest levels
    (--keep-levels) and sample the finer ones."""
    mask: str | None = None
    """With --init-image: a picture of the same size, white where it is to be repainted."""
    keep_levels: int | None = None
    """With --init-image and no --mask: how many levels to keep, from the top; 1 if not set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        masked, edited = self.mask is not None, self.init_image is not None
        check(edited or not masked, "mask", self.mask, "used together with init_image")
        fits = self.keep_levels is None or (edited and not masked)
        check(fits, "keep_levels", self.keep_levels, "used with init_image and without mask")


@dataclass(frozen=True, kw_only=True)
class DrawConfig(Config):
    """How a pipeline draws images: with the seed and the labels, all that a user decides."""

    temperature: tuple[float, ...] = (1.0,)
    """Lower: likelier codes; higher: more varied; 0: the likeliest. One value, or one per level: a
    lower one for the finest alone (1.0 0.8) costs little variety."""
    top_k: tuple[int, ...] = ()
    """Only the k likeliest codes. One value, or one per level."""
    top_p: tuple[float, ...] = ()
    """Only the fewest codes that together reach this probability. One value, or one per level."""
    min_p: tuple[float, ...] = ()
    """Only codes at least this likely, relative to the likeliest. One value, or one per level."""
    guidance_scale: tuple[float, ...] = (1.0,)
    """Classifier-free guidance: above 1, more typical of the class. One value, or one per level."""
    seed: int = 0
    """Image i depends on (seed, i, its label) alone, not on the number of images or processes."""
    lanes: int = LANES
    """Images computed side by side: more is faster on a GPU, and changes the images' last bits."""
    bf16: bool = False
    """Multiply in bfloat16 in the priors: faster, but gives other images."""
    num_threads: int = 0
    """Threads that compute on a CPU; 0: as PyTorch chooses. Images depend on it in their last bits;
    1 may be fastest on a busy machine."""
    compile: Literal["auto", True, False] = "auto"
    """On CUDA. auto: calls of the priors are recorded once per batch and replayed; True: they are
    compiled first, which takes a minute per level, pays for thousands of images, and needs Triton
    and a C compiler; False: neither. The images' last bits may depend on it."""
    parallel_positions: int = 0
    """Positions whose codes are guessed and then computed in one call; 0: chosen for you; 1: one
    at a time. For a PixelSNAIL, more than 1 means all, or in bf16 still 1. The codes are the same,
    except for ties in the last bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, MOST_ROWS, "parallel_positions")
        check_between(self, 1, MOST_ROWS, "lanes")
        check_between(self, 0, MOST_THREADS, "num_threads")
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, and below 2^63")


DRAWING = {f.name for f in fields(DrawConfig)} - {"num_threads"}  # fields that decide what is drawn


@dataclass(frozen=True, kw_only=True)
class SetConfig(DrawConfig):
    """A set of images that a pipeline draws."""

    num_images: int = may_change(64)
    """How many images. A larger number continues a set."""
    labels: tuple[str, ...] = ()
    """Class names or numbers, or none for no label, taken in turn. By default all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1, MOST_FILES, "num_images")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SetConfig, EditConfig):
    """Sample new images: one file each, and a sheet of them, classes by row.

    Every image holds a receipt, by which `vqvae2 verify` draws it again; receipt.json is the
    receipt of the set.

    Example: vqvae2 sample --pipeline runs/x/pipeline --num-images 64 --output-dir out
    """

    output_dir: str = may_change()
    """The folder to write: images/, receipt.json, and samples.png, which shows some of them."""
    conditions: str | None = may_change(None)
    """A file of conditions, taken in turn, for priors that were trained with some: .npy (an array
    with a row for each), or .jsonl (in each line a list of numbers, or of names of attributes)."""
    attributes: tuple[str, ...] = may_change(())
    """Attributes that all images have, for priors that were trained with some."""
    receipt: str | None = may_change(None)
    """Make the set of this receipt.json again. It says how many images there are and how they are
    drawn; for an edited set, give --init-image and --mask again."""
    reject: str | None = None
    """Draw more candidates, and keep those that this classifier rates best in each class: a folder
    that evaluate made, or a TorchScript or ONNX file. Or an earlier output folder, to repeat its
    choice."""
    keep: float | None = None
    """With --reject: the share of the candidates that is kept; 0.2 if not set."""
    npz: bool = may_change(False)
    """Also write samples.npz for evaluators (arr_0: uint8 images (N, H, W, C); arr_1: labels)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.receipt is None or self.reject is None
        check(alone, "reject", self.reject, "used without receipt, which is of a whole set")
        for setting in fields(SetConfig) if self.receipt is not None else ():
            if getattr(self, setting.name) != setting.default:
                flag = f"--{setting.name.replace('_', '-')}"
                raise UserError(f"--receipt says what {flag} is: give one or the other.")
        if self.keep is not None:
            check(self.reject is not None, "keep", self.keep, "used together with reject")
            check(1e-3 <= self.keep <= 1, "keep", self.keep, "from 0.001 to 1")
        fits = self.reject is None or self.num_images <= MOST_CHOSEN
        check(fits, "num_images", self.num_images, f"at most {MOST_CHOSEN:,} with reject")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(EditConfig):
    """Draw images of `vqvae2 sample` again, each by the receipt that it holds, and compare.

    Exit code 0: all are equal; 1: some differ (it shows how much); 2: it cannot tell, as one
    holds no receipt or is another pipeline's. Edited images need --init-image and --mask again.

    Example: vqvae2 verify out/images/000000.png --pipeline runs/x/pipeline
    """

    files: tuple[str, ...] = may_change()
    """Images, or folders that hold some. Given before all flags, they need no --files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.files), "files", self.files, "one or more images or folders")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Config):
    """Say how unusual images are: a table with a row for each, a histogram, and the extremes.

    Example: vqvae2 score photos --pipeline runs/x/pipeline --output-dir out
    """

    pipeline: str = may_change()
    """A pipeline: a folder, or a Hub id."""
    data: ImagesConfig
    """The images. Given before all flags, the path needs no --data.path."""
    output_dir: str = may_change()
    """The folder to write: scores.parquet, scores.csv and pictures of them."""
    labels: str | None = None
    """The class to assume for all images; or all, to find the class that explains each best. If not
    given, the class is hidden from the priors."""
    redraws: int = added(0)
    """Redraw unusual places this many times; places that change more count more. Finds places
    better, above all with --labels all, and takes longer; 4 is a good number."""
    maps: bool = False
    """Also draw, for each image, where it is unusual: the bits of each level, the error, both."""
    heal: bool = False
    """Also draw unusual places anew, as the priors expect them, and show what that changes."""
    calibrate: bool = False
    """The images are normal ones: store in the pipeline's folder how unusual these are. Of the
    images of its own training, only the held-out ones are used."""
    false_alarm_rate: float | None = None
    """Mark images, and places in them, that are more unusual than all but this share of the
    normal images that --calibrate recorded, such as 0.01."""
    num_threads: int = 0
    """Threads that compute on a CPU; 0: as PyTorch chooses. Scores depend on it in their last
    digits; 1 may be fastest on a busy machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.redraws >= 0, "redraws", self.redraws, "0 or more")
        check_between(self, 0, MOST_THREADS, "num_threads")
        rate, key = self.false_alarm_rate, "false_alarm_rate"
        check(rate is None or 0 < rate < 1, key, rate, "above 0 and below 1")
        alone = not self.calibrate or (rate is None and not self.maps and not self.heal)
        allowed = "used without --false-alarm-rate, --maps and --heal, which come after it"
        check(alone, "calibrate", self.calibrate, allowed)


@dataclass(frozen=True, kw_only=True)
class CompressConfig(Config):
    """Write images as .vq2 files of a few dozen bytes each: their codes, coded with the priors.

    Lossy: an image becomes what the autoencoder makes of it (see reconstruct). It beats JPEG and
    its kin only on images like those it was trained on. The pipeline is needed to decompress.

    Example: vqvae2 compress photos --pipeline runs/x/pipeline --output-dir out
    """

    pipeline: str = may_change()
    """A pipeline: a folder, or a Hub id."""
    data: ImagesConfig
    """The images. Given before all flags, the path needs no --data.path."""
    output_dir: str = may_change()
    """The folder to write: images.vq2, an archive of all images."""
    separate: bool = False
    """Write a file per image instead, which costs 40 bytes more for each."""
    fast: bool = False
    """Code each code by its frequency so far, without priors: larger, but much faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.data.streaming, "data.streaming", True, "off, to take images in any order")


@dataclass(frozen=True, kw_only=True)
class DecompressConfig(Config):
    """Write the images that are in .vq2 files, with the pipeline that compressed them.

    A file that was altered, or cut off, or written by another pipeline, is refused.

    Example: vqvae2 decompress out/images.vq2 --pipeline runs/x/pipeline --output-dir images
    """

    pipeline: str = may_change()
    """The pipeline that compressed them: a folder, or a Hub id."""
    files: tuple[str, ...] = may_change()
    """.vq2 files, or folders that hold some. Given before all flags, they need no --files."""
    output_dir: str = may_change()
    """The folder to write."""
    levels: int | None = None
    """Decode this many levels, from the top: coarse images, from the beginning of a file."""
    imagine: bool = False
    """With --levels: let the priors draw the other levels; files are named *.imagined.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.files), "files", self.files, "one or more .vq2 files or folders")
        if self.levels is not None:
            check_between(self, 1, MOST_LEVELS, "levels")
        needed = self.levels is not None or not self.imagine
        check(needed, "imagine", self.imagine, "used together with levels")


@dataclass(frozen=True, kw_only=True)
class ExtractedImagesConfig(ImagesConfig):
    """The images that the code dataset was extracted from."""

    path: str = may_change("")
    """Where they are; by default where the dataset's own record says, if they are still there."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedImagesConfig(ImagesConfig):
    """The images that the model was trained on; those that its training held out are recognised,
    but for a pipeline give --data.validation-path again, if there was one."""

    path: str = may_change("")
    """Where they are, as given to the training (see `vqvae2 train --help`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DrawConfig, PartsConfig):
    """Say how good it is: reconstructions, samples, what was memorised, what to do next.

    Give a pipeline, or --vqvae alone to look at stage 1. --samples evaluates images of any model
    instead. Repeat the command to continue; a larger --num-samples adds samples.

    Example: vqvae2 evaluate --pipeline runs/x/pipeline --data.path photos --output-dir evaluation
    """

    samples: str | None = None
    """Images of any model, instead of sampling; with --vqvae or --pipeline they and the real ones
    are prepared as for that model, else resized to the first sample's size."""
    data: EvaluatedImagesConfig = field(default_factory=EvaluatedImagesConfig)
    """The real images."""
    output_dir: str = may_change("")
    """The folder to write: report/index.html, report/figures.json, and the samples."""
    num_samples: int = may_change(1000)
    """How many images to sample; papers take 50,000."""
    features: str = may_change("classifier")
    """The network whose features are compared: classifier (trained here on the real images),
    inception (FID), efficientnet (pip extra evaluate), timm:NAME, or a TorchScript or ONNX file."""
    weights_file: str | None = may_change(None)
    """The weights of --features inception or timm:NAME: a local file."""
    statistics_file: str | None = may_change(None)
    """Mean and covariance of a reference set's features (.npz with mu and sigma, as pytorch-fid
    writes them), made by the same network: adds the distance from it."""
    lpips_file: str | None = may_change(None)
    """VGG weights with LPIPS's (as `perceptual.weights_file`): adds LPIPS to stage 1."""
    sweep: bool = may_change(False)
    """Also compare settings (temperatures, top-p, guidance), and name the best and its flags."""
    compare: tuple[str, ...] = may_change(())
    """Evaluations that were made before, to show side by side instead of making one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 20, MOST_FILES, "num_samples")  # of fewer nothing can be said
        check(not self.data.streaming, "data.streaming", True, "off, to take images in any order")
        sampled = self.pipeline is not None or bool(self.priors)
        if self.lpips_file is not None and not (self.vqvae or self.pipeline):
            raise UserError("--lpips-file is given without an autoencoder: give --vqvae too.")
        draws = sampled and self.samples is None and not self.compare
        allowed = "used where samples are drawn: with --pipeline, without --samples and --compare"
        for f in fields(self):
            value, decides = getattr(self, f.name), f.name in DRAWING | {"sweep", "num_samples"}
            check(draws or not decides or value == f.default, f.name, value, allowed)
        alone = not (sampled or self.vqvae or self.samples)
        check(alone or not self.compare, "compare", self.compare, "used alone, but for output_dir")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PartsConfig):
    """Find silent errors of trained parts, in seconds: a line per check, exit code 1 if any fails.

    Give a pipeline, or any of autoencoder, codes and priors: more parts allow more checks. Every
    prior: no logit sees its own code or a later one, cached sampling equals the plain loop,
    condition and labels matter, gradients flow. With codes: the condition lowers the held-out loss,
    which is below that of frequencies alone. The autoencoder: every code survives a round trip.
    The codes: all rows are there, and re-encoded images match them. All: they belong together.

    Example: vqvae2 doctor --pipeline runs/photos/pipeline --codes runs/photos/codes
    """

    codes: str | None = may_change(None)
    """The code dataset."""
    data: ExtractedImagesConfig = field(default_factory=ExtractedImagesConfig)
    """Images to encode again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        decodes = self.vqvae is not None or self.pipeline is not None
        if self.data.path and (self.codes is None or not decodes):
            raise UserError("--data.path needs codes: give --codes DIR and the autoencoder too.")
        if self.data.validation_path is not None and not self.data.path:
            raise UserError("--data.validation-path is given without --data.path: give both.")


@dataclass(frozen=True, kw_only=True)
class AssembleConfig(ModelToFolderConfig):
    """Put an autoencoder and its priors into one folder: a pipeline to sample from, or to share.

    Example: vqvae2 assemble --vqvae x/vqvae --priors x/prior_0 x/prior_1 --output-dir x/pipeline
    """

    priors: tuple[str, ...] = may_change()
    """One trained prior per level, the top first."""


FINE_TUNING = "finetune.yaml"  # beside imported weights: the recipe of a training that goes on


@dataclass(frozen=True, kw_only=True)
class ImportedImageConfig(Config):
    """What a checkpoint does not say about the images that it was trained on."""

    size: tuple[int, ...] = (256,)
    """Height and width in pixels, or one number for both."""


@dataclass(frozen=True, kw_only=True)
class ImportWeightsConfig(Config):
    """Turn a stage-1 checkpoint of another implementation into a model folder.

    It reads files of rosinality/vq-vae-2-pytorch, and VQGAN tokenizers (models of one level) of
    LlamaGen and taming-transformers.

    Example: vqvae2 import-weights --checkpoint vqvae_560.pt --image.size 256 --output-dir x/vqvae
    """

    checkpoint: str = may_change()
    """The file."""
    output_dir: str = may_change()
    """The model folder."""
    image: ImportedImageConfig = field(default_factory=ImportedImageConfig)
    """The images that the checkpoint was trained on."""


@dataclass(frozen=True, kw_only=True)
class ImportCodesConfig(ModelToFolderConfig):
    """Turn the LMDB file of codes that rosinality/vq-vae-2-pytorch extracts into a code dataset.

    The autoencoder is what vqvae2 import-weights wrote. Classes are the folders that the images
    were in, if there are several. No code that the file may contain is run.

    Example: vqvae2 import-codes --lmdb codes.lmdb --vqvae x/vqvae --output-dir x/codes
    """

    lmdb: str
    """The LMDB file or folder."""
    validation_fraction: float = 0.05
    """Share of the rows held out; an image's own name decides."""
    shard_size: int = 8192
    """Rows per Parquet shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "validation_fraction")
        check_between(self, 1, LONGEST_SHARD, "shard_size")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Say what a command needs before it runs: memory, time, and whether that is practical.

    Put plan before a command that trains or extracts, with all of its flags; --config RECIPE alone
    plans all trainings of a recipe. Images are counted, steps are timed, and nothing is written.

    Example: vqvae2 plan train --data.path photos --image.size 128
    """

    recipe: str = field(default="", metadata={"recipe_only": True})
    """The recipe: its name, or a YAML file (--config)."""
    planned: Any = field(metadata={"recipe_only": True})
    """The configuration of the command to plan; without it, all trainings of the recipe."""
    num_images: int | None = None
    """Training images, instead of counting them: those of a stream, or of a recipe."""
    num_classes: int = 0
    """Classes that the priors are conditioned on, if there are no images or codes yet to tell."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: what a training would use here. cuda without a GPU needs --memory-gibibytes."""
    memory_gibibytes: float | None = None
    """Memory of the device, if it is not this machine's."""
    num_devices: int = 1
    """Devices that share a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1, MOST_ROWS, "num_devices")
        check_between(self, 0, MOST_ROWS, "num_classes")
        if self.num_images is not None:
            check_between(self, 1, 10**12, "num_images")
        if self.memory_gibibytes is not None:
            check_between(self, 1e-3, 1e9, "memory_gibibytes")


@dataclass(frozen=True, kw_only=True)
class ChosenImageConfig(Config):
    """How a file becomes an image; what is not given is chosen (see `vqvae2 train --help`)."""

    size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both."""
    channels: int | None = None
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha."""
    value_range: tuple[float, ...] = ()
    """The values of black and white, where they cannot be told: 0 1 for floats between."""
    fit: Literal["crop", "pad", "stretch"] | None = None
    """crop the centre, pad with the background, or stretch."""
    background: str | None = None
    """Colour behind padding and transparency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = not self.value_range or len(self.value_range) == 2
        check(fits, "value_range", self.value_range, "two rising numbers")


@dataclass(frozen=True, kw_only=True)
class ChosenConfig(Config):
    """All stages on a user's own images, with settings that are chosen."""

    recipe: str = field(default="", metadata={"recipe_only": True})
    """Settings that override the chosen ones: a recipe's name, or a YAML file (--config)."""
    data: ImagesConfig
    """Where the images are."""
    output_dir: str = may_change()
    """Where everything goes."""
    image: ChosenImageConfig = field(default_factory=ChosenImageConfig)
    """How files become images."""
    flips: Literal["auto", "yes", "no"] = "auto"
    """Whether to train on mirrored images too; auto: if there are fewer than 20,000 images. Priors
    are told which are mirrored, and sample none of these."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(ChosenConfig):
    """Everything, from images to samples: train, extract, train the priors, assemble, sample.

    What is not set is chosen to suit the images and the budget; OUTPUT/recipe.yaml says what and
    why, and --config RECIPE overrides it. Repeat the command to continue.

    Example: vqvae2 run --data.path photos --output-dir runs/photos --budget 30m
    """

    budget: str = "1h"
    """About how long it may take on this machine: 30m, 2h, 1d."""
    dry_run: bool = may_change(False)
    """Show what would be chosen, and the memory it needs, and stop."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ChosenConfig):
    """Does hierarchy help your images? Train one, two and three levels alike, and compare them.

    Each spends equally many bits on an image, and equal time on its autoencoder and small priors;
    all else is chosen as by `vqvae2 run`. OUTPUT/index.html answers in words, and shows errors,
    bits, distances and pictures side by side. Repeat the command to continue.

    Example: vqvae2 compare --data.path photos --minutes 20 --output-dir runs/compare
    """

    minutes: float = 20.0
    """About how long each of the three may take to train here; then each is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0.01, 100_000, "minutes")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Train everything on the Fashion-MNIST images that come with the package, and sample.

    Takes eleven minutes on two CPU cores, less where they compute in bfloat16. Run it again to
    continue after a kill; finished stages are skipped.
    """

    output_dir: str = may_change("runs/demo")
    """Where everything goes."""
    budget: float = 1.0
    """Share of the training steps: 0.25 for a quick look."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1e-3, 1000, "budget")


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Config):
    """Print a script with which the shell completes subcommands, flags and recipes on Tab.

    Example: vqvae2 completion --shell bash >> ~/.bashrc
    """

    shell: Literal["bash", "zsh"] = "bash"
    """Which shell it is for."""
