"""Pictures for people: tensors to PIL images, and sheets of them with names beside the rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae2.common.files import whole_file

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images `(B, C, H, W)` in [-1, 1] as 8-bit PIL images: grey, grey + alpha, RGB or RGBA by their channels.

    With more than four channels the first three are shown.
    """
    pixels = (images.detach().float().clamp(-1, 1).add(1) * 127.5).round().byte().cpu()
    if pixels.shape[1] not in MODES:
        pixels = pixels[:, :3]
    arrays = rearrange(pixels, "b c h w -> b h w c").numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def file_suffix(channels: int, value_range: tuple[float, float]) -> str:
    """PNG for 8-bit images of 1 to 4 channels, TIFF for all others: as the files that the model was trained on."""
    return ".png" if channels in MODES and tuple(value_range) == (0, 255) else ".tif"


def save_image(image: Tensor, path: Path, value_range: tuple[float, float]) -> None:
    """Write one image `(C, H, W)` in [-1, 1], whole or not at all: 8-bit PNG, or TIFF with the values of the range, by the path's suffix.

    TIFF holds uint8 or uint16 where the range is that of these types, else float32.
    """
    if path.suffix == ".png":
        save_picture(to_pil(image[None])[0], path)
        return
    import tifffile

    low, high = value_range
    values = (image.detach().double().clamp(-1, 1).add(1) / 2 * (high - low) + low).cpu().numpy()
    kind = (
        {255: np.uint8, 65535: np.uint16}.get(int(high))
        if low == 0 and high in (255, 65535)
        else None
    )
    values = values.round().astype(kind) if kind is not None else values.astype(np.float32)
    with whole_file(path) as aside:
        tifffile.imwrite(
            aside,
            rearrange(values, "c h w -> h w c").squeeze(),
            photometric="minisblack",
            planarconfig="contig" if len(values) > 1 else None,
        )


def sheet(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = (), *, gap: int = 2
) -> Image.Image:
    """Rows of equally sized images on one white sheet, each row with its name on the left. Small images are enlarged to at least 48 pixels."""
    width, height = rows[0][0].size
    zoom = max(1, -(-48 // max(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(name)) + 12 for name in names), default=0)
    columns = max(len(row) for row in rows)
    page = Image.new(
        "RGB", (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if names:
            draw.text(
                (margin - 8, top + height / 2), names[i], fill="black", font=font, anchor="rm"
            )
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            mask = enlarged.getchannel("A") if "A" in enlarged.getbands() else None
            page.paste(enlarged.convert("RGB"), (margin + gap + j * (width + gap), top), mask)
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as aside:
        picture.save(aside, format="PNG")
