"""Settings for a user's own images, chosen to suit the images and the available time.

`look` reads some of the pictures, `choose` decides and says why; `vqvae2 run` writes the result as
a recipe, which anybody may edit.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from prior.config import TransformerConfig, TransformerOptions
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import decode, no_change
from vqvae2.data.decoding import Picture, picture_size, read_cell
from vqvae2.data.open_source import open_source, refuse_stream
from vqvae2.data.preprocessing import prepare
from vqvae2.data.splits import enough_held_out
from vqvae2.data.survey import MANY, is_flat, is_transparent, loses_much
from vqvae2.data.table import ImageTable, PreparedPictures

logger = logging.getLogger(__name__)
LOOKED_AT = 300  # pictures that are read, from all over the source
SMALL = (32, 32)  # pixels that show whether there is anything to be seen
BACKGROUNDS = ("white", "black", "gray")
MULTIPLE = 8  # of a side in pixels: the product of two levels' strides


@dataclass(frozen=True)
class Look:
    """What was seen of the images; shares are of those that were looked at."""

    number: int
    """Images in all, without those that the source holds out itself."""
    has_own_split: bool = False
    class_names: tuple[str, ...] = ()
    has_conditions: bool = False
    """Whether a column of conditions comes with them."""
    prepared: PreprocessingConfig | None = None
    """How they were prepared already; then the following was not looked at."""
    aspects: np.ndarray = field(default_factory=lambda: np.ones(1))
    """Width / height of each that was looked at."""
    short_side: float = 0.0
    """Median of the shorter sides, in pixels."""
    channels: int = 3
    """1 if all are grey, else 3; of arrays, theirs."""
    value_range: tuple[float, float] = (0.0, 255.0)
    transparent: float = 0.0
    """Share of pictures with transparent parts."""
    vanished: Mapping[str, float] = field(default_factory=dict)
    """Background -> share of pictures of which nothing is seen on it."""


@dataclass(frozen=True)
class Glance:
    """What is kept of a picture that was looked at."""

    size: tuple[int, int]  #: width and height
    kind: Any  #: Pillow's mode, or an array's type
    channels: int
    small: Image.Image | None  #: if it is transparent somewhere
    largest: float  #: of its values, if they are of 16 bits


def look(
    data: ImagesConfig,
    background: str = "white",
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> Look:
    """Open the source and read some of its pictures.

    Args:
        channels: of arrays, if it is known.
        value_range: the values of black and white, if they are known.

    Raises:
        UserError: no images, a stream, pictures of several kinds, other channels than given,
            arrays whose channel axis cannot be told, or no such background colour.
    """
    # The pixels are what they are if they were prepared already.
    assumed = PreprocessingConfig(background=background, channels=channels or 3)
    opened = open_source(data, assumed)
    table: ImageTable = refuse_stream(opened.train)
    has_conditions = data.condition_column is not None
    seen = Look(len(table), opened.held_out is not None, table.class_names, has_conditions)
    if isinstance(table.cells, PreparedPictures):
        return replace(seen, prepared=table.cells.config)

    # Some pictures. Those that cannot be read are named when all are checked.
    glances: list[Glance] = []
    readable = 0  # the last row that could be read
    rows = range(0, len(table), math.ceil(len(table) / LOOKED_AT))
    for i in rows:
        with suppress(Exception):  # decoders raise many kinds
            glances.append(_glance(read_cell(table.cells[i])))
            readable = i
    if not glances:
        raise UserError(f"{table.name}: none of the images can be read: check data.path.")
    if (broken := len(rows) - len(glances)) and data.on_error != "skip":
        what = "%s: %d of %d images that were looked at cannot be read"
        advice = "training names them, and stops unless you give --data.on-error skip"
        logger.warning(f"{what}: {advice}.", table.name, broken, len(rows))
    largest = max(glance.largest for glance in glances)
    kinds = {glance.kind for glance in glances}
    ranges = {value_range or _range_of(kind, largest, table.name) for kind in kinds}
    if len(ranges) > 1:
        raise UserError(f"{table.name} holds 8-bit and other pictures: convert them to one kind.")
    first = glances[0]
    if channels is None and first.channels > max(4, min(first.size)):
        shape = (*first.size[::-1], first.channels)
        what = f"{table.name} holds arrays of shape {shape}, no axis of which is surely channels"
        raise UserError(f"{what}: set --image.channels.")
    if channels is not None:  # whether they can be had of these pictures
        asked = replace(assumed, size=SMALL, value_range=min(ranges))
        decode(table.name, table.ids[readable], table.cells[readable], asked, no_change)

    # What they show; of 8-bit pictures on a small copy.
    sizes = np.array([glance.size for glance in glances], float)
    transparent = [glance.small for glance in glances if glance.small is not None]
    vanished = {}
    for name in BACKGROUNDS:
        on_it = PreprocessingConfig(size=SMALL, background=name)
        gone = [is_flat(prepare(image, on_it)) for image in transparent]
        vanished[name] = sum(gone) / len(glances)
    return replace(
        seen,
        aspects=sizes[:, 0] / sizes[:, 1],
        short_side=float(np.median(sizes.min(axis=1))),
        channels=max(glance.channels for glance in glances),
        value_range=ranges.pop(),
        transparent=len(transparent) / len(glances),
        vanished=vanished,
    )


def _glance(picture: Picture) -> Glance:
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
    small = _small(picture)
    kind = picture.dtype if isinstance(picture, np.ndarray) else picture.mode
    shown = small if small is not None and is_transparent(picture) else None
    largest = float(np.asarray(picture).max()) if _range_end(kind) == 65535 else 0.0
    return Glance(picture_size(picture), kind, _channels_of(picture, small), shown, largest)


def _range_of(kind: Any, largest: float, name: str) -> tuple[float, float]:
    """Black and white. Cameras of 10 and 12 bits write files of 16."""
    if (end := _range_end(kind)) is None:
        what = f"{name} holds {kind} values, whose black and white are unknown"
        raise UserError(f"{what}: give --image.value-range, such as 0 1.")
    if end == 65535 and 0 < largest <= 4095:
        end = 1023.0 if largest <= 1023 else 4095.0
    return 0.0, end


def _range_end(kind: Any) -> float | None:
    """White, by Pillow's mode or an array's type; None where it is not known."""
    if isinstance(kind, str):
        return 65535.0 if kind.startswith("I") else 255.0
    return float(np.iinfo(kind).max) if kind.kind == "u" else None


def _small(picture: Picture) -> Image.Image | None:
    """A small copy of an 8-bit picture."""
    if isinstance(picture, np.ndarray) or picture.mode.startswith(("I", "F")):
        return None
    return picture.convert("RGBA").resize(SMALL)


def _channels_of(picture: Picture, small: Image.Image | None) -> int:
    if isinstance(picture, np.ndarray):
        return 1 if picture.ndim == 2 else picture.shape[2]
    return 1 if small is None or _is_grey(small) else 3


def _is_grey(small: Image.Image) -> bool:
    red, green, blue, alpha = (np.asarray(band, int) for band in small.split())
    spread = np.maximum(abs(red - green), abs(green - blue))
    return bool(spread[alpha > 0].max(initial=0) <= 8)


@dataclass(frozen=True)
class Choice:
    """A recipe, and a sentence for each thing that was decided."""

    recipe: dict[str, Any]
    reasons: list[str]


def choose(
    seen: Look,
    *,
    on_gpu: bool,
    given: dict[str, Any],
    flips: str = "auto",
    multiple: int = MULTIPLE,
) -> Choice:
    """Everything but the numbers of steps, which depend on this machine's speed.

    Args:
        given: preprocessing that the user has set.
        multiple: sides in pixels are chosen as multiples of it.
        flips: yes, no or auto: whether mirrored images are further ones.
    """
    reasons: list[str] = []
    image = seen.prepared or _choose_image(seen, on_gpu, given, reasons, multiple)
    image = replace(image, **given)
    if given:
        reasons.append(f"as you asked: {', '.join(f'image.{k} {v}' for k, v in given.items())}")
    number = round(seen.number * (1 - (0 if seen.has_own_split else image.validation_fraction)))
    mirrored = flips == "yes" or (flips == "auto" and number < 20_000)
    rows = number * (1 + mirrored)

    # Codebooks and networks that so many images can fill without memorising them.
    sizes = ((40, 16), (100, 32), (300, 64), (1000, 128), (5000, 256), (10**12, 512))
    codes = next(size for most, size in sizes if number < most)
    hidden = 128 if on_gpu or number >= 1000 else 64
    network = TransformerOptions().for_rows(rows)
    if on_gpu and rows >= 200_000:
        network = TransformerConfig(width=512, num_layers=12, num_heads=8)
    reasons.append(
        f"codebooks of {codes}, priors of width {network.width}: {number:,} training images"
    )
    if mirrored and flips == "auto":
        reasons.append(
            "mirrored images as further ones to learn from, because there are few; samples are not"
            " mirrored (--flips no: without them)"
        )

    # The sections of the recipe.
    batch = 128 if on_gpu else 64 if number >= 2000 else 32
    train = {
        "model": {
            "image": _changed(image),
            "codebook_sizes": [codes],
            "hidden_channels": hidden,
        },
        "batch_size": batch,
    }
    shown = ("width", "num_layers", "num_heads", "dropout")
    transformer = {name: getattr(network, name) for name in shown}
    prior = {"transformer": transformer, "batch_size": batch, "learning_rate": 0.004}
    prior["patience"] = 5  # of ten validations: one that memorises its few rows stops
    recipe: dict[str, Any] = {"train": train, "prior_0": prior, "prior_1": dict(prior)}
    if mirrored:
        further = flipped(True)
        train["data"] = further["train"]["data"]
        recipe["extract"] = further["extract"]
    return Choice(recipe, reasons)


def flipped(mirrored: bool) -> dict[str, Any]:
    """What a recipe says of mirrored images as further ones."""
    views = ["original", *(["flip"] if mirrored else [])]
    data = {"augmentation": {"horizontal_flip": mirrored}}
    return {"train": {"data": data}, "extract": {"views": views}}


def _choose_image(
    seen: Look, on_gpu: bool, given: Mapping[str, Any], reasons: list[str], multiple: int
) -> PreprocessingConfig:
    """How files become images; `given` is set already."""
    # Size: what the pictures have and the device can do. A common shape is kept.
    sizes = (64, 128, 256) if on_gpu else (32, 64)
    side = max([sizes[0], *(size for size in sizes if size <= 1.4 * seen.short_side)])
    typical = float(np.median(seen.aspects))
    same = np.mean(abs(np.log(seen.aspects / typical)) < 0.1)
    height = width = side
    if same >= 0.9 and abs(np.log(typical)) > 0.1:  # of as many pixels as the square
        sides = side * typical**0.5, side / typical**0.5
        short = seen.short_side
        own = round(short * max(1.0, typical)), round(short * max(1.0, 1 / typical))
        if all(length % multiple == 0 for length in own) and math.prod(own) < 1.6 * side**2:
            sides = own
        width, height = (max(1, round(length / multiple)) * multiple for length in sides)
    device = "a GPU" if on_gpu else "a CPU"
    why = (
        f"the shorter sides are {seen.short_side:.0f} pixels in the median, training is on {device}"
    )
    if "size" in given:
        (height, width), why = PreprocessingConfig(size=given["size"]).height_width, "as you asked"
    reasons.append(f"{width} x {height} pixels (width x height): {why}")
    if seen.value_range[1] in (1023, 4095) and "value_range" not in given:
        reasons.append(f"values from 0 to {seen.value_range[1]:.0f}, as of 10 or 12 bits in 16")

    # Fit: cutting is fine where little is cut.
    cut = np.mean(loses_much(seen.aspects, PreprocessingConfig(size=(height, width))))
    fit = "pad" if cut > MANY else "crop"
    loses = f"{cut:.0%} of the pictures would lose more than a quarter of their area by cropping"
    if "fit" not in given:
        reasons.append(f"fit {fit}: {loses}")

    # Background: on which everything can be seen.
    background = "white"
    if seen.transparent and "background" not in given:
        background = min(BACKGROUNDS, key=lambda name: seen.vanished[name])
        text = f"{seen.transparent:.0%} have transparent parts"
        gone = ", ".join(f"{seen.vanished[name]:.0%} on {name}" for name in BACKGROUNDS)
        unseen = f"share of which nothing would be seen: {gone}"
        reasons.append(f"background {background}: {text}; {unseen}")

    # Held out: enough to judge by, where there are enough.
    fraction = 0.05
    if not seen.has_own_split:
        fraction = enough_held_out(seen.number)
        held_out = round(fraction * seen.number)
        reasons.append(
            f"about {held_out} images held out to measure with"
            if fraction
            else "no image held out: there are too few, so the last weights are kept"
        )
    return PreprocessingConfig(
        size=(height,) if height == width else (height, width),
        channels=seen.channels,
        value_range=seen.value_range,
        fit=fit,  # type: ignore[arg-type]
        background=background,
        validation_fraction=fraction,
    )


def _changed(image: PreprocessingConfig) -> dict[str, Any]:
    """What differs from the defaults, and always the size."""
    default = PreprocessingConfig()
    values = {"size": list(image.size)}
    for name in ("channels", "value_range", "fit", "background", "validation_fraction"):
        value = getattr(image, name)
        if value != getattr(default, name):
            values[name] = list(value) if isinstance(value, tuple) else value
    return values
