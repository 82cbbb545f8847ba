"""From a path, a pattern, a Hub id or Python data to images: a table of rows in any order, or a
stream of shards in order."""

import csv
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageColor
from torch.utils.data import ConcatDataset, Subset

from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data import splits
from vqvae2.data.decoding import PICTURE_SUFFIXES, mark_cell, readable
from vqvae2.data.stream import ImageStream, StreamRow, find_columns, row_ids, shard_stem

logger = logging.getLogger(__name__)

PythonImages = Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""{"images", "labels"} of arrays or tensors, or rows of that."""

KINDS = (
    "an image folder, a list (.txt, .csv, .tsv, .jsonl), .parquet, .arrow or .tar files, "
    "a .npy or .npz file, or a Hub dataset id"
)
PREPARED, UNFINISHED = "prepared.json", "prepare_config.yaml"  # what vqvae2 prepare leaves
SAVED = ("state.json", "dataset_dict.json")  # what datasets.save_to_disk leaves
METADATA = ("metadata.csv", "metadata.jsonl")  # what `datasets` reads beside pictures
FILE_COLUMNS = ("path", "file_name", "file", "image", "filename")
JUNK = {"__MACOSX", "lost+found", "System Volume Information"}  # folders that nobody made
MAX_STRAY = 10  # pictures beside shards that are a banner; more are a dataset of their own
MAX_HELD_OUT = 1024  # images of a stream that are held in memory to validate on
PATTERN = re.compile(r"[*?\[\]{}]")


@dataclass(frozen=True)
class PreparedPictures:
    """Pixels in their final form: the Arrow-formatted column `pixels` of a `datasets` table, with
    uint8 values, or float32 in [-1, 1]."""

    config: PreprocessingConfig
    rows: Any

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """The pixels `(B, C, H, W)` of these rows."""
        column = self.rows[list(indices)]["pixels"].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(-1, self.config.channels, *self.config.height_width).copy()

    def __getitem__(self, index: int) -> np.ndarray:
        """As an array that can be prepared once more, in another size."""
        values = np.moveaxis(self.pixels([index])[0], 0, -1)
        low, high = self.config.value_range
        is_bytes = values.dtype == np.uint8
        return values if is_bytes else ((values + 1) / 2 * (high - low) + low).clip(low, high)


@dataclass(frozen=True)
class TableColumn:
    """A column of a `datasets` table, row by row (twice as fast as its own lazy columns)."""

    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index][self.column]


@dataclass(frozen=True)
class ImageTable:
    """Named pictures, each with a label or none, that can be read in any order."""

    name: str
    ids: Sequence[str]
    """A name for each picture: it decides the split and goes into the code dataset."""
    cells: Any
    """A picture for each index: a path, bytes, an array (see `decoding.read_cell`)."""
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] = ()
    files: Sequence[Path] = ()
    """The files behind it, where they are known: one for each picture, or shards of many."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_of_files(self) -> bool:
        """Whether each picture is a file of its own."""
        return len(self.files) == len(self)

    @property
    def labelled(self) -> bool:
        """Whether the pictures have labels."""
        return self.labels is not None

    @property
    def names(self) -> list[str]:
        """What tells these images from others (of a stream, its shards' names)."""
        return list(self.ids)

    def marks(self) -> list[int]:
        """Something cheap of some pictures that tells them from others of the same names."""
        if isinstance(self.cells, PreparedPictures):
            return [zlib.crc32(self.cells.pixels([i]).tobytes()) for i in splits.marked(len(self))]
        return [mark_cell(self.cells[i]) for i in splits.marked(len(self))]

    def choose(self, rows: Sequence[int]) -> "ImageTable":
        """These rows alone."""
        return replace(
            self,
            ids=[self.ids[i] for i in rows],
            cells=Subset(self.cells, rows),
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            files=[self.files[i] for i in rows] if self.is_of_files else self.files,
        )

    def with_classes_of(self, train: "ImageTable | ImageStream") -> "ImageTable":
        """This table with its labels numbered as in the training images.

        Raises UserError: it has other classes, or none where the training images have some."""
        if isinstance(train, ImageStream):  # its classes are numbers
            class_names, expected = self.class_names, "numbers"
            numbers = {name: int(name) for name in class_names if name.isdecimal()}
        elif train.labels is None:
            return replace(self, labels=None, class_names=())
        else:
            class_names, expected = train.class_names, str(list(train.class_names))
            numbers = {name: number for number, name in enumerate(class_names)}
        if not set(self.class_names) <= set(numbers) or (class_names and not self.labelled):
            what = f"{self.name} has the classes {list(self.class_names)}, but {train.name} has"
            raise UserError(f"{what} {expected}: give held-out images the training's classes.")
        labels = self.labels and [numbers[self.class_names[label]] for label in self.labels]
        return replace(self, labels=labels, class_names=class_names)


