"""Settings for a user's own images: chosen by what the images are and by the time there is.

`look` reads some of the pictures, `choose` decides and says why; `vqvae2 run` writes the result as
a recipe, which anybody may edit.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data.decoding import read_cell
from vqvae2.data.open_source import ImageTable, PreparedPictures, open_source, refuse_stream

LOOKED_AT = 300  # pictures that are read, from all over the source
BACKGROUNDS = ("white", "black", "gray")
FLAT = 4.0  # standard deviation of 8-bit values below which nothing can be seen in a picture
CUT = 0.25  # share of a picture's area whose loss a person would mind
MIN_HELD_OUT = 25  # images, below which the choice of the best weights is luck
MULTIPLE = 8  # of a side in pixels: the product of the strides


@dataclass(frozen=True)
class Look:
    """What was seen of the images; shares are of those that were looked at."""

    number: int
    """Images in all, without those that the source holds out itself."""
    has_own_split: bool
    class_names: tuple[str, ...]
    prepared: PreprocessingConfig | None
    """How they were prepared already."""
    aspects: np.ndarray
    """Width / height of those looked at."""
    short_side: float
    """Median of the shorter sides, in pixels."""
    channels: int
    """1 if all are grey, else 3; of arrays, theirs."""
    value_range: tuple[float, float]
    transparent: float
    """Share of pictures with transparent parts."""
    vanished: dict[str, float]
    """Background -> share of pictures of which nothing is seen on it."""


def look(data: ImagesConfig) -> Look:
    """Open the source and read some of its pictures.

    Raises:
        UserError: no images, a stream, or pictures of several kinds.
    """
    # What the source says of all images.
    opened = open_source(data, PreprocessingConfig())
    table: ImageTable = refuse_stream(opened.train)
    facts: dict[str, Any] = {
        "number": len(table),
        "has_own_split": opened.held_out is not None,
        "class_names": table.class_names,
        "prepared": None,
    }
    if isinstance(table.cells, PreparedPictures):
        made = table.cells.config
        height, width = made.height_width
        seen = {"aspects": np.array([width / height]), "short_side": min(height, width)}
        seen |= {"channels": made.channels, "value_range": made.value_range}
        return Look(**{**facts, "prepared": made}, **seen, transparent=0.0, vanished={})

    # What some pictures show. Those that cannot be read are named when all are checked.
    sizes: list[tuple[int, int]] = []
    channels: set[int] = set()
    ranges: set[tuple[float, float]] = set()
    transparent = 0
    vanished = dict.fromkeys(BACKGROUNDS, 0)
    for i in range(0, len(table), max(1, len(table) // LOOKED_AT)):
        try:
            picture = read_cell(table.cells[i])
        except Exception:  # decoders raise many kinds
            continue
        if isinstance(picture, np.ndarray):
            sizes.append((picture.shape[1], picture.shape[0]))
            channels.add(1 if picture.ndim == 2 else picture.shape[2])
            ranges.add(_range_of(picture, table.name))
            continue
        upright = ImageOps.exif_transpose(picture)
        sizes.append(upright.size)
        ranges.add((0.0, 65535.0) if upright.mode.startswith("I") else (0.0, 255.0))
        small = upright.convert("RGBA").resize((32, 32)) if upright.mode[0] not in "IF" else None
        channels.add(1 if small is None or _is_grey(small) else 3)
        if small is not None and small.getextrema()[3][0] < 255:
            transparent += 1
            for background in BACKGROUNDS:
                vanished[background] += _is_flat_on(small, background)
    if not sizes:
        raise UserError(f"{table.name}: none of the images can be read: check data.path.")
    if len(ranges) > 1:
        raise UserError(f"{table.name} holds 8-bit and other pictures: convert one kind.")

    widths, heights = np.array(sizes, float).T
    number = len(sizes)
    return Look(
        **facts,
        aspects=widths / heights,
        short_side=float(np.median(np.minimum(widths, heights))),
        channels=max(channels),
        value_range=ranges.pop(),
        transparent=transparent / number,
        vanished={name: count / number for name, count in vanished.items()},
    )


def _range_of(array: np.ndarray, name: str) -> tuple[float, float]:
    if array.dtype.kind == "u":
        return 0.0, float(np.iinfo(array.dtype).max)
    raise UserError(
        f"{name} holds {array.dtype} values: train step by step, with --image.value-range."
    )


def _is_grey(small: Image.Image) -> bool:
    red, green, blue, alpha = (np.asarray(band, int) for band in small.split())
    spread = np.maximum(abs(red - green), abs(green - blue))
    return bool(spread[alpha > 0].max(initial=0) <= 8)


def _is_flat_on(small: Image.Image, background: str) -> bool:
    page = Image.new("RGBA", small.size, background)
    page.alpha_composite(small)
    return bool(np.asarray(page.convert("L")).std() < FLAT)


@dataclass(frozen=True)
class Choice:
    """A recipe, and a sentence for each thing that was decided."""

    recipe: dict[str, Any]
    reasons: list[str]


def choose(seen: Look, *, on_gpu: bool, given: dict[str, Any], flips: str = "auto") -> Choice:
    """Everything but the numbers of steps, which depend on this machine's speed.

    Args:
        given: preprocessing that the user has set.
        flips: yes, no or auto: whether mirrored images are further ones.
    """
    reasons: list[str] = []
    image = seen.prepared or _choose_image(seen, on_gpu, reasons)
    image = replace(image, **given)
    if given:
        reasons.append(f"as you asked: {', '.join(f'image.{k} {v}' for k, v in given.items())}")
    number = round(seen.number * (1 - (0 if seen.has_own_split else image.validation_fraction)))
    mirrored = flips == "yes" or (flips == "auto" and number < 20_000)
    rows = number * (1 + mirrored)

    # Codebooks and networks that so many images can fill without learning them by heart.
    sizes = ((1000, 128), (5000, 256), (10**12, 512))
    codes = next(size for most, size in sizes if number < most)
    hidden = 128 if on_gpu or number >= 1000 else 64
    networks = (  # rows, width, layers, heads, dropout
        (4000, 128, 3, 2, 0.2),
        (40_000, 192, 4, 3, 0.1),
        (200_000 if on_gpu else 10**12, 256, 6, 4, 0.1),
        (10**12, 512, 12, 8, 0.1),
    )
    _, width, layers, heads, dropout = next(net for net in networks if rows < net[0])
    reasons.append(f"codebooks of {codes}, priors of width {width}: {number:,} training images")
    if mirrored and flips == "auto":
        reasons.append(
            "mirrored images as further ones, because there are few (--flips no: where left and"
            " right matter)"
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
    transformer = {"width": width, "num_layers": layers, "num_heads": heads, "dropout": dropout}
    prior = {"transformer": transformer, "batch_size": batch, "learning_rate": 0.002}
    recipe: dict[str, Any] = {"train": train, "prior_0": prior, "prior_1": dict(prior)}
    if mirrored:
        train["data"] = {"augmentation": {"horizontal_flip": True}}
        recipe["extract"] = {"views": ["original", "flip"]}
    return Choice(recipe, reasons)


def _choose_image(seen: Look, on_gpu: bool, reasons: list[str]) -> PreprocessingConfig:
    """How files become images."""
    # Size: what the pictures have and the device can do. A common shape is kept.
    sizes = (64, 128, 256) if on_gpu else (32, 64)
    side = max([sizes[0], *(size for size in sizes if size <= 1.4 * seen.short_side)])
    typical = float(np.median(seen.aspects))
    same = np.mean(abs(np.log(seen.aspects / typical)) < 0.1)
    height = width = side
    if same >= 0.9 and abs(np.log(typical)) > 0.1:
        width = _multiple(side * min(1.0, typical))
        height = _multiple(side / max(1.0, typical))
    device = "a GPU" if on_gpu else "a CPU"
    reasons.append(
        f"{width} x {height} pixels (width x height): the shorter sides are"
        f" {seen.short_side:.0f} pixels in the median, and {device} trains"
    )

    # Fit: cutting is fine where little is cut.
    ratio = seen.aspects / (width / height)
    lost = 1 - np.minimum(ratio, 1 / ratio)
    cut = float(np.mean(lost > CUT))
    fit = "pad" if cut > 0.1 else "crop"
    loses = f"{cut:.0%} of the pictures would lose more than a quarter of their area by cropping"
    reasons.append(f"fit {fit}: {loses}")

    # Background: on which everything can be seen.
    background = "white"
    if seen.transparent:
        background = min(BACKGROUNDS, key=lambda name: seen.vanished[name])
        text = f"{seen.transparent:.0%} have transparent parts"
        gone = ", ".join(f"{seen.vanished[name]:.0%} on {name}" for name in BACKGROUNDS)
        reasons.append(f"background {background}: {text}; so many would vanish: {gone}")

    # Held out: enough to judge by, where there are enough.
    fraction = 0.05
    if not seen.has_own_split:
        fraction = max(fraction, MIN_HELD_OUT / seen.number)
        fraction = round(fraction, 3) if fraction <= 0.25 else 0.0
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


def _multiple(side: float) -> int:
    return max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)


def _changed(image: PreprocessingConfig) -> dict[str, Any]:
    """What differs from the defaults, and always the size."""
    default = PreprocessingConfig()
    values = {"size": list(image.size)}
    for name in ("channels", "value_range", "fit", "background", "validation_fraction"):
        value = getattr(image, name)
        if value != getattr(default, name):
            values[name] = list(value) if isinstance(value, tuple) else value
    return values
