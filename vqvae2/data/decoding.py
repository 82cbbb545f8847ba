"""From a picture file, or its bytes, to a decoded picture that has lost nothing on the way."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from vqvae2.common.errors import UserError

Picture = Image.Image | np.ndarray
"""What Pillow holds without loss, or an array (H, W) or (H, W, C) of anything else: more bits,
floats, more bands."""

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".heic", ".jp2"}
PICTURE_SUFFIXES = {
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".npy",
    *PHOTO_SUFFIXES,
}
MAX_PIXELS = (
    178_956_970  # twice Pillow's warning: a file that claims more is an attack or a mistake
)


def read_picture(file: Path | str | bytes, suffix: str = "") -> Picture:
    """A picture file, or its bytes (then the suffix tells TIFF and NumPy files from others).

    Raises:
        UserError: the picture cannot be held without loss.
        Exception: of many kinds, for a file that is no picture (see `read_picture_file`).
    """
    # TIFF and NumPy files have readers of their own; Pillow cuts their values to 8 bits.
    if isinstance(file, bytes):
        suffix = ".tif" if file[:4] in (b"II*\0", b"MM\0*") else suffix.lower()
        opened: io.BytesIO | Path | str = io.BytesIO(file)
    else:
        suffix, opened = suffix.lower() or Path(file).suffix.lower(), file
    if suffix == ".npy":
        return np.load(opened, allow_pickle=False)
    if suffix in (".tif", ".tiff"):
        return _read_tiff(opened)

    # Refuse what would decode to something else than a viewer shows.
    image = Image.open(opened)
    _refuse_giant(image.width, image.height)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photo with its preview
        raise UserError(f"it has {frames} frames: save the one you want, or each as a file.")
    image.load()
    if _bits_per_channel(image, opened) > 8 and image.mode in ("RGB", "RGBA", "LA"):
        raise UserError(
            f"it is a {image.format} with 16 bits in several channels, of which Pillow keeps 8: "
            f"save it as TIFF or .npy."
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
    except Exception as error:  # decoders raise many kinds
        raise UserError(
            f"{path} cannot be read as a picture ({first_line(error)}): check the file."
        ) from None


def read_cell(cell: Any) -> Picture:
    """An encoded picture in a table: its bytes, or {"bytes", "path"} as `datasets` stores it.

    Raises:
        UserError: it is neither.
        Exception: of many kinds, for bytes that are no picture.
    """
    if isinstance(cell, dict):
        path = cell.get("path") or ""
        if cell.get("bytes") is None and path:
            return read_picture(path)
        cell, suffix = cell.get("bytes"), Path(path).suffix
    else:
        suffix = ""
    if not isinstance(cell, bytes):
        raise UserError(
            f"it is a {type(cell).__name__}, but expected an encoded picture: "
            f"name the column of pictures with --data.image-column."
        )
    return read_picture(cell, suffix)


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture as it stands upright."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    return ImageOps.exif_transpose(picture).size


class BadImage(UserError):
    """An image that cannot be read or prepared: its `name` and the `reason`."""

    def __init__(self, source: str, name: str, error: Exception) -> None:
        self.name, self.reason = name, first_line(error)
        if isinstance(error, UserError):
            super().__init__(f"{source}: {name}: {self.reason}")
        else:
            super().__init__(
                f"{source}: {name}: it cannot be read as an image: {self.reason} "
                f"(repair or remove it, or add --data.on-error skip)"
            )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind; without addresses, which vary."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(" at 0x[0-9a-f]+", "", line)


def _refuse_giant(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"it claims {width} x {height} pixels, more than {MAX_PIXELS:,}: "
            f"remove it, or make it smaller."
        )


def _bits_per_channel(image: Image.Image, file: io.BytesIO | Path | str) -> int:
    """What a PNG's or PPM's header says; 8 for all other formats."""
    if image.format not in ("PNG", "PPM"):
        return 8
    if isinstance(file, io.BytesIO):
        header = file.getvalue()[:1024]
    else:
        with open(file, "rb") as opened:
            header = opened.read(1024)
    if image.format == "PNG":
        return header[24]  # PNG specification, 11.2.1
    words = b" ".join(line.split(b"#")[0] for line in header.split(b"\n")).split()
    return int(words[3]).bit_length()  # format, width, height, largest value


def _read_tiff(file: io.BytesIO | Path | str) -> Picture:
    """Through Pillow where it holds the file as it is (8 bits, known colours), else as an array."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        if page.is_reduced or page.is_mask:
            raise UserError(
                "it is a TIFF whose first page is a preview or a mask: put the picture first."
            )
        number = sum(not (other.is_reduced or other.is_mask) for other in tiff.pages)
        if number > 1:
            raise UserError(
                f"it is a TIFF of {number} pages: save its bands as samples of one page "
                f"(planarconfig), or each page as a file."
            )
        _refuse_giant(page.imagewidth, page.imagelength)
        eight_bits = page.dtype in (np.dtype(bool), np.dtype(np.uint8))
        if not eight_bits or page.samplesperpixel > 4:
            if "Orientation" in page.tags and page.tags["Orientation"].value != 1:
                raise UserError(
                    "it is a TIFF of more than 8 bits or 4 bands that is stored rotated: "
                    "save it upright."
                )
            array = page.asarray()
            separate = array.ndim == 3 and page.planarconfig.name == "SEPARATE"
            return rearrange(array, "c h w -> h w c") if separate else array
    if isinstance(file, io.BytesIO):
        file.seek(0)
    image = Image.open(file)
    image.load()
    return image