class Sources(NamedTuple):
    """Images, and those of them that are held out explicitly or by the source's own split."""

    train: ImageTable | ImageStream
    held_out: ImageTable | ImageStream | None


def open_source(data: ImagesConfig | PythonImages, config: PreprocessingConfig) -> Sources:
    """Open what the configuration names, or take {"images", "labels"} from Python.

    Raises:
        UserError: no images, shards of held-out images among the training's, or other classes.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        what = f"image.background is {config.background!r}"
        raise UserError(f"{what}: give a colour name or #rrggbb.") from None
    if not isinstance(data, ImagesConfig):
        return _open_arrays(data, config.channels, "data")

    # An explicit held-out set wins over the source's own, and shares no shard with the training
    # images. (Files of one image each are compared where they are split: a link is no mistake.)
    train, held_out = _open(data.path, data, config.channels)
    if data.validation_path is not None:
        path = data.validation_path
        at_once = replace(data, streaming=data.streaming and "://" in path)
        held_out, others = _open(path, at_once, config.channels)
        if others is not None and not (isinstance(others, ImageTable) and not len(others)):
            raise UserError(f"{path} is split itself: name its held-out part alone.")
        for_sure = splits.not_held_out(train.files, held_out.files)
        if not (all(for_sure) or (train.is_of_files and held_out.is_of_files)):
            shared = train.files[for_sure.index(False)]
            raise UserError(f"{shared} is held out, but would be trained on too: keep them apart.")

    # Beside a table the held-out images are one too, with their classes numbered alike.
    if isinstance(train, ImageTable) and isinstance(held_out, ImageStream):
        held_out = first_rows(held_out, held_out.all_rows())
    elif isinstance(held_out, ImageTable):
        held_out = held_out.with_classes_of(train)
    return Sources(train, held_out)


def load_table(data: ImagesConfig, config: PreprocessingConfig) -> ImageTable:
    """All images of a table, held out or not, without their labels.

    Raises:
        UserError: see `open_source`; or the source is a stream.
    """
    opened = open_source(data, config)
    tables = [refuse_stream(table) for table in opened if table is not None]
    ids = [name for table in tables for name in table.ids]
    return ImageTable(tables[0].name, ids, ConcatDataset([table.cells for table in tables]))


def refuse_stream(source: ImageTable | ImageStream) -> ImageTable:
    """For what needs images in any order. Raises UserError: the source is a stream."""
    if isinstance(source, ImageStream):
        what_to_do = "run vqvae2 prepare on it, and give the prepared folder"
        raise UserError(f"{source.name} is a stream, which is read in order: {what_to_do}.")
    return source


def first_rows(stream: ImageStream, rows: Iterable[StreamRow]) -> ImageTable:
    """The first of these rows of a stream as a table, without labels."""
    kept = list(islice(rows, MAX_HELD_OUT))
    return ImageTable(stream.name, [row.id for row in kept], [row.cell for row in kept])


def make_table(
    name: str,
    ids: Sequence[str],
    cells: Any,
    *,
    labels: tuple[Sequence[Any], str, Sequence[str] | None] | None = None,
    row_splits: Sequence[str] = (),
    files: Sequence[Path] = (),
) -> Sources:
    """A table of these rows, split in two where each names its split (train, or held out).

    Args:
        labels: the arguments of `number_classes`.

    Raises:
        UserError: a name occurs twice, a row has no class, or no row trains.
    """
    splits.check_names(map(os.path.normpath, ids), name)
    numbers, class_names = splits.number_classes(*labels) if labels is not None else (None, ())
    table = ImageTable(name, ids, cells, numbers, class_names, files)
    train = [i for i, split in enumerate(row_splits) if split == "train"]
    if len(train) == len(row_splits):
        return Sources(table, None)
    if not train:
        raise UserError(f"{name}: no row has the split 'train': give some.")
    held_out = [i for i, split in enumerate(row_splits) if split != "train"]
    return Sources(table.choose(train), table.choose(held_out))


def _open(path: str, data: ImagesConfig, channels: int) -> Sources:
    """What one path names, with the source's own split."""
    # Names that are not local: URLs are streamed; a Hub dataset is downloaded, or streamed.
    local = Path(path).expanduser()
    is_pattern = PATTERN.search(path) is not None and not local.exists()
    is_hub_id = not (local.exists() or is_pattern or looks_like_path(path) or "://" in path)
    if "://" in path or (is_hub_id and data.streaming):
        url = f"hf://datasets/{path}/**/*.parquet" if is_hub_id else path
        return _open_stream(path, _expand(url), data)
    if is_hub_id:
        return _open_tables(path, [], data)

    # Folders that a library or an earlier step has written, else shards, else pictures.
    if local.is_dir() and not data.streaming:
        if (local / PREPARED).exists():
            from vqvae2.data.prepared import open_prepared

            return open_prepared(local)
        if any((local / name).exists() for name in SAVED):
            return _open_tables(path, [], data, saved=True)
        if (local / UNFINISHED).exists():
            raise UserError(f"{path} holds unfinished prepared images: run vqvae2 prepare again.")
    if local.is_dir():
        files = _find_shards(local)
        if not files and not data.streaming:
            return _open_folder(local, data)
    elif is_pattern:
        files = list(map(Path, _expand(path)))
    elif local.is_file():
        files = [local]
    else:
        raise UserError(f"{path} does not exist: check data.path ({KINDS}).")

    # Files, by their suffix.
    suffixes = {file.suffix for file in files}
    if data.streaming or suffixes <= {".tar", ".gz"}:
        return _open_stream(path, list(map(str, files)), data)
    if suffixes in ({".parquet"}, {".arrow"}):
        return _open_tables(path, files, data)
    if suffixes <= {".txt", ".csv", ".tsv", ".jsonl"} and len(files) == 1:
        return _open_list(files[0], data)
    if suffixes <= {".npy", ".npz"} and len(files) == 1:
        return _open_array_file(files[0], channels)
    raise UserError(f"{path} is of an unknown kind ({', '.join(sorted(suffixes))}): give {KINDS}.")


