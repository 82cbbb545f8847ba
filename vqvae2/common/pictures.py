"""Pictures for people: tensors to PIL images, and sheets of them with names beside the rows."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from vqvae2.common.files import whole_file

PAPER = "#b4b4b4"  # images with white edges do not melt into it
FONTS = "DejaVuSans.ttf", "Arial.ttf", "arial.ttf"  # with the letters of many languages
GAP = 4  # pixels between the images of a sheet
NOTE = "vqvae2"  # the key of a text in a PNG that we wrote
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
INTEGERS: dict[tuple[float, float], type] = {(0, 255): np.uint8, (0, 65535): np.uint16}


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()


def as_rgb(images: Tensor) -> Tensor:
    """Three channels of `(B, C, H, W)`: grey (or grey + alpha) three times, else the first 3."""
    return images[:, :1].expand(-1, 3, -1, -1) if images.shape[1] < 3 else images[:, :3]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images `(B, C, H, W)` in [-1, 1] as 8-bit PIL images.

    The channels make them grey, grey + alpha, RGB or RGBA; of more than four, three are shown.
    """
    pixels = to_bytes(images).cpu()
    if pixels.shape[1] not in MODES:
        pixels = pixels[:, :3]
    arrays = rearrange(pixels, "b c h w -> b h w c").numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def file_suffix(channels: int, value_range: tuple[float, float]) -> str:
    """PNG for 8-bit images of 1 to 4 channels, TIFF for all others."""
    return ".png" if channels in MODES and tuple(value_range) == (0, 255) else ".tif"


def to_pixels(image: Tensor, value_range: tuple[float, float]) -> np.ndarray:
    """One image `(C, H, W)` in [-1, 1] as its file holds it, `(H, W)` or `(H, W, C)`: uint8 for the
    range (0, 255), uint16 for (0, 65535), else float32."""
    low, high = value_range
    if file_suffix(len(image), value_range) == ".png":
        return np.asarray(to_pil(image[None])[0])
    values = (image.detach().double().clamp(-1, 1).add(1) / 2 * (high - low) + low).cpu().numpy()
    integer = INTEGERS.get((low, high))
    values = values.astype(np.float32) if integer is None else values.round().astype(integer)
    return rearrange(values, "c h w -> h w c").squeeze()


def difference(pixels: np.ndarray, others: np.ndarray, value_range: tuple[float, float]) -> str:
    """How two images, given as `to_pixels` makes them, differ, in a few words; or nothing."""
    kinds = [f"{array.shape} of {array.dtype}" for array in (pixels, others)]
    if kinds[0] != kinds[1]:
        return f"it holds {kinds[0]} instead of {kinds[1]}"
    unequal = (pixels != others).reshape(*pixels.shape[:2], -1).any(axis=2)
    if not unequal.any():
        return ""
    most = np.abs(pixels.astype(np.float64) - others).max()
    how_many = f"{unequal.sum():,} of {unequal.size:,} pixels differ"
    return f"{how_many}, by at most {most:.6g} of {value_range[1] - value_range[0]:g}"


def save_image(
    image: Tensor, path: Path, value_range: tuple[float, float], note: str | None = None
) -> None:
    """Write one image `(C, H, W)` in [-1, 1], whole or not at all, as `file_suffix` says; a `note`
    (ASCII) lies beside the pixels, where `read_note` finds it."""
    pixels = to_pixels(image, value_range)
    if path.suffix == ".png":
        save_picture(Image.fromarray(pixels), path, note)
        return
    import tifffile

    options = {"planarconfig": "contig" if pixels.ndim == 3 else None, "description": note}
    with whole_file(path) as aside:
        tifffile.imwrite(aside, pixels, photometric="minisblack", **options)


def num_columns(number: int, height: int = 1, most: int = 8) -> int:
    """In how many columns, at most `most`, a sheet of `number` pictures, each `height` rows high,
    is about square and, if it can be, without a gap in its last row."""
    most = min(most, number)
    least = min(most, math.isqrt(number * height - 1) + 1)
    near = range(least - least // 4, min(most, 2 * least) + 1)
    return min(near, key=lambda columns: number % columns)


def in_rows(images: Sequence[Image.Image], columns: int) -> list[Sequence[Image.Image]]:
    """A list of images cut into rows."""
    return [images[first : first + columns] for first in range(0, len(images), columns)]


def font_for(texts: Iterable[str], size: int) -> Any:
    """A font for texts: Pillow's own, which is the same on all machines; or, for letters that it
    lacks, one that the machine has, if it does."""
    for name in FONTS if not all(text.isascii() for text in texts) else ():
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = ()) -> Image.Image:
    """Rows of equally sized images on one grey page, each row with its name on the left.

    Small images are enlarged to at least 48 pixels.
    """
    # A page with a margin for the names.
    width, height = rows[0][0].size
    zoom = max(1, -(-48 // max(width, height)))
    width, height = width * zoom, height * zoom
    font = font_for(names, 14)
    margin = max((int(font.getlength(name)) + 12 for name in names), default=0)
    columns = max(len(row) for row in rows)
    page_size = (margin + columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP)
    page = Image.new("RGB", page_size, PAPER)
    draw = ImageDraw.Draw(page)

    # The rows; what is transparent shows the page.
    for i, row in enumerate(rows):
        top = GAP + i * (height + GAP)
        if names:
            middle = (margin - 8, top + height / 2)
            draw.text(middle, names[i], fill="black", font=font, anchor="rm")
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            mask = enlarged.getchannel("A") if "A" in enlarged.getbands() else None
            page.paste(enlarged.convert("RGB"), (margin + GAP + j * (width + GAP), top), mask)
    return page


def save_picture(picture: Image.Image, path: Path, note: str | None = None) -> None:
    """Write a picture as PNG, whole or not at all; for the note see `save_image`."""
    texts = PngImagePlugin.PngInfo()
    if note is not None:
        texts.add_text(NOTE, note)
    with whole_file(path) as aside:
        picture.save(aside, format="PNG", pnginfo=texts)


def read_note(picture: Image.Image | np.ndarray, path: Path) -> str | None:
    """The note that `save_image` wrote into a file, of which this is the decoded picture."""
    if isinstance(picture, Image.Image):
        return getattr(picture, "text", {}).get(NOTE)
    if path.suffix != ".tif":
        return None
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[0].description
