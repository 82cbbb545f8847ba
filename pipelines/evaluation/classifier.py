"""A small classifier of the user's own images: features to compare sets by, with no download.

It learns the labels of the images; without any, which of a few transformations was applied to them.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.artifact import Artifact, check_saved
from vqvae2.common.config import check, check_between
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ShuffledLoader
from vqvae2.common.messages import progress_bar
from vqvae2.common.threads import OwnCpus
from vqvae2.data import ImageDataset, to_images

logger = logging.getLogger(__name__)

VERSION = 1  # of the network and its training: a new number where features change
BATCH_SIZE = 64
WIDTHS = (32, 64, 128)
CELLS = 8_000_000  # of the grids behind the first layer, over a whole training: the time it takes
MOST_EPOCHS, FEWEST_STEPS = 30, 150
ORDERS = ("as it is", "upside down", "halves exchanged", "both")
QUALITIES = ("clear", "blurred", "noisy", "coarse")
TRANSFORMATIONS = tuple(f"{order}, {quality}" for order in ORDERS for quality in QUALITIES)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The images that a classifier takes, and what it tells apart."""

    size: tuple[int, int]
    """Height and width in pixels."""
    channels: int
    """Of the images."""
    class_names: tuple[str, ...]
    """What the logits stand for, in order."""
    of_labels: bool
    """Whether these are the user's classes, not transformations."""

    def __post_init__(self) -> None:
        check_between(self, 8, 1 << 14, "size")
        check_between(self, 1, 1024, "channels")
        check(len(self.class_names) > 1, "class_names", self.class_names, "two names or more")

    def summary(self) -> str:
        """In a few words."""
        height, width = self.size
        what = "classes" if self.of_labels else "transformations"
        return f"{len(self.class_names)} {what}, {self.channels}x{height}x{width}"

    @property
    def stride(self) -> int:
        """Of the first layer: large images cost no more than some."""
        return 2 ** max(1, round(math.log2(min(self.size) / 16)))