# Shards


def _open_stream(path: str, urls: Sequence[str], data: ImagesConfig) -> Sources:
    """Shards that are read in order; those of held-out splits are held out."""
    for url in urls:
        if not url.endswith((".parquet", ".tar", ".tar.gz")):
            raise UserError(f"{path}: {url} is no .tar or .parquet shard: remove --data.streaming.")
        if not (data.streaming or url.endswith((".tar", ".tar.gz"))):
            raise UserError(f"{path} is a URL: add --data.streaming, or copy it here first.")
    if not urls:
        raise UserError(f"{path} holds no .tar or .parquet shard: check data.path.")
    what = f"{path} (names of shards, with which those of their rows begin)"
    splits.check_names(map(shard_stem, urls), what)
    by_split = splits.split_files(map(Path, urls))
    streams: list[Any] = [None, None]
    for place, split in enumerate(splits.pick_splits(by_split, path)):
        if split is not None:
            shards = tuple(url for url in urls if Path(url) in by_split[split])
            streams[place] = ImageStream(path, shards, data)
    return Sources(*streams)


def _expand(pattern: str) -> list[str]:
    """The files or URLs of a pattern with *, ?, [...] or {000..127}, in order of their names."""
    import fsspec

    with readable(pattern, "listed", "check data.path"):
        system, _, names = fsspec.get_fs_token_paths(expand_ranges(pattern))
    names = list(dict.fromkeys(names))
    if "://" in pattern:
        return [system.unstrip_protocol(name) for name in names]
    for name in names or [pattern]:
        if not os.path.isfile(name):
            raise UserError(f"{pattern}: {name} does not exist: check data.path.")
    return names


