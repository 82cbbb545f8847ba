"""From one picture, as it was decoded or found in an array, to pixels in the channels, size and range of the configuration."""

import io
import math
import re
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from vqvae2.common.errors import UserError
from vqvae2.common.pictures import MODES
from vqvae2.config import PreprocessingConfig

Picture = Image.Image | np.ndarray
"""A picture file that Pillow holds without loss, or an array (H, W) or (H, W, C) of anything else: more bits, floats, more bands."""

Window = tuple[float, float, float, float]
"""A part of a picture: left, top, right, bottom in pixels."""

MAX_PIXELS = (
    178_956_970  # twice Pillow's warning: a file that claims more is an attack or a mistake
)
TIFF_SUFFIXES = {".tif", ".tiff"}
TIFF_MARKS = (b"II*\0", b"MM\0*")
BYTES = (0.0, 255.0)


def to_images(pixels: Tensor) -> Tensor:
    """8-bit pixels `(B, C, H, W)` to images in [-1, 1]; floating images pass as they are."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def prepare(
    picture: Picture, config: PreprocessingConfig, window: Window | None = None
) -> np.ndarray:
    """One picture as pixels `(C, H, W)`: uint8 of an 8-bit picture, else float32 in [-1, 1] by the configured value range.

    Args:
        window: the part to be resized to the configured size, instead of what `fit` says; of the upright picture.

    Raises:
        UserError: the picture's type, values or channels do not go with the configuration.
    """
    if isinstance(picture, np.ndarray):
        return _prepare_array(picture, config, window)
    if config.channels not in MODES:
        raise UserError(
            f"it is a picture of {len(picture.getbands())} channels, but image.channels is {config.channels}: set it to 1, 2, 3 or 4."
        )
    if picture.mode.startswith(("I", "F")):  # 16-bit and floating grey
        return _prepare_array(np.array(ImageOps.exif_transpose(picture)), config, window)
    if config.value_range != BYTES:
        raise UserError(
            f"it is an 8-bit picture, but image.value_range is {config.value_range}: convert it, or leave the range at (0, 255)."
        )
    image = _resize(
        _convert(ImageOps.exif_transpose(picture), MODES[config.channels], config.background),
        config,
        window,
    )
    height, width = config.height_width
    if image.size != (width, height):
        page = Image.new("RGBA", (width, height), config.background).convert(image.mode)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    return rearrange(np.array(image).reshape(height, width, config.channels), "h w c -> c h w")


def _resize(image: Image.Image, config: PreprocessingConfig, window: Window | None) -> Image.Image:
    """To the configured size, antialiased; with fit 'pad' perhaps smaller than it."""
    height, width = config.height_width
    if window is not None:
        return image.resize((width, height), Image.Resampling.BICUBIC, box=window)
    if config.fit == "crop":
        return ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    if config.fit == "stretch":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if image.width > width or image.height > height:
        return ImageOps.contain(image, (width, height), method=Image.Resampling.BICUBIC)
    return image


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture as it stands upright."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    return ImageOps.exif_transpose(picture).size


def read_picture(file: Path | str | bytes, suffix: str = "") -> Picture:
    """A picture file, or its bytes (then the suffix tells TIFF and NumPy files from others), decoded whole.

    Raises:
        UserError: the picture cannot be held without loss.
        Exception: of many kinds, for a file that is no picture (see `read_picture_file`).
    """
    suffix = (suffix or (Path(file).suffix if not isinstance(file, bytes) else "")).lower()
    if isinstance(file, bytes) and file[:4] in TIFF_MARKS:
        suffix = ".tif"
    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    if suffix == ".npy":
        return np.load(opened, allow_pickle=False)
    if suffix in TIFF_SUFFIXES:
        return _read_tiff(opened)
    image = Image.open(opened)
    if math.prod(image.size) > MAX_PIXELS:
        raise UserError(
            f"it claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: remove it, or make it smaller."
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photo with its preview
        raise UserError(f"it has {frames} frames: save the one that is meant, or each as a file.")
    image.load()
    if image.format == "PPM" and image.mode == "RGB" and _maximum_of_ppm(opened) > 255:
        raise UserError(
            "it is a PPM with 16 bits in several channels, of which Pillow keeps 8: save it as TIFF or .npy."
        )
    if image.format == "PNG" and _bits_of_png(opened) == 16 and image.mode in ("RGB", "RGBA", "LA"):
        raise UserError(
            "it is a PNG with 16 bits in several channels, of which Pillow keeps 8: save it as TIFF or .npy."
        )
    return image


def read_picture_file(path: str) -> Picture:
    """One picture file.

    Raises:
        UserError: the file is missing, or is no picture.
    """
    try:
        return read_picture(Path(path).expanduser())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many kinds for a file that is not what it seems
        raise UserError(
            f"{path} cannot be read as a picture ({first_line(error)}): check the path and the file."
        ) from None


def load_picture(path: str, config: PreprocessingConfig) -> Tensor:
    """One picture file as pixels `(1, C, H, W)`.

    Raises:
        UserError: the file is missing, is no picture, or cannot be prepared.
    """
    picture = read_picture_file(path)
    try:
        return torch.from_numpy(prepare(picture, config))[None]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none; without addresses, which say nothing and are others each time."""
    return re.sub(" at 0x[0-9a-f]+", "", (str(error).splitlines() or [type(error).__name__])[0])


