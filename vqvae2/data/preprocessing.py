"""From a decoded picture to pixels in the channels, size and range of the configuration."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import MODES
from vqvae2.config import PreprocessingConfig
from vqvae2.data.decoding import Picture, first_line, read_picture_file

logger = logging.getLogger(__name__)
Window = tuple[float, float, float, float]
"""A part of a picture: left, top, right, bottom in pixels."""

BYTES = (0.0, 255.0)


def to_images(pixels: Tensor) -> Tensor:
    """8-bit pixels `(B, C, H, W)` to images in [-1, 1]; floating images pass unchanged."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def as_images(given: Any, config: PreprocessingConfig) -> Tensor:
    """Images `(B, C, H, W)` in [-1, 1], prepared as in training, of whatever shows some.

    Args:
        given: a picture or a list of them, each a PIL image, a path, or an array `(H, W)` or
            `(H, W, C)` as a .npy file may hold; or images that are prepared: a tensor or an array
            `(B, C, H, W)`, or a tensor `(C, H, W)`, in [-1, 1] or of bytes.

    Raises:
        UserError: it is none of these, or does not match the configuration.
    """
    # Prepared images are only checked.
    if isinstance(given, np.ndarray) and given.ndim == 4:
        given = torch.from_numpy(np.ascontiguousarray(given))
    if isinstance(given, Tensor):
        check(given.dtype != torch.bool, "the images' type", given.dtype, "uint8 or floating")
        images = to_images(given if given.ndim == 4 else given[None]).float()
        shape, allowed = (config.channels, *config.height_width), "(B, {}, {}, {}), as the model's"
        fits = tuple(images.shape[1:]) == shape and len(images) > 0
        check(fits, "the images' shape", tuple(given.shape), allowed.format(*shape))
        most = round(images.abs().max().item(), 3)
        check(most <= 1, "the images' largest value", most, "at most 1, as they are in [-1, 1]")
        if given.is_floating_point() and images.min() >= 0 and most > 0:
            _warn_of_range()
        return images

    # Pictures, one after the other: each error says which it is about.
    rows = []
    for i, one in enumerate(given if isinstance(given, list | tuple) else [given]):
        try:
            pixels = one if isinstance(one, Tensor) else load_picture(one, config)
            rows.append(as_images(pixels, config))
        except (UserError, OSError) as error:  # Pillow decodes only when it has to
            raise UserError(f"image {i}: {first_line(error)}") from None
    if not rows:
        raise UserError("there is no image: give one or more.")
    return torch.cat(rows)


@cache
def _warn_of_range() -> None:
    logger.warning("no value of these images is below 0: are they in [-1, 1], as expected?")


def load_picture(given: str | Path | Picture, config: PreprocessingConfig) -> Tensor:
    """One picture, or the file of one, as pixels `(1, C, H, W)`.

    Raises:
        UserError: the file is missing, is no picture, or cannot be prepared.
    """
    picture = open_picture(given)
    try:
        return torch.from_numpy(prepare(picture, config))[None]
    except UserError as error:
        name = f"{given}: " if isinstance(given, str | Path) else ""
        raise UserError(f"{name}{error}") from None


def open_picture(given: Any) -> Picture:
    """The picture in a file; a picture is returned as it is. Raises as `read_picture_file`, and a
    `UserError` for what is neither."""
    if isinstance(given, str | Path):
        return read_picture_file(str(given))
    if not isinstance(given, Image.Image | np.ndarray):
        allowed = "a PIL image, a path, an array or a tensor"
        raise UserError(f"it is of type {type(given).__name__}, but must be {allowed}.")
    return given


def prepare(
    picture: Picture, config: PreprocessingConfig, window: Window | None = None
) -> np.ndarray:
    """One picture as pixels `(C, H, W)`: uint8 of an 8-bit picture, else float32 in [-1, 1].

    Args:
        window: the part of the upright picture to resize, instead of what `fit` says.

    Raises:
        UserError: the picture's type, values or channels do not match the configuration.
    """
    # Arrays, 16-bit and floating grey go by the value range.
    if isinstance(picture, np.ndarray):
        return _prepare_array(picture, config, window)
    if config.channels not in MODES:
        what = f"it has {len(picture.getbands())} channels, but image.channels is {config.channels}"
        raise UserError(f"{what}: set it to 1, 2, 3 or 4.")
    upright = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        return _prepare_array(np.array(upright), config, window)
    if config.value_range != BYTES:
        what = f"it is an 8-bit picture, but image.value_range is {config.value_range}"
        raise UserError(f"{what}: convert it, or train with the range (0, 255).")

    # 8-bit pictures stay bytes; what padding leaves free shows the background.
    image = _convert(upright, MODES[config.channels], config.background)
    image = _resize(image, config, window)
    height, width = config.height_width
    if image.size != (width, height):
        page = Image.new("RGBA", (width, height), config.background).convert(image.mode)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    pixels = np.array(image).reshape(height, width, config.channels)
    return rearrange(pixels, "h w c -> c h w")