def expand_ranges(pattern: str) -> list[str]:
    """A pattern with {000..127} as the 128 names that it stands for; without one, itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    names: list[str] = []
    for number in range(int(first), int(last) + 1):
        digits = str(number).zfill(len(first))
        names += expand_ranges(pattern[: found.start()] + digits + pattern[found.end() :])
    return names


def _find_shards(folder: Path) -> list[Path]:
    """The Parquet, Arrow or tar files of a folder (perhaps in folders of splits).

    Raises UserError: there are such, and pictures beside them."""
    for suffix in ("parquet", "arrow", "tar", "tar.gz"):
        shards = sorted([*folder.glob(f"*.{suffix}"), *folder.glob(f"*/*.{suffix}")])
        stray = list(islice(_pictures_below(folder), MAX_STRAY + 1)) if shards else []
        if len(stray) > MAX_STRAY:
            what = f"{folder} holds pictures and {shards[0].relative_to(folder)}"
            raise UserError(f"{what}: move one kind out, or name the files of one by a pattern.")
        if stray:
            name = stray[0].relative_to(folder)
            logger.info("%s: pictures beside shards, such as %s, are not used.", folder, name)
        if shards:
            return shards
    return []


# Picture files


def _open_folder(root: Path, data: ImagesConfig) -> Sources:
    """Pictures with class folders or without, or with train/ and validation/ or test/ in it."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    folders = [name for name in folders if not _is_junk(name)]
    if "train" not in map(splits.split_of, folders):
        return _open_pictures(root, data)
    if not all(map(splits.split_of, folders)):
        what = f"{root} holds the folders {', '.join(folders)}, of which 'train' is no class"
        raise UserError(f"{what}: name it as data.path, and another as data.validation_path.")
    train, held_out = splits.pick_splits(folders, str(root))
    table = _open_pictures(root / train, data).train
    return Sources(table, _open_pictures(root / held_out, data).train if held_out else None)


def _open_pictures(root: Path, data: ImagesConfig) -> Sources:
    """All pictures below a folder; a metadata file, or the first folders, may name classes."""
    by_name = {path.relative_to(root).as_posix(): path for path in _pictures_below(root)}
    ids = sorted(by_name)
    if not ids:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise UserError(f"{root} holds no image ({suffixes}): check the folder.")
    metadata = next((root / name for name in METADATA if (root / name).is_file()), None)
    if metadata is not None:
        listed = _open_list(metadata, data)
        number = len(ids) - sum(len(table) for table in listed if table is not None)
        if number > 0:
            logger.info("%s: %d pictures are not in it, and not used.", metadata, number)
        return listed
    loose = [name for name in ids if "/" not in name]
    if loose and len(loose) < len(ids):
        logger.info("%s: no classes, because %s lies in no class folder.", root, loose[0])
    labels = None if loose else ([name.split("/")[0] for name in ids], str(root), None)
    files = [by_name[name] for name in ids]
    return make_table(str(root), ids, files, labels=labels, files=files)


def _is_junk(name: str) -> bool:
    return name.startswith((".", "@", "$")) or name in JUNK


def _pictures_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All picture files, through links too, but not into a folder that holds the present one."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_junk(entry.name):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                    yield from _pictures_below(Path(entry.path), above)
            elif Path(entry.name).suffix.lower() not in PICTURE_SUFFIXES:
                continue
            elif entry.is_file() or entry.is_symlink():  # a broken link is named as unreadable
                yield Path(entry.path)


def _open_list(path: Path, data: ImagesConfig) -> Sources:
    """A list of picture files, relative to its own folder: a path a line (.txt), or with the
    columns path, label and split. Rows whose split is not train are held out."""
    # Rows, by the file's suffix.
    with (
        readable(str(path), "read as a list"),
        open(path, encoding="utf-8-sig", newline="") as file,
    ):
        lines = (line for line in file if line.strip())
        if path.suffix == ".txt":
            rows = [{"path": line.strip()} for line in lines]
        elif path.suffix == ".jsonl":
            rows = list(map(json.loads, lines))
        else:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows with columns: put one image on each line.")

    # Files and labels.
    image, label = find_columns(rows[0], str(path), data, FILE_COLUMNS)
    for column in (image, label):
        if column is not None and any(row.get(column) is None for row in rows):
            raise UserError(f"{path}: a row has no {column!r}, but others have: fill it in.")
    ids = [str(row[image]) for row in rows]
    files = [path.parent / Path(name).expanduser() for name in ids]
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None:
        raise UserError(f"{path} names {missing}, which does not exist: paths start at the list.")
    values = [row[label] for row in rows] if label else []
    labels = (values, f"{path}: the column {label!r}", None) if label else None
    row_splits = [row.get("split", "train") for row in rows]
    return make_table(str(path), ids, files, labels=labels, row_splits=row_splits, files=files)


# Tables