def _bits_of_png(file: Path | str | io.BytesIO) -> int:
    """Bits per channel, at a fixed place in the header (PNG specification, 11.2.1)."""
    return _beginning(file, 25)[24]


def _maximum_of_ppm(file: Path | str | io.BytesIO) -> int:
    """The fourth word of the header, comments aside: format, width, height, largest value."""
    lines = (line.split(b"#")[0] for line in _beginning(file, 1024).split(b"\n"))
    return int(b" ".join(lines).split()[3])


def _beginning(file: Path | str | io.BytesIO, size: int) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:size]
    with open(file, "rb") as opened:
        return opened.read(size)


def _read_tiff(file: Path | str | io.BytesIO) -> Picture:
    """Through Pillow where it holds the file as it is (8 bits, known colours), else as an array."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        number = sum(not (other.is_reduced or other.is_mask) for other in tiff.pages)
        if page.is_reduced or page.is_mask:
            raise UserError(
                "it is a TIFF whose first page is a preview or a mask: save the picture first."
            )
        if number > 1:
            raise UserError(
                f"it is a TIFF of {number} pages: save its bands as samples of one page (planarconfig), or each page as a file."
            )
        if page.imagewidth * page.imagelength > MAX_PIXELS:
            raise UserError(
                f"it claims {page.imagewidth} x {page.imagelength} pixels, more than {MAX_PIXELS:,}: remove it, or make it smaller."
            )
        if (
            page.dtype not in (np.dtype(bool), np.dtype(np.uint8)) or page.samplesperpixel > 4
        ):  # what Pillow cannot hold
            if "Orientation" in page.tags and page.tags["Orientation"].value != 1:
                raise UserError(
                    "it is a TIFF of more than 8 bits or 4 bands that is to be turned when shown: save it upright."
                )
            array = page.asarray()
            return (
                rearrange(array, "c h w -> h w c")
                if array.ndim == 3 and page.planarconfig.name == "SEPARATE"
                else array
            )
    if isinstance(file, io.BytesIO):
        file.seek(0)
    image = Image.open(file)
    image.load()
    return image


def _convert(image: Image.Image, mode: str, background: str) -> Image.Image:
    """To the mode, transparent parts on the background where the mode has no alpha."""
    if "A" not in mode and (image.has_transparency_data):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, background)
        page.alpha_composite(image)
        image = page
    return image.convert(mode)


def _prepare_array(
    array: np.ndarray, config: PreprocessingConfig, window: Window | None
) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if 0 in array.shape:
        raise UserError(f"it is an array of shape {array.shape}, without a pixel: remove it.")
    if array.ndim != 3 or (
        array.shape[-1] != config.channels and (array.shape[-1], config.channels) != (1, 3)
    ):
        raise UserError(
            f"it is an array of shape {array.shape}, but (H, W, {config.channels}) is due (image.channels): set the channels, or convert it."
        )
    of_bytes = array.dtype == np.uint8 and config.value_range == BYTES
    array = array if of_bytes else _scale(array, config)
    bands = np.stack(
        [
            np.array(_resize(Image.fromarray(band), config, window))
            for band in rearrange(array, "h w c -> c h w")
        ]
    )
    bands = bands if of_bytes else np.clip(bands, -1, 1)  # bicubic filters overshoot
    height, width = config.height_width
    page = np.full((config.channels, height, width), 0 if of_bytes else -1, bands.dtype)
    top, left = (height - bands.shape[1]) // 2, (width - bands.shape[2]) // 2
    page[:, top : top + bands.shape[1], left : left + bands.shape[2]] = (
        bands  # one grey band fills all channels
    )
    return page


def _scale(array: np.ndarray, config: PreprocessingConfig) -> np.ndarray:
    """Values to [-1, 1] by the declared range."""
    low, high = config.value_range
    if array.dtype.kind in "ui" and np.iinfo(array.dtype).max < high:
        raise UserError(
            f"it holds {array.dtype} values, which end before image.value_range {config.value_range}: convert it, or say which range it has."
        )
    if config.value_range == BYTES:
        raise UserError(
            f"it holds {array.dtype} values from {array.min()} to {array.max()}, not 8-bit pixels: say with --model.image.value-range LOW HIGH "
            f"which values are black and white (0 65535 for 16 bits)."
        )
    if not (np.isfinite(array).all() and low <= array.min() and array.max() <= high):
        raise UserError(
            f"it holds values from {array.min()} to {array.max()}, outside of image.value_range {config.value_range}: widen the range."
        )
    return ((array.astype(np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
