"""Images from folders, Parquet files and the Hub, prepared as the model's configuration says, split into training and held out."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import MODES
from vqvae2.config import ImagesConfig, PreprocessingConfig

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
HELD_OUT_NAMES = ("validation", "val", "valid", "test")
CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size


def to_images(pixels: Tensor) -> Tensor:
    """8-bit pixels `(B, C, H, W)` to images in [-1, 1]; floating images pass as they are."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def prepare(image: Image.Image, config: PreprocessingConfig) -> np.ndarray:
    """One picture as 8-bit pixels `(C, H, W)`: upright, in the channels and the size of the configuration.

    Raises:
        UserError: the picture has more than 8 bits per channel, or no picture file can have the configured channels.
    """
    if config.channels not in MODES:
        raise UserError(f"image.channels is {config.channels}, but picture files have 1 to 4: set it to one of them.")
    if image.mode.startswith(("I", "F")):
        raise UserError(f"the picture has mode {image.mode} (more than 8 bits per channel), which would be cut off: convert it to 8 bits first.")
    height, width = config.height_width
    image = _convert(ImageOps.exif_transpose(image), MODES[config.channels], config.background)
    if config.fit == "crop":
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    elif config.fit == "stretch":
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    else:
        if image.width > width or image.height > height:
            image = ImageOps.contain(image, (width, height), method=Image.Resampling.BICUBIC)
        page = Image.new("RGBA", (width, height), config.background).convert(image.mode)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    return rearrange(np.array(image).reshape(height, width, config.channels), "h w c -> c h w")


def load_picture(path: str, config: PreprocessingConfig) -> Tensor:
    """One picture file as 8-bit pixels `(1, C, H, W)`.

    Raises:
        UserError: the file is missing, is no picture, or cannot be prepared.
    """
    return torch.from_numpy(prepare(_read_picture(path), config))[None]


def picture_size(path: str) -> tuple[int, int]:
    """Width and height of a picture file as it stands upright.

    Raises:
        UserError: the file is missing, or is no picture.
    """
    return ImageOps.exif_transpose(_read_picture(path)).size


def _read_picture(path: str) -> Image.Image:
    try:
        image = Image.open(Path(path).expanduser())
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture ({str(error).splitlines()[0]}): check the path and the file.") from None
    return image


def _convert(image: Image.Image, mode: str, background: str) -> Image.Image:
    """To the mode, transparent parts on the background where the mode has no alpha."""
    if "A" not in mode and (image.has_transparency_data):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, background)
        page.alpha_composite(image)
        image = page
    return image.convert(mode)


@dataclass(frozen=True)
class ImageSource:
    """Named pictures, each with a label or none."""

    name: str
    ids: Sequence[str]
    """A name for each picture, relative to the source's root: it decides the split and goes into the code dataset."""
    open: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] = ()


class ImageDataset(Dataset):
    """Pictures of a source as batches {"images": uint8 (B, C, H, W), "labels": (B,) int64 if there are labels}.

    Decoded pictures are kept in memory where all of them fit into `CACHE_BYTES`.

    Args:
        shared: keep them where processes of a loader see them too.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], config: PreprocessingConfig, *, shared: bool = False) -> None:
        self.source, self.indices, self.config = source, indices, config
        shape = (len(indices), config.channels, *config.height_width)
        fits = np.prod(shape, dtype=np.int64) <= CACHE_BYTES
        self.cache = torch.empty(shape, dtype=torch.uint8) if fits and len(indices) else None
        self.cached = torch.zeros(len(indices), dtype=torch.bool)
        if shared:  # with the processes of a loader
            self.cached.share_memory_()
            if self.cache is not None:
                self.cache.share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        """The pictures' names, in order."""
        return [self.source.ids[i] for i in self.indices]

    def pixels(self, index: int) -> Tensor:
        """One picture, `(C, H, W)` uint8.

        Raises:
            UserError: naming the picture and what is wrong with it.
        """
        if self.cache is not None and self.cached[index]:
            return self.cache[index]
        name = self.source.ids[self.indices[index]]
        try:
            with self.source.open(self.indices[index]) as image:
                pixels = torch.from_numpy(prepare(image, self.config))
        except UserError as error:
            raise UserError(f"{self.source.name}: {name}: {error}") from None
        except Exception as error:  # Pillow raises many kinds for a file that is not what it seems
            raise UserError(f"{self.source.name}: {name} cannot be read as an image ({error}): repair or remove it.") from None
        if self.cache is not None:
            self.cache[index] = pixels
            self.cached[index] = True
        return pixels

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = {"images": torch.stack([self.pixels(i) for i in indices])}
        if self.source.labels is not None:
            batch["labels"] = torch.tensor([self.source.labels[self.indices[i]] for i in indices])
        return batch

    def check(self, *, show_progress: bool = True) -> None:
        """Decode every picture once, in parallel, so that a broken one stops the run before it starts.

        Raises:
            UserError: naming the first broken picture.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in tqdm(pool.map(self.pixels, range(len(self))), desc="checking images", total=len(self), disable=not show_progress, leave=False):
                pass


@dataclass(frozen=True)
class ImageSplits:
    """The same source, split into what trains and what is held out (perhaps empty)."""

    train: ImageDataset
    validation: ImageDataset
    class_names: tuple[str, ...]

    def names_hash(self) -> str:
        """A hash of which images there are, by name, label and split: what a run continues on must be what it was begun on."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split, dataset in self.items():
            labels = dataset.source.labels
            for i in dataset.indices:
                digest.update(f"{split} {dataset.source.ids[i]} {labels[i] if labels is not None else None}\n".encode())
        return digest.hexdigest()

    def items(self) -> Iterator[tuple[str, ImageDataset]]:
        """The splits by name."""
        yield "train", self.train
        yield "validation", self.validation


