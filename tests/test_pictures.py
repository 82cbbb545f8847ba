"""A picture is read as a viewer shows it, or refused with a sentence; it starts no program."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageFont

from pipelines.pictures import sample_sheet
from tests.images import load
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import (
    difference,
    file_suffix,
    font_for,
    read_note,
    save_image,
    to_pixels,
)
from vqvae2.config import PreprocessingConfig
from vqvae2.data.augmentation import decode, no_change
from vqvae2.data.decoding import BadImage, read_cell, read_picture_file

SIZE = PreprocessingConfig(size=(16,))
PHOTO = np.kron(np.arange(0, 240, 20).reshape(4, 3), np.ones((8, 8))).astype(np.uint8)
DEEP = PHOTO.astype(np.uint16) * 256 + 7


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def lzw(byteorder: str) -> bytes:
    """A TIFF with one 16-bit band, as programs for maps and microscopes write it."""
    kind = "I;16" if byteorder == "<" else "I;16B"
    image = Image.frombytes(kind, (24, 32), DEEP.astype(f"{byteorder}u2").tobytes())
    return saved(image, "TIFF", compression="tiff_lzw")


def refused(cell: object, match: str, config: PreprocessingConfig = SIZE) -> None:
    with pytest.raises(BadImage, match=match):
        decode("photos", "x.png", cell, config, no_change)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_only_the_kinds_that_are_named_are_opened(tmp_path: Path) -> None:
    """PostScript, for which Pillow starts Ghostscript, under any name and from any source."""
    path = tmp_path / "x.png"
    path.write_bytes(POSTSCRIPT)
    with mock.patch("subprocess.Popen", side_effect=AssertionError("a program was started")):
        for cell in (path, POSTSCRIPT, {"bytes": POSTSCRIPT, "path": "x.tif"}):
            refused(cell, "cannot be read as an image")
        with pytest.raises(UserError, match="check the file"):
            read_picture_file(str(path))
    for kind in ("ICO", "TGA", "PCX", "EPS"):
        refused(saved(Image.new("RGB", (16, 16)), kind), "none of PNG, JPEG")


def test_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    for path in (tmp_path / "x.png", Path("/dev/zero"), tmp_path):
        refused(path, "a pipe or a device")
        with pytest.raises(UserError, match="a pipe or a device"):
            read_picture_file(str(path))
    with pytest.raises(UserError, match="holds no image"):  # a folder passes over it
        load(tmp_path)


def test_what_needs_another_package_names_it() -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    refused(heic, "HEIC photo, .* pip install pillow-heif, or convert it")
    with mock.patch("PIL.ImageFile.ImageFile.load", side_effect=OSError("decoder x not available")):
        refused(saved(Image.new("L", (9, 9)), "JPEG2000"), "pip install --upgrade pillow")
    with mock.patch("tifffile.TiffPage.asarray", side_effect=ValueError("requires imagecodecs")):
        refused(tiff(np.stack([DEEP] * 3, -1)), "pip install imagecodecs")
        refused(tiff(DEEP.astype(np.float32)), "pip install imagecodecs")


def test_tiff_holds_what_its_numbers_say() -> None:
    grey = PreprocessingConfig(size=(32, 24), channels=1, value_range=(0, 65535))
    expected = decode("", "", DEEP, grey, no_change)
    for content in (tiff(DEEP), tiff(DEEP, bigtiff=True), lzw("<"), lzw(">")):
        for cell in (content, {"bytes": content, "path": "x.png"}):
            assert decode("", "", cell, grey, no_change).equal(expected)
    refused(tiff(DEEP, photometric="miniswhite"), "MINISWHITE")
    refused(tiff(np.stack([DEEP] * 4, -1), photometric="separated"), "SEPARATED")


def test_what_lies_beside_the_pixels_may_be_large() -> None:
    large = zlib.compress(bytes(3 << 20))
    image = saved(Image.fromarray(PHOTO), "PNG")
    for kind, content in ((b"iCCP", b"p\0\0" + large), (b"zTXt", b"workflow\0\0" + large)):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        chunk = struct.pack(">I", len(content)) + kind + content + checksum
        assert np.array_equal(read_cell(image[:33] + chunk + image[33:]), PHOTO)


def test_more_bits_than_pillow_keeps_are_refused() -> None:
    content = saved(Image.new("RGB", (9, 9)), "JPEG2000")
    place = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[place] == 7
    refused(content[:place] + b"\x0f" + content[place + 1 :], "more than 8 bits")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF", "JPEG2000", "TIFF"])
def test_a_cut_picture_is_refused_and_never_half_grey(kind: str) -> None:
    content = saved(Image.fromarray(PHOTO), kind)
    whole = np.asarray(read_cell(content))
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        try:
            found = np.asarray(read_cell(content[: int(share * len(content))]))
        except Exception:
            continue
        assert np.array_equal(found, whole)


def test_values_that_are_no_numbers_are_refused() -> None:
    floats = PreprocessingConfig(size=(16,), channels=1, value_range=(0, 1))
    wrong = np.full((9, 9), 0.5, np.float32)
    wrong[3, 3] = np.nan
    npy = io.BytesIO()
    np.save(npy, wrong)
    for cell in (wrong, tiff(wrong), {"bytes": npy.getvalue(), "path": "x.npy"}, wrong + 1j):
        refused(cell, "no real numbers", floats)


def test_no_picture_vanishes_when_it_is_padded() -> None:
    padded = PreprocessingConfig(size=(16,), fit="pad")
    for size in ((1, 60_000), (60_000, 1)):
        refused(saved(Image.new("RGB", size), "PNG"), "too narrow", padded)
    refused(np.zeros((60_000, 1, 3), np.uint8), "too narrow", padded)


def test_a_picture_that_the_machine_cannot_read_now_is_not_broken(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    for number, kind in (
        (errno.EIO, UserError),
        (errno.EMFILE, UserError),
        (errno.EACCES, BadImage),
    ):
        error = OSError(number, os.strerror(number))
        with mock.patch("vqvae2.data.decoding.open", side_effect=error, create=True):
            with pytest.raises(UserError, match=r"x\.png") as caught:
                decode("photos", "x.png", tmp_path / "x.png", SIZE, no_change)
            assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("number", "classes"), [(64, 0), (20, 0), (7, 0), (1, 0), (64, 3), (40, 40)]
)
def test_a_sheet_has_whole_rows_of_at_most_eight_that_stand_out(number: int, classes: int) -> None:
    """Also of white pictures: the page is grey around each of them."""
    names = [f"class {i % classes}" for i in range(number)] if classes else []
    page = np.asarray(
        sample_sheet([Image.new("L", (48, 48), "white")] * number, names).convert("L")
    )
    white = page == 255
    rows, columns = white.any(axis=1), white.any(axis=0)
    height, width = (int((np.diff(edge.astype(int)) == 1).sum()) for edge in (rows, columns))
    assert white[np.ix_(rows, columns)].all()
    assert 1 <= width <= 8
    shown = height * width
    assert shown > 0.85 * number or (classes > 20 and height == 20)
    assert classes or height <= 2 * width


def test_names_are_written_in_letters_that_the_font_has() -> None:
    """Pillow's own has no umlaut; a machine without another font shows boxes."""
    own, other = font_for(["coat"], 14), font_for(["M\u00e4ntel"], 14)
    assert own.getname() == ImageFont.load_default(14).getname()
    with mock.patch("vqvae2.common.pictures.FONTS", ("none.ttf",)):
        assert font_for(["M\u00e4ntel"], 14).getname() == own.getname()
    if other.getname() != own.getname():
        boxes = other.getmask("\uffff"), other.getmask("\ufffe")
        assert bytes(other.getmask("\u00e4")) not in map(bytes, boxes)


@pytest.mark.parametrize(
    ("channels", "highest"), [(1, 255), (4, 255), (5, 255), (1, 65535), (3, 65535)]
)
def test_a_note_and_every_value_come_back_from_a_saved_image(
    channels: int, highest: int, tmp_path: Path
) -> None:
    image, scale = 2 * torch.rand(channels, 8, 12) - 1, (0, highest)
    path = tmp_path / f"image{file_suffix(channels, scale)}"
    for note in (None, '{"seed": 3}'):
        save_image(image, path, scale, note)
        picture = read_picture_file(str(path))
        assert note is None or read_note(picture, path) == note
        held = np.array(picture)
        assert not difference(held, to_pixels(image, scale), scale)
    held[2, 3] ^= 32
    held[5, 7] ^= 128
    shown = difference(held, to_pixels(image, scale), scale)
    assert shown == f"2 of 96 pixels differ, by at most 128 of {highest}"
