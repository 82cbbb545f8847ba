"""Pictures for people: tensors to PIL images, and sheets of them with names beside the rows."""

from collections.abc import Sequence
from pathlib import Path

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


def sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = (), *, gap: int = 2) -> Image.Image:
    """Rows of equally sized images on one white sheet, each row with its name on the left. Small images are enlarged to at least 48 pixels."""
    width, height = rows[0][0].size
    zoom = max(1, -(-48 // max(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(name)) + 12 for name in names), default=0)
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if names:
            draw.text((margin - 8, top + height / 2), names[i], fill="black", font=font, anchor="rm")
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            mask = enlarged.getchannel("A") if "A" in enlarged.getbands() else None
            page.paste(enlarged.convert("RGB"), (margin + gap + j * (width + gap), top), mask)
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as aside:
        picture.save(aside, format="PNG")