def load_images(data: ImagesConfig, config: PreprocessingConfig, *, num_workers: int = 0, show_progress: bool = True) -> ImageSplits:
    """Find, split and check the images that the configuration names.

    A held-out set that is given (`validation_path`, or the source's own) is taken; otherwise a hash of each image's name decides.

    Raises:
        UserError: no images, a broken image, an unknown colour, held-out images among the training images, or other classes.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserError(f"image.background is {config.background!r}, but must be a colour name or #rrggbb.") from None
    train, held_out = _open(data.path)
    if data.validation_path is not None:
        held_out, rest = _open(data.validation_path)
        if rest is not None:
            raise UserError(f"{data.validation_path} is split into training and held-out images itself: name the held-out part alone.")
        if lies_in(data.validation_path, data.path):
            raise UserError(f"{data.validation_path} lies in {data.path}, so it would be trained on: move the held-out images beside the others.")
    if held_out is not None:
        held_out = _with_classes_of(train, held_out)
        splits: list[tuple[ImageSource, Sequence[int]]] = [(source, range(len(source.ids))) for source in (train, held_out)]
    else:
        chosen = [is_held_out(name, config.validation_fraction) for name in train.ids]
        splits = [(train, [i for i, c in enumerate(chosen) if c is side]) for side in (False, True)]
    if not len(splits[0][1]):
        raise UserError(f"{data.path}: all {len(train.ids)} images are held out: add images or lower image.validation_fraction.")
    datasets = [ImageDataset(source, indices, config, shared=num_workers > 0) for source, indices in splits]
    for dataset in datasets:
        dataset.check(show_progress=show_progress)
    return ImageSplits(datasets[0], datasets[1], train.class_names)


def lies_in(path: str, folder: str) -> bool:
    """Whether a local path is a folder or lies in it."""
    return Path(folder).is_dir() and Path(path).expanduser().resolve().is_relative_to(Path(folder).expanduser().resolve())


def load_source(path: str) -> ImageSource:
    """All images at a path or Hub id, held out or not.

    Raises:
        UserError: there are none.
    """
    train, held_out = _open(path)
    if held_out is None:
        return train
    ids, number = [*train.ids, *held_out.ids], len(train.ids)
    return ImageSource(train.name, ids, partial(_open_either, train, held_out, number))


def _open_either(first: ImageSource, second: ImageSource, number: int, index: int) -> Image.Image:
    return first.open(index) if index < number else second.open(index - number)


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the image of this name is held out: a hash decides, so it never depends on the other images."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


def _with_classes_of(train: ImageSource, held_out: ImageSource) -> ImageSource:
    """The held-out source with its labels counted as in the training source.

    Raises:
        UserError: it has classes that the training source has not, or none where that has some.
    """
    if train.labels is None:
        return ImageSource(held_out.name, held_out.ids, held_out.open)
    if held_out.labels is None or not set(held_out.class_names) <= set(train.class_names):
        raise UserError(
            f"{held_out.name} has the classes {list(held_out.class_names)}, but {train.name} has {list(train.class_names)}: "
            f"the held-out images need the training images' classes."
        )
    labels = [train.class_names.index(held_out.class_names[label]) for label in held_out.labels]
    return ImageSource(held_out.name, held_out.ids, held_out.open, labels, train.class_names)


def _open(path: str) -> tuple[ImageSource, ImageSource | None]:
    """The source at a path or Hub id, and its own held-out part if it has one."""
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local)
    if local.is_file():
        if local.suffix != ".parquet":
            raise UserError(f"{path} is a file of an unknown kind: give an image folder, a .parquet file, or a Hub dataset id.")
        return _open_tables(path, "parquet", data_files={"train": str(local)})
    if looks_like_path(path):
        raise UserError(f"{path} does not exist: check data.path (an image folder, a .parquet file, or a Hub dataset id).")
    return _open_tables(path, path)


def _open_folder(root: Path) -> tuple[ImageSource, ImageSource | None]:
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    held_out = next((name for name in HELD_OUT_NAMES if name in folders), None)
    if "train" not in folders:
        return _folder_source(root), None
    if held_out is None or not folders <= {"train", *HELD_OUT_NAMES}:
        raise UserError(
            f"{root} holds the folders {', '.join(sorted(folders))}, of which 'train' is no class: "
            f"name {root / 'train'} as data.path, and the held-out folder as data.validation_path."
        )
    return _folder_source(root / "train"), _folder_source(root / held_out)


def _folder_source(root: Path) -> ImageSource:
    found = (Path(parent, name) for parent, _, names in os.walk(root, followlinks=True) for name in names)
    paths = sorted((p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")), key=lambda p: p.relative_to(root).as_posix())
    if not paths:
        raise UserError(f"{root} holds no image ({', '.join(sorted(SUFFIXES))}): check the folder.")
    ids = [path.relative_to(root).as_posix() for path in paths]
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if all("/" in name for name in ids):  # every image is in a sub-folder: these are the classes
        class_names = tuple(sorted({name.split("/")[0] for name in ids}))
        number = {name: i for i, name in enumerate(class_names)}
        labels = [number[name.split("/")[0]] for name in ids]
    return ImageSource(str(root), ids, partial(_open_file, paths), labels, class_names)


def _open_tables(path: str, builder: str, **options: Any) -> tuple[ImageSource, ImageSource | None]:
    """A Parquet file or a Hub dataset, through `datasets`. A string column `split` divides a single table."""
    import datasets

    try:
        tables = datasets.load_dataset(builder, **options)
    except Exception as error:  # `datasets` and the hub client raise many kinds; the user needs one sentence
        lines = str(error).splitlines() or ["no message"]
        raise UserError(f"{path} cannot be read as a dataset ({type(error).__name__}: {lines[0]}): check data.path.") from None
    train = tables["train"] if "train" in tables else tables[next(iter(tables))]
    held_out = next((tables[name] for name in HELD_OUT_NAMES if name in tables and tables[name] is not train), None)
    if held_out is None and "split" in train.column_names:
        names = np.array(train["split"])
        held_out = train.select(np.flatnonzero(names != "train"))
        train = train.select(np.flatnonzero(names == "train"))
        if not len(held_out):
            held_out = None
    return _table_source(path, train), _table_source(path, held_out) if held_out is not None else None


def _table_source(path: str, table: Any) -> ImageSource:
    import datasets

    features = table.features
    image = next((n for n, f in features.items() if isinstance(f, datasets.Image)), next((n for n in ("image", "img", "png", "jpg") if n in features), None))
    if image is None:
        raise UserError(f"{path} has the columns {list(features)}, but none of images: name it 'image' (encoded bytes, or the datasets Image type).")
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    label = next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), "label" if "label" in features else None)
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if label is not None:
        values = list(table[label])
        kinds = {type(value) for value in values}
        names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
        if kinds not in ({int}, {str}) or (names is not None and not 0 <= min(values) <= max(values) < len(names)):
            raise UserError(f"{path}: the column {label!r} does not give every row a class (found {sorted(map(str, kinds))}): fill it in, or remove it.")
        if names is None:
            names = sorted(set(values))
            values = [names.index(value) for value in values]
        labels, class_names = values, tuple(map(str, names))
    ids = list(map(str, table["id"])) if "id" in features else [f"{i:09d}" for i in range(len(table))]
    column = table.select_columns([image])
    return ImageSource(path, ids, partial(_open_cell, column, image), labels, class_names)


# What opens a picture are partial functions of these: loader processes that are spawned receive them pickled.


def _open_file(paths: Sequence[Path], index: int) -> Image.Image:
    return Image.open(paths[index])


def _open_cell(table: Any, column: str, index: int) -> Image.Image:
    """An encoded image: its bytes, or {"bytes", "path"} as `datasets` stores it."""
    cell = table[index][column]
    if isinstance(cell, dict):
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
    return Image.open(io.BytesIO(cell))
