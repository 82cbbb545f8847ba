"""Pictures for people: tensors to PIL images, and sheets of them with names beside the rows."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae2.common.files import whole_file

PAPER = "#b4b4b4"  # images with white edges do not melt into it
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
INTEGERS: dict[tuple[float, float], type] = {(0, 255): np.uint8, (0, 65535): np.uint16}


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images `(B, C, H, W)` in [-1, 1] as 8-bit PIL images.

    The channels make them grey, grey + alpha, RGB or RGBA; of more than four, three are shown.
    """
    pixels = (images.detach().float().clamp(-1, 1).add(1) * 127.5).round().byte().cpu()
    if pixels.shape[1] not in MODES:
        pixels = pixels[:, :3]
    arrays = rearrange(pixels, "b c h w -> b h w c").numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def file_suffix(channels: int, value_range: tuple[float, float]) -> str:
    """PNG for 8-bit images of 1 to 4 channels, TIFF for all others."""
    return ".png" if channels in MODES and tuple(value_range) == (0, 255) else ".tif"


def save_image(image: Tensor, path: Path, value_range: tuple[float, float]) -> None:
    """Write one image `(C, H, W)` in [-1, 1], whole or not at all, in the format of the suffix.

    PNG holds 8 bits. TIFF holds the values of the range: uint8 for (0, 255), uint16 for
    (0, 65535), else float32.
    """
    if path.suffix == ".png":
        save_picture(to_pil(image[None])[0], path)
        return
    import tifffile

    low, high = value_range
    values = (image.detach().double().clamp(-1, 1).add(1) / 2 * (high - low) + low).cpu().numpy()
    integer = INTEGERS.get((low, high))
    values = values.astype(np.float32) if integer is None else values.round().astype(integer)
    pixels = rearrange(values, "c h w -> h w c").squeeze()
    layout = "contig" if len(values) > 1 else None
    with whole_file(path) as aside:
        tifffile.imwrite(aside, pixels, photometric="minisblack", planarconfig=layout)


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


def sheet(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = (), *, gap: int = 4
) -> Image.Image:
    """Rows of equally sized images on one grey page, each row with its name on the left.

    Small images are enlarged to at least 48 pixels.
    """
    # A page with a margin for the names.
    width, height = rows[0][0].size
    zoom = max(1, -(-48 // max(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(name)) + 12 for name in names), default=0)
    columns = max(len(row) for row in rows)
    page_size = (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap)
    page = Image.new("RGB", page_size, PAPER)
    draw = ImageDraw.Draw(page)

    # The rows; what is transparent shows the page.
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if names:
            middle = (margin - 8, top + height / 2)
            draw.text(middle, names[i], fill="black", font=font, anchor="rm")
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            mask = enlarged.getchannel("A") if "A" in enlarged.getbands() else None
            page.paste(enlarged.convert("RGB"), (margin + gap + j * (width + gap), top), mask)
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as aside:
        picture.save(aside, format="PNG")
