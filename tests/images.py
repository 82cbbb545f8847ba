"""Images for tests of data: broken ones, tar shards, and short ways to open them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from tests.conftest import command
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data import ImageSplits, load_images, open_source
from vqvae2.data.augmentation import no_change
from vqvae2.data.stream import ImageStream, StreamedImages
from vqvae2.data.work_parts import Item, find_parts

GREY = PreprocessingConfig(size=(28,), channels=1, validation_fraction=0)
UNCHANGED = {"train": [no_change], "validation": [no_change]}


def load(path: Path | str, config: PreprocessingConfig = GREY, **options: object) -> ImageSplits:
    data = ImagesConfig(path=str(path), **options)  # type: ignore[arg-type]
    return load_images(data, config)


def rows_of(splits: ImageSplits) -> tuple[torch.Tensor, list[str]]:
    """All training pixels, and the class name of each."""
    batch = splits.train.__getitems__(range(len(splits.train)))
    return batch["images"], [splits.class_names[label] for label in batch["labels"]]


def items_of(data: ImagesConfig, config: PreprocessingConfig = GREY) -> list[Item]:
    """What preparation and extraction read."""
    return [item for part in find_parts(data, config, 10).parts for item in part.items()]


def ids_of(data: ImagesConfig, split: str) -> list[str]:
    return [item.id for item in items_of(data) if item.split == split]


def shards_at(path: Path | str) -> ImageStream:
    source = open_source(ImagesConfig(path=str(path), streaming=True), GREY).train
    assert isinstance(source, ImageStream)
    return source


def stream(
    path: Path | str, batch_size: int = 8, config: PreprocessingConfig = GREY, **options: object
) -> StreamedImages:
    """Training batches; with options of the data, or of the place among processes."""
    names = ("num_processes", "process_index", "on_skipped")
    place = {name: options.pop(name) for name in names if name in options}
    place.setdefault("on_skipped", lambda name, reason: None)
    data = DataConfig(path=str(path), streaming=True, **options)  # type: ignore[arg-type]
    source, share = open_source(data, config).train, config.validation_fraction
    return StreamedImages(source, data, config, batch_size, share, **place)  # type: ignore[arg-type]


def shades(batches: Iterator[dict[str, torch.Tensor]], number: int) -> list[int]:
    """Which rows of `numbered_tars` these batches hold."""
    return [int(image[0, 0, 0]) for batch in islice(batches, number) for image in batch["images"]]


def shell(line: str, *more: object, code: int = 0) -> None:
    """Run a line of the command line (no word of it holds a space), and demand its exit code."""
    command(*line.split(), *more, code=code)


def encoded(shade: int = 100, size: int = 28) -> bytes:
    """A grey picture as a PNG file."""
    file = io.BytesIO()
    Image.new("L", (size, size), shade).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar of files; a member given as text is a hard link to that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_members(path: Path, names: list[str]) -> Path:
    """A tar of pictures and labels of these names."""
    return write_tar(path, {name: b"3" if ".cls" in name else encoded() for name in names})


def numbered_tars(folder: Path, shards: int, rows: int, *, labelled: bool = True) -> Path:
    """Row i of shard s is a picture of one shade, with the class s * rows + i."""
    for shard in range(shards):
        members: dict[str, bytes | str] = {}
        for i in range(rows):
            number = shard * rows + i
            members[f"{i:04d}.png"] = encoded(number % 256)
            if labelled:
                members[f"{i:04d}.cls"] = str(number).encode()
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def png16(rows: list[bytes], width: int, height: int) -> bytes:
    """An RGB PNG with 16 bits per channel."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"".join(rows)), b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def spoil(folder: Path) -> set[str]:
    """Plant broken files among pictures in class folders; returns their names."""
    whole = next((folder / "bag").glob("*.png")).read_bytes()
    broken = {
        "bag/cut.png": whole[:100],
        "bag/text.jpg": b"no picture",
        "coat/empty.png": b"",
        "coat/bomb.png": png16([b""], 60_000, 60_000),
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return set(broken)