class Classifier(Artifact):
    """Convolutions whose means over all positions, at every scale, are the features: fine detail
    (noise, blur) shows in the first ones, what is depicted in the last."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        stride, width = config.stride, WIDTHS[0]
        first = nn.Conv2d(config.channels, width, 2 * stride, stride, stride // 2, bias=False)
        self.stages = nn.ModuleList([nn.Sequential(first, nn.BatchNorm2d(width), _Block(width))])
        for before, width in pairwise(WIDTHS):
            down = nn.Conv2d(before, width, 3, 2, 1, bias=False)
            self.stages.append(nn.Sequential(down, nn.BatchNorm2d(width), _Block(width)))
        self.norm = nn.BatchNorm1d(sum(WIDTHS), affine=False)
        self.head = nn.Linear(sum(WIDTHS), len(config.class_names))

    def features(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, bytes or floats in [-1, 1], to `(B, 224)`: of mean 0 and standard
        deviation 1 over the images of the training."""
        hidden = to_images(images).contiguous(memory_format=torch.channels_last)
        means = []
        for stage in self.stages:
            hidden = stage(hidden)
            means.append(hidden.mean(dim=(2, 3)))
        return self.norm(torch.cat(means, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images, as for `features`, to logits `(B, classes)`."""
        return self.head(self.features(images))


class _Block(nn.Module):
    """A residual block `(B, E, h, w)` of one convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return F.relu(x + self.norm(self.conv(x)))


class Rows:
    """Some rows (by default all) of images in memory, or of a dataset, as a dataset."""

    def __init__(self, images: Any, rows: Sequence[int] | None = None) -> None:
        self.images, self.rows = images, range(len(images)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.rows[i] for i in indices]
        if isinstance(self.images, Tensor):
            return {"images": self.images[rows]}
        return {"images": self.images.__getitems__(rows)["images"]}

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.__getitems__(range(start, min(start + size, len(self))))["images"]


Images = Tensor | ImageDataset | Rows


def train_classifier(
    images: Images,
    labels: Tensor | Sequence[int] | None = None,
    *,
    class_names: Sequence[str] = (),
    seed: int = 0,
    share: float = 1.0,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Train a classifier; the same arguments give the same bits, on the same number of threads.

    Args:
        images: `(N, C, H, W)` uint8 or float in [-1, 1], or a dataset of them.
        labels: the class number of each; None, or one class alone: learn transformations.
        class_names: the classes that the labels number; by default "0", "1", ...
        share: of the usual time.
    """
    # What it tells apart.
    rows = Rows(images)
    numbers = None if labels is None else torch.as_tensor(labels).long()
    if numbers is not None and len(numbers.unique()) > 1:
        names = tuple(class_names) or tuple(map(str, range(int(numbers.max()) + 1)))
    else:
        names, numbers = TRANSFORMATIONS, None
    channels, height, width = rows.__getitems__([0])["images"].shape[1:]
    of_labels, size = numbers is not None, (height, width)
    config = ClassifierConfig(size=size, channels=channels, class_names=names, of_labels=of_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(config).train().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # Steps by the size of the images, so that the time hardly depends on it.
    cells = height * width // config.stride**2
    seen = min(share * CELLS / cells, MOST_EPOCHS * len(rows))
    steps = max(FEWEST_STEPS, round(seen / BATCH_SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    loader = ShuffledLoader(rows, BATCH_SIZE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    own_cpus = OwnCpus(bind=model.device.type == "cpu")

    # Train; no image is seen twice in the same way.
    for step in progress_bar(range(steps), desc="training the classifier", leave=False):
        indices = loader.indices(step)
        batch = to_images(rows.__getitems__(indices)["images"])
        if numbers is None:
            batch, targets = transform(_shift(batch, generator), generator)
        else:
            batch, targets = _shift(batch, generator), numbers[indices]
        optimizer.zero_grad()
        with own_cpus:
            logits = model(batch.to(device))
            F.cross_entropy(logits, targets.to(device), label_smoothing=0.1).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def made_classifier(
    folder: str | Path,
    images: Images,
    labels: Tensor | Sequence[int] | None = None,
    *,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Classifier, Path]:
    """The classifier of a set of images, on the CPU, and where it lies: under a folder, in one
    named by a hash of the images, their labels and all that its training depends on. It is trained
    if it is not there yet, by one process for all. For the arguments see `train_classifier`."""
    numbers = None if labels is None else torch.as_tensor(labels).tolist()
    facts = [VERSION, seed, numbers, list(class_names), images_hash(images)]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    state, place = processes(), Path(folder) / f"classifier_{name}"

    def make() -> Classifier:
        try:
            check_saved(place)
        except UserError:
            if place.exists():
                logger.warning("%s is damaged, and made again.", place)
            options = {"class_names": class_names, "seed": seed, "device": state.device}
            train_classifier(images, labels, **options).save_pretrained(place)
        return Classifier.from_pretrained(place)

    return on_main_process(state, make), place  # the folder may lie on the first machine alone


def images_hash(images: Images) -> str:
    """SHA-256 of the pixels of a set of images, in order."""
    digest = hashlib.sha256()
    for batch in Rows(images).batches():
        digest.update(f"{batch.dtype} {tuple(batch.shape[1:])}".encode())
        digest.update(batch.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """All images of a batch moved by up to a sixteenth of a side, their border repeated."""
    height, width = images.shape[2:]
    y, x = max(1, height // 16), max(1, width // 16)
    top, left = (int(torch.randint(2 * n + 1, (), generator=generator)) for n in (y, x))
    padded = F.pad(images, (x, x, y, y), mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


def transform(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `(B, C, H, W)` in [-1, 1], each in one of the `TRANSFORMATIONS`; and which, `(B,)`."""
    # The order of the parts.
    numbers = torch.randint(len(TRANSFORMATIONS), (len(images),), generator=generator)
    orders, qualities = numbers // len(QUALITIES), numbers % len(QUALITIES)
    new, (height, width) = images.clone(), images.shape[2:]
    turned, exchanged = (orders == 1) | (orders == 3), orders >= 2
    new[turned] = new[turned].flip(2, 3)
    new[exchanged] = new[exchanged].roll((height // 2, width // 2), (2, 3))

    # The quality, of one strength per batch.
    strength = float(torch.rand((), generator=generator))
    blurred, noisy, coarse = (qualities == i for i in (1, 2, 3))
    new[blurred] = blur(new[blurred], 0.5 + strength)
    noise = torch.randn(new[noisy].shape, generator=generator)
    new[noisy] = (new[noisy] + (0.05 + 0.25 * strength) * noise).clamp(-1, 1)
    averaged = F.avg_pool2d(new[coarse], 2, ceil_mode=True)
    new[coarse] = F.interpolate(averaged, size=(height, width))
    return new, numbers


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images `(B, C, H, W)` blurred by a Gaussian of this many pixels."""
    radius, channels = math.ceil(2 * sigma), images.shape[1]
    window = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    window = (window / window.sum()).expand(channels, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, window[:, :, None], groups=channels)
    return F.conv2d(across, window[..., None], groups=channels)


class Accuracy(NamedTuple):
    """Shares of the test images whose class was recognized."""

    top_1: float
    top_5: float  # the class is among the five that are found likeliest
    per_class: dict[str, float]  # of the classes that the test images have


@torch.no_grad()
def accuracy(classifier: Classifier, images: Images, labels: Tensor | Sequence[int]) -> Accuracy:
    """How well a classifier knows the classes of images."""
    numbers, names = torch.as_tensor(labels).long(), classifier.config.class_names
    logits = [classifier(batch.to(classifier.device)).cpu() for batch in Rows(images).batches()]
    likeliest = torch.cat(logits).topk(min(5, len(names)), dim=1).indices
    right = likeliest == numbers[:, None]
    per_class = {}
    for number in numbers.unique().tolist():
        per_class[names[number]] = right[numbers == number, 0].double().mean().item()
    return Accuracy(
        right[:, 0].double().mean().item(), right.any(dim=1).double().mean().item(), per_class
    )


def accuracy_scores(
    training: Mapping[str, tuple[Images, Tensor | Sequence[int]]],
    test: tuple[Images, Tensor | Sequence[int]],
    *,
    class_names: Sequence[str],
    seed: int = 0,
    share: float = 0.5,
    device: str | torch.device = "cpu",
) -> dict[str, Accuracy]:
    """Classification accuracy scores (the paper's section 4.3): how well a classifier that has seen
    nothing but one of several sets recognizes real images that are held out.

    All are trained alike, on the same number of images: that of the smallest set, drawn at random
    from each larger one. For `seed`, `share` and `device` see `train_classifier`.

    Args:
        training: images and their class numbers by name: real ones, reconstructions, samples.
        test: real images that were held out, and their class numbers.

    Raises:
        UserError: a set has one class alone, or no class.
    """
    number = min(len(labels) for _, labels in training.values())
    scores = {}
    for name, (images, labels) in training.items():
        generator = torch.Generator().manual_seed(seed)  # labels may take turns
        rows = torch.randperm(len(labels), generator=generator)[:number].tolist()
        chosen = torch.as_tensor(labels)[rows]
        if len(chosen.unique()) < 2:
            what = f"{name}: {number} images have fewer than two classes"
            raise UserError(f"{what}, so that none can be learned: give more images or classes.")
        options: dict[str, Any] = {"class_names": class_names, "seed": seed, "share": share}
        classifier = train_classifier(Rows(images, rows), chosen, **options, device=device)
        scores[name] = accuracy(classifier, *test)
    return scores