def _open_tables(
    path: str, files: Sequence[Path], data: ImagesConfig, *, saved: bool = False
) -> Sources:
    """Parquet or Arrow files, a folder that `datasets` saved, or (with neither) a Hub dataset."""
    import datasets

    by_split = splits.split_files(files)
    with readable(path, "read as a dataset", "check data.path"):
        if saved:
            loaded = datasets.load_from_disk(path)
        elif files:
            names = {split: list(map(str, paths)) for split, paths in by_split.items()}
            loaded = datasets.load_dataset(files[0].suffix.removeprefix("."), data_files=names)
        else:
            loaded = datasets.load_dataset(path)
    loaded = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    train, held_out = splits.pick_splits(loaded, path)
    sources = _open_table(path, loaded[train], by_split.get(train, []), data)
    if held_out is None:
        return sources
    own = _open_table(path, loaded[held_out], by_split.get(held_out, []), data)
    return Sources(sources.train, own.train)


def _open_table(path: str, table: Any, files: Sequence[Path], data: ImagesConfig) -> Sources:
    import datasets
    import pyarrow.parquet as pq

    # Pictures, still encoded.
    features = table.features
    image, label = find_columns(features, path, data)
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))

    # Names: the table's own, else of shard and row, else numbers.
    if "id" in features:
        ids = list(map(str, table["id"]))
    elif files and files[0].suffix == ".parquet":
        ids = []
        for file in files:
            ids += row_ids(file.name, pq.read_metadata(file).num_rows)
    else:
        ids = _numbered(len(table))

    # Labels and splits, as their columns' types or their values say.
    labels, row_splits = None, []
    if label is not None:
        names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
        labels = (list(table[label]), f"{path}: the column {label!r}", names)
    if "split" in features:
        row_splits = list(table["split"])
        if isinstance(features["split"], datasets.ClassLabel):
            row_splits = features["split"].int2str(row_splits)
    files = files or [Path(file["filename"]) for file in table.cache_files]
    cells = TableColumn(table.select_columns([image]), image)
    return make_table(path, ids, cells, labels=labels, row_splits=row_splits, files=files)


def _numbered(number: int) -> list[str]:
    return [f"{i:09d}" for i in range(number)]


# Arrays


def _open_array_file(path: Path, channels: int) -> Sources:
    """A stack in a .npy file (mapped from the disk), or `images` (and `labels`) in a .npz file."""
    with readable(str(path), "read as arrays"):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        is_archive = isinstance(loaded, np.lib.npyio.NpzFile)
        arrays = dict(loaded.items()) if is_archive else {"images": loaded}
    number = len(arrays.get("images", ()))
    for name, array in arrays.items():
        if name not in ("images", "labels") and array.ndim and len(array) == number:
            what = f"{path} holds the arrays {list(arrays)}, of which {name!r} is unknown"
            raise UserError(f"{what}: name them 'images' and 'labels', and leave others out.")
    return _open_arrays(arrays, channels, str(path), [path])


def _open_arrays(
    data: PythonImages, channels: int, name: str, files: Sequence[Path] = ()
) -> Sources:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), and numbers or names as labels, or none."""
    # Rows become arrays.
    if not isinstance(data, Mapping):
        rows = list(data)
        keys = [key for key in ("images", "labels") if any(key in row for row in rows)]
        for i, row in enumerate(rows):
            missing = [key for key in keys if row.get(key) is None]
            if missing:
                raise UserError(f"{name}: row {i} has no {missing[0]!r}, but others have: add it.")
        data = {key: [np.asarray(row[key]) for row in rows] for key in keys}
    if "images" not in data:
        raise UserError(f"{name} has the keys {list(data)}, but 'images' is missing: add it.")
    try:
        images = np.asarray(data["images"])
    except ValueError:
        raise UserError(f"{name} has images of several shapes: resize them to one.") from None
    if images.ndim not in (3, 4) or not len(images):
        expected = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise UserError(f"{name} has images of shape {images.shape}: reshape them to {expected}.")
    is_last = images.ndim == 3 or images.shape[-1] in (1, channels)
    if not is_last and images.shape[1] in (1, channels):
        images = np.moveaxis(images, 1, -1)

    # One label each, or none.
    labels = None
    if data.get("labels") is not None:
        values = np.asarray(data["labels"])
        if values.shape != (len(images),):
            what = f"{name} has {len(images)} images, but labels of shape {values.shape}"
            raise UserError(f"{what}: give one for each image.")
        labels = (values.tolist(), f"{name}: labels", None)
    return make_table(name, _numbered(len(images)), images, labels=labels, files=files)