def _resize(image: Image.Image, config: PreprocessingConfig, window: Window | None) -> Image.Image:
    """To the configured size, antialiased; with fit 'pad' perhaps smaller than it."""
    height, width = config.height_width
    if window is not None:
        return image.resize((width, height), Image.Resampling.BICUBIC, box=window)
    if config.fit == "crop":
        return ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    if config.fit == "stretch":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if image.width <= width and image.height <= height:
        return image
    smaller = ImageOps.contain(image, (width, height), method=Image.Resampling.BICUBIC)
    if 0 in smaller.size:
        what = f"it has {image.width} x {image.height} pixels, too narrow to be seen in"
        raise UserError(f"{what} {width} x {height}: cut it, or set --image.fit crop.")
    return smaller


def _convert(image: Image.Image, mode: str, background: str) -> Image.Image:
    """To the mode, transparent parts on the background where the mode has no alpha."""
    if "A" not in mode and image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, background)
        page.alpha_composite(image)
        image = page
    return image.convert(mode)


def _prepare_array(
    array: np.ndarray, config: PreprocessingConfig, window: Window | None
) -> np.ndarray:
    # One grey band fills three channels; otherwise the bands are the channels.
    array = array[..., None] if array.ndim == 2 else array
    if 0 in array.shape:
        raise UserError(f"it is an array of shape {array.shape}, without a pixel: remove it.")
    accepted = (1, 3) if config.channels == 3 else (config.channels,)
    if array.ndim != 3 or array.shape[-1] not in accepted:
        what = f"it is an array of shape {array.shape}, but expected (H, W, {config.channels})"
        is_first = array.ndim == 3 and array.shape[0] in accepted
        advice = "transpose it" if is_first else "set image.channels, or convert it"
        raise UserError(f"{what}: {advice}.")

    # Each band is resized by itself, in floating point unless it holds plain bytes.
    of_bytes = array.dtype == np.uint8 and config.value_range == BYTES
    array = array if of_bytes else _scale(array, config)
    images = [Image.fromarray(band) for band in rearrange(array, "h w c -> c h w")]
    bands = np.stack([np.array(_resize(image, config, window)) for image in images])
    bands = bands if of_bytes else np.clip(bands, -1, 1)  # bicubic filters overshoot

    # Padding is black.
    height, width = config.height_width
    page = np.full((config.channels, height, width), 0 if of_bytes else -1, bands.dtype)
    top, left = (height - bands.shape[1]) // 2, (width - bands.shape[2]) // 2
    page[:, top : top + bands.shape[1], left : left + bands.shape[2]] = bands
    return page


def _scale(array: np.ndarray, config: PreprocessingConfig) -> np.ndarray:
    """Values to [-1, 1] by the declared range."""
    low, high = config.value_range
    if array.dtype.kind in "ui" and np.iinfo(array.dtype).max < high:
        what = f"it holds {array.dtype} values, which end before image.value_range"
        raise UserError(f"{what} {config.value_range}: convert it, or correct the range.")
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        what = f"it holds {array.dtype} values that are no real numbers (NaN, infinity, ...)"
        raise UserError(f"{what}: repair or remove it.")
    values = f"it holds {array.dtype} values from {array.min()} to {array.max()}"
    if config.value_range == BYTES:
        advice = "train with --image.value-range, those of black and white (0 65535, 0 4095, ...)"
        if array.min() >= 0 and array.max() <= 1:
            advice = "multiply it by 255 and convert it to uint8, or train with --image.value-range"
            advice += " 0 1"
        elif array.min() >= 0 and array.max() <= 255:
            advice = "convert it to uint8"
        raise UserError(f"{values}, not 8-bit pixels: {advice}.")
    if not (low <= array.min() and array.max() <= high):
        what = f"{values}, outside of image.value_range {config.value_range}"
        raise UserError(f"{what}: widen the range.")
    return ((array.astype(np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
