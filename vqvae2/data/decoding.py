"""From a file, bytes or an array to a decoded picture that has lost nothing on the way."""

import io
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from einops import rearrange
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError

Picture = Image.Image | np.ndarray
"""What Pillow holds without loss, or an array (H, W) or (H, W, C) of anything else: more bits,
floats, more bands."""

PICTURE_SUFFIXES = {
    *(".png", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy"),
    *(".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".heic", ".heif", ".jp2"),
}
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
"""Pillow's names of these: it opens no others, since it has some that start programs."""

MAX_PIXELS = 178_956_970  # twice Pillow's warning: more is an attack or a mistake
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # colour profiles and texts may take more than 1 MiB
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 27


class BadImage(UserError):
    """An image that cannot be read or prepared: its `name` and the `reason`. (It can be made of its
    sentence alone, as those do that pass it on from another process.)"""

    def __init__(self, sentence: str, name: str = "", reason: str = "") -> None:
        self.name, self.reason = name, reason
        *_, last = sentence.strip().splitlines() or [""]  # of the trace of a worker
        super().__init__(last.rpartition("BadImage: ")[2])

    def __reduce__(self) -> Any:
        return BadImage, (str(self), self.name, self.reason)

    def together_with(self, others: Sequence[Self]) -> "BadImage":
        """The same, whose sentence names other ones, too."""
        if not others:
            return self
        names, advice = ", ".join(other.name for other in others), "--data.on-error skip"
        more = "" if advice in str(self) else f" ({advice} leaves out what cannot be read)"
        sentence = f"{str(self).rstrip('.')}; besides, {names} cannot be used{more}"
        return BadImage(sentence, self.name, self.reason)

    @classmethod
    def of(cls, source: str, name: str, error: Exception) -> Self:
        """What an error means for an image of a source."""
        sentence = reason = first_line(error)
        if not isinstance(error, UserError):
            what_to_do = "repair or remove it, or add --data.on-error skip"
            if "not available" in reason:  # a Pillow that was built without a library
                what_to_do = "pip install --upgrade pillow, or convert it"
            sentence = f"it cannot be read as an image: {reason} ({what_to_do})"
        return cls(f"{source}: {name}: {sentence}", name, reason)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind; without addresses, which vary."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(" at 0x[0-9a-f]+", "", line)


@contextmanager
def readable(name: str, how: str, what_to_do: str = "check the file") -> Iterator[None]:
    """Turns the errors of libraries, which are of many kinds, into one sentence.

    Raises:
        UserError: saying that `name` cannot be read (or whatever `how` says), and why.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)
        raise UserError(f"{name} cannot be {how} ({reason}): {what_to_do}.") from error


def read_picture_file(path: str) -> Picture:
    """One picture file.

    Raises:
        UserError: the file is missing, or is no picture.
    """
    try:
        return read_cell(Path(path).expanduser())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many kinds
        what = f"{path} cannot be read as a picture ({first_line(error)})"
        raise UserError(f"{what}: check the file.") from None


def read_cell(cell: Any) -> Picture:
    """A picture as a table holds it: a path, encoded bytes, {"bytes", "path"} as `datasets` stores
    them, an array, a Pillow image; or an error, to be raised. Raises UserError: it is none of
    these, or cannot be held without loss. Exception: of many kinds, for what is no picture."""
    if isinstance(cell, Exception):
        raise cell
    if isinstance(cell, np.ndarray):
        return np.array(cell)
    if isinstance(cell, Image.Image):
        return cell
    path = ""
    if isinstance(cell, dict):
        path = cell.get("path") or ""
        if cell.get("bytes") is None and path:
            what = f"it names the file {shown(path)}, but only files below a local table are read"
            raise UserError(f"{what}: store pictures in the table, or give a list of files (.csv).")
        cell = cell.get("bytes")
    if isinstance(cell, Path):
        if not stat.S_ISREG(cell.stat().st_mode):  # opening a pipe or a device may never end
            raise UserError("it is a folder, a pipe or a device: give a picture's file.")
        with open(cell, "rb") as file:
            return _decode(file, cell.suffix.lower())
    if not isinstance(cell, bytes):
        what = f"it is a {type(cell).__name__}, but expected an encoded picture"
        raise UserError(f"{what}: name the column of pictures with --data.image-column.")
    return _decode(io.BytesIO(cell), Path(path).suffix.lower())


def mark_cell(cell: Any) -> int:
    """Something cheap that tells a picture from another of the same name: a length, or checksum."""
    if isinstance(cell, np.ndarray | Image.Image):
        return zlib.crc32(np.ascontiguousarray(cell).tobytes())
    if isinstance(cell, Path):
        return cell.stat().st_size if cell.exists() else -1
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(content) if isinstance(content, bytes) else -1


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture as it stands upright."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return picture.size[::-1] if is_turned else picture.size


def _decode(file: BinaryIO, suffix: str) -> Picture:
    # TIFF and NumPy files have readers of their own; Pillow cuts their values to 8 bits.
    if suffix == ".npy":
        return np.load(file, allow_pickle=False)
    head = file.read(4)
    if suffix in (".tif", ".tiff") or head in TIFF_HEADS:
        return _read_tiff(file)

    # Refuse what would decode to something else than a viewer shows.
    image = _opened(file)
    _refuse_giant(image.width, image.height)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photo with its preview
        raise UserError(f"it has {frames} frames: save the one you want, or each as a file.")
    if image.mode in ("RGB", "RGBA", "LA") and _has_more_bits(image, file):
        what = f"it is a {image.format} with more than 8 bits in several channels"
        raise UserError(f"{what}, of which Pillow keeps 8: save it as TIFF or .npy.")
    image.load()
    return image


@cache
def _formats() -> list[str]:
    """What Pillow may open here; HEIC photos need a package that is not always there."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
        return [*FORMATS, "HEIF"]
    return list(FORMATS)


def _opened(file: BinaryIO) -> Image.Image:
    """Through Pillow, not decoded yet. Raises UserError, UnidentifiedImageError: it cannot be."""
    formats = _formats()
    with suppress(UnidentifiedImageError):
        return Image.open(file, formats=formats)
    file.seek(0)
    brand = file.read(12)[4:]
    if "HEIF" not in formats and re.match(b"ftyp(hei|hev|mif1|msf1)", brand):
        what = "it is a HEIC photo, which Pillow cannot read: pip install pillow-heif"
        raise UserError(f"{what}, or convert it.")
    raise UnidentifiedImageError(f"it is broken, or none of {', '.join(formats)}")


def _has_more_bits(image: Any, file: BinaryIO) -> bool:
    """Whether the channels of a file have more bits than the 8 that Pillow keeps."""
    if image.format in ("PNG", "PPM"):
        layout = image.tile[0][3]  # as the decoder gets it: RGB;16B, or (RGB, largest value)
        return ";16" in layout if isinstance(layout, str) else layout[-1] > 255
    if image.format != "JPEG2000":
        return False
    file.seek(0)
    _, _, sizes = file.read().partition(b"\xff\x4f\xff\x51")  # the segment SIZ of ISO 15444-1
    return sizes[38] & 0x7F > 7


def _refuse_giant(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        what = f"it claims {width} x {height} pixels, more than {MAX_PIXELS:,}"
        raise UserError(f"{what}: remove it, or make it smaller.")


def _read_tiff(file: BinaryIO) -> Picture:
    """Through Pillow where it holds the file as it is (8 bits, known colours), else as an array."""
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        if page.is_reduced or page.is_mask:
            raise UserError("its first TIFF page is a preview or a mask: put the picture first.")
        number = sum(not (other.is_reduced or other.is_mask) for other in tiff.pages)
        if number > 1:
            what_to_do = "save bands as samples of one page (planarconfig), or each page as a file"
            raise UserError(f"it is a TIFF of {number} pages: {what_to_do}.")
        _refuse_giant(page.imagewidth, page.imagelength)
        eight_bits = page.dtype in (np.dtype(bool), np.dtype(np.uint8))
        is_webp = page.compression == 50001  # which few builds of Pillow read
        by_pillow = page.compression in TiffImagePlugin.COMPRESSION_INFO and not is_webp
        if not (eight_bits and page.samplesperpixel <= 4 and by_pillow):
            array = _tiff_array(page, by_pillow)
            if array is not None:
                return array
    file.seek(0)
    image = _opened(file)
    image.load()
    return image


def _tiff_array(page: Any, by_pillow: bool) -> np.ndarray | None:
    """The samples of a TIFF page; None where only Pillow, if it knows the compression, can unpack
    them. Raises UserError: they mean something else than light, or need a package."""
    if "Orientation" in page.tags and page.tags["Orientation"].value != 1:
        raise UserError("it is a TIFF that is stored rotated: save it upright.")
    if page.photometric is not None and page.photometric.name not in ("MINISBLACK", "RGB"):
        what = f"it is a TIFF of {page.dtype} samples in the colours {page.photometric.name}"
        raise UserError(f"{what}: save it as grey (0 is black) or RGB.")
    try:
        array = page.asarray()
    except (ValueError, NotImplementedError, ImportError) as error:
        if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
            raise
        if by_pillow and (page.samplesperpixel, page.bitspersample, page.dtype) == (1, 16, "u2"):
            return None
        what = f"it is a TIFF that the package imagecodecs unpacks ({first_line(error)})"
        raise UserError(f"{what}: pip install imagecodecs, or save it uncompressed.") from None
    separate = array.ndim == 3 and page.planarconfig.name == "SEPARATE"
    return rearrange(array, "c h w -> h w c") if separate else array
