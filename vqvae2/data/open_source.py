"""From a path, a pattern, a Hub id or Python data to images: a table of rows in any order, or a
stream of shards in order; and from these to training and held-out datasets."""

import csv
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageColor

from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.common.loading import Loader, ShuffledLoader
from vqvae2.config import DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data.augmentation import no_change
from vqvae2.data.dataset import (
    AugmentedImages,
    ImageDataset,
    ImageSplits,
    ImageTable,
    PreparedPictures,
)
from vqvae2.data.decoding import (
    PICTURE_SUFFIXES,
    BadImage,
    Picture,
    first_line,
    read_cell,
    read_picture,
)
from vqvae2.data.splits import (
    choose_held_out,
    drop_held_out_files,
    image_facts,
    is_held_out,
    marked,
    number_classes,
    pick_splits,
    refuse_repeated,
    refuse_shared_files,
    split_files,
    split_of,
)
from vqvae2.data.stream import (
    ImageStream,
    StreamedImages,
    StreamRow,
    find_columns,
    row_ids,
    shard_stem,
)

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
JUNK = {"__MACOSX", "lost+found", "System Volume Information"}  # folders that nobody made
MAX_STRAY = 10  # pictures beside shards that are a banner; more are a dataset of their own
MAX_HELD_OUT = 1024  # images of a stream that are held out by name
HELD_OUT_BYTES = 2 << 30  # of decoded images that a stream's own held-out shards may take
PATTERN = re.compile(r"[*?\[\]{}]")


class Sources(NamedTuple):
    """Images, and those of them that are held out explicitly or by the source's own split."""

    train: ImageTable | ImageStream
    held_out: ImageTable | ImageStream | None


def open_source(data: ImagesConfig | PythonImages, config: PreprocessingConfig) -> Sources:
    """Open what the configuration names, or take {"images", "labels"} from Python.

    Raises:
        UserError: no images, held-out images among the training images, or other classes.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserError(
            f"image.background is {config.background!r}, but must be a colour name or #rrggbb."
        ) from None
    if not isinstance(data, ImagesConfig):
        return Sources(_array_table(data, config.channels, "data"), None)

    # The held-out set: an explicit one wins over the source's own.
    train, held_out = _open(data.path, data, config.channels)
    if data.validation_path is not None:
        at_once = replace(data, streaming=data.streaming and "://" in data.validation_path)
        held_out, rest = _open(data.validation_path, at_once, config.channels)
        if rest is not None and not (isinstance(rest, ImageTable) and not len(rest)):
            raise UserError(
                f"{data.validation_path} is split into training and held-out images itself: "
                f"name the held-out part alone."
            )
    if held_out is None:
        return Sources(train, None)

    # It shares no file with the training images, and numbers its classes as they do. (Files of
    # one image each are compared where they are split, so that a link is no mistake.)
    explicit = data.validation_path is not None
    if explicit and not (_is_of_files(train) and _is_of_files(held_out)):
        refuse_shared_files(train.files, held_out.files, train.name)
    if isinstance(train, ImageTable) and isinstance(held_out, ImageTable):
        held_out = held_out.with_classes_of(train)
    elif isinstance(held_out, ImageTable):
        held_out = _with_numbers_for_classes(held_out)
    return Sources(train, held_out)


def _is_of_files(source: ImageTable | ImageStream) -> bool:
    return isinstance(source, ImageTable) and len(source.files) == len(source)


def _with_numbers_for_classes(table: ImageTable) -> ImageTable:
    """Labels as a stream has them: the numbers themselves."""
    if table.labels is None:
        return table
    if not all(name.isdecimal() for name in table.class_names):
        raise UserError(
            f"{table.name} has the classes {list(table.class_names)}, but classes of a stream "
            f"are numbers from 0 on: number them alike."
        )
    return replace(table, labels=[int(table.class_names[label]) for label in table.labels])


def _open(path: str, data: ImagesConfig, channels: int) -> Sources:
    """What one path names, with the source's own split."""
    # Names that are not local: URLs are streamed; a Hub dataset is downloaded, or streamed.
    local = Path(path).expanduser()
    is_pattern = PATTERN.search(path) is not None and not local.exists()
    is_hub_id = not (local.exists() or is_pattern or looks_like_path(path) or "://" in path)
    url = path if "://" in path else f"hf://datasets/{path}/**/*.parquet"
    if "://" in path or (is_hub_id and data.streaming):
        return _open_stream(path, expand(url), data)
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
        _check_stray_pictures(local, files[:1])
    elif is_pattern:
        files = list(map(Path, expand(path)))
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
    if len(files) == 1 and files[0].suffix in (".txt", ".csv", ".tsv", ".jsonl"):
        return _open_list(files[0], data)
    if len(files) == 1 and files[0].suffix in (".npy", ".npz"):
        return Sources(replace(_open_arrays(files[0], channels), files=files), None)
    raise UserError(f"{path} is of an unknown kind ({', '.join(sorted(suffixes))}): give {KINDS}.")


# Shards


def _open_stream(path: str, urls: Sequence[str], data: ImagesConfig) -> Sources:
    """Shards that are read in order; those of held-out splits are held out."""
    for url in urls:
        if not url.endswith((".parquet", ".tar", ".tar.gz")):
            raise UserError(
                f"{path}: {url} is no .tar or .parquet shard, and only such can be streamed: "
                f"remove --data.streaming."
            )
        if "://" in url and url.endswith(".parquet") and not data.streaming:
            raise UserError(f"{path} is a URL: add --data.streaming, or copy it here first.")
    if not urls:
        raise UserError(f"{path} holds no .tar or .parquet shard: check data.path.")
    what = f"{path} (names of shards, which the names of their rows begin with)"
    refuse_repeated([shard_stem(url) for url in urls], what)
    by_split = split_files(map(Path, urls))
    train, held_out = pick_splits(by_split, path)
    streams = []
    for split in (train, held_out):
        chosen = set(by_split.get(split or "", ()))
        shards = tuple(url for url in urls if Path(url) in chosen)
        streams.append(ImageStream(path, shards, data) if split is not None else None)
    assert streams[0] is not None
    return Sources(streams[0], streams[1])


def expand(pattern: str) -> list[str]:
    """The files or URLs of a pattern with *, ?, [...] or {000..127}, in order of their names.

    Raises:
        UserError: none, or they cannot be listed.
    """
    import fsspec

    try:
        system, _, names = fsspec.get_fs_token_paths(expand_ranges(pattern))
    except Exception as error:  # each file system raises its own kinds
        raise UserError(
            f"{pattern} cannot be listed ({type(error).__name__}: {first_line(error)}): "
            f"check data.path and your access to it."
        ) from None
    if "://" in pattern:
        return [system.unstrip_protocol(name) for name in dict.fromkeys(names)]
    for name in names:
        if not os.path.isfile(name):
            raise UserError(f"{pattern}: {name} does not exist: check data.path.")
    return list(dict.fromkeys(names))


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
    """The Parquet, Arrow or tar files of a folder (perhaps in folders of splits)."""
    for suffix in ("parquet", "arrow", "tar", "tar.gz"):
        found = sorted([*folder.glob(f"*.{suffix}"), *folder.glob(f"*/*.{suffix}")])
        if found:
            return found
    return []


def _check_stray_pictures(folder: Path, shards: Sequence[Path]) -> None:
    stray = list(islice(_pictures_below(folder), MAX_STRAY + 1)) if shards else []
    if len(stray) > MAX_STRAY:
        raise UserError(
            f"{folder} holds pictures and {shards[0].relative_to(folder)}: "
            f"move one kind out, or name the files of the other by a pattern."
        )
    if stray:
        name = stray[0].relative_to(folder)
        logger.info("%s: pictures beside the shards, such as %s, are not used.", folder, name)


# Picture files


def _open_folder(root: Path, data: ImagesConfig) -> Sources:
    """Pictures with class folders or without, or with train/ and validation/ or test/ in it."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    folders = [name for name in folders if not _is_junk(name)]
    if not any(split_of(name) == "train" for name in folders):
        return Sources(_folder_table(root, data), None)
    if not all(map(split_of, folders)):
        raise UserError(
            f"{root} holds the folders {', '.join(folders)}, of which 'train' is no class: name "
            f"{root / 'train'} as data.path, and the held-out folder as data.validation_path."
        )
    train, held_out = pick_splits(folders, str(root))
    table = _folder_table(root / train, data)
    return Sources(table, _folder_table(root / held_out, data) if held_out else None)


def _folder_table(root: Path, data: ImagesConfig) -> ImageTable:
    by_name = {path.relative_to(root).as_posix(): path for path in _pictures_below(root)}
    ids = sorted(by_name)
    if not ids:
        raise UserError(
            f"{root} holds no image ({', '.join(sorted(PICTURE_SUFFIXES))}): check the folder."
        )

    # A metadata file says which pictures there are and what their classes are.
    for name in METADATA:
        if (root / name).is_file():
            table, split = _open_list(root / name, data)
            assert isinstance(table, ImageTable)
            number = len(ids) - len(table)
            if split is not None:
                raise UserError(f"{root / name} has a column 'split': name the file as data.path.")
            if number > 0:
                logger.info("%s: %d pictures are not in %s: not used.", root, number, name)
            return table

    # Else the first folders are the classes, if every picture lies in one.
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    loose = [name for name in ids if "/" not in name]
    if not loose:
        labels, class_names = number_classes([name.split("/")[0] for name in ids], str(root))
    elif len(loose) < len(ids):
        logger.info("%s: no classes, because %s lies in no class folder.", root, loose[0])
    files = [by_name[name] for name in ids]
    return _file_table(str(root), ids, files, labels, class_names)


def _file_table(
    name: str,
    ids: Sequence[str],
    files: Sequence[Path],
    labels: Sequence[int] | None,
    class_names: tuple[str, ...],
) -> ImageTable:
    read, mark = partial(_read_file, files), partial(_file_length, files)
    return ImageTable(name, ids, read, mark, labels, class_names, files)


def _read_file(files: Sequence[Path], index: int) -> Picture:  # can be sent to loader processes
    return read_picture(files[index])


def _file_length(files: Sequence[Path], index: int) -> int:
    return files[index].stat().st_size if files[index].exists() else -1


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
    # Columns, of which every row has a value.
    rows = _read_rows(path)
    names = ("path", "file_name", "file", "image", "filename")
    image = data.image_column or next((name for name in names if name in rows[0]), None)
    label = data.label_column or ("label" if "label" in rows[0] else None)
    if image is None:
        raise UserError(
            f"{path} has the columns {list(rows[0])}, but none of files: name it 'path', "
            f"or set --data.image-column."
        )
    for column in (image, label):
        if column is not None and any(row.get(column) is None for row in rows):
            raise UserError(
                f"{path}: not every row has the column {column!r} (the first has "
                f"{list(rows[0])}): fill it in."
            )

    # Files, which exist and have a name each.
    ids = [str(row[image]) for row in rows]
    refuse_repeated([os.path.normpath(name) for name in ids], str(path))
    files = [path.parent / Path(name).expanduser() for name in ids]
    for file in files:
        if not file.exists():
            raise UserError(
                f"{path} names {file}, which does not exist: paths are relative to the list."
            )
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if label is not None:
        values = [row[label] for row in rows]
        labels, class_names = number_classes(values, f"{path}: the column {label!r}")
    table = _file_table(str(path), ids, files, labels, class_names)
    return _split_by_column(table, [row.get("split", "train") for row in rows])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            if path.suffix == ".txt":
                rows: list[dict[str, Any]] = [{"path": line.strip()} for line in lines]
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in lines]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as a list ({first_line(error)}): check the file."
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no rows with columns: put one image on each line.")
    return rows


def _split_by_column(table: ImageTable, splits: Sequence[str]) -> Sources:
    """A table of which each row names its split."""
    train = [i for i, split in enumerate(splits) if split == "train"]
    held_out = [i for i, split in enumerate(splits) if split != "train"]
    if not train:
        raise UserError(
            f"{table.name}: no row has the split 'train' (but {', '.join(sorted(set(splits)))}): "
            f"give some."
        )
    if not held_out:
        return Sources(table, None)
    return Sources(table.choose(train), table.choose(held_out))


# Tables


def _open_tables(
    path: str, files: Sequence[Path], data: ImagesConfig, *, saved: bool = False
) -> Sources:
    """Parquet or Arrow files, a folder that `datasets` saved, or (with neither) a Hub dataset."""
    import datasets

    by_split = split_files(files)
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
        elif files:
            names = {split: list(map(str, paths)) for split, paths in by_split.items()}
            loaded = datasets.load_dataset(files[0].suffix.removeprefix("."), data_files=names)
        else:
            loaded = datasets.load_dataset(path)
        tables: dict[str, ImageTable] = {}
        loaded = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        for split in filter(None, pick_splits(loaded, path)):
            tables[split] = _rows_table(path, loaded[split], by_split.get(split, []), data)
    except UserError:
        raise
    except Exception as error:  # `datasets` and the Hub's client raise many kinds
        raise UserError(
            f"{path} cannot be read as a dataset ({type(error).__name__}: {first_line(error)}): "
            f"check data.path."
        ) from None
    train, *held_out = tables.values()
    if held_out or "split" not in loaded[next(iter(tables))].column_names:
        return Sources(train, held_out[0] if held_out else None)

    # A column `split` divides a single table.
    table = loaded[next(iter(tables))]
    kind, splits = table.features["split"], list(table["split"])
    splits = kind.int2str(splits) if isinstance(kind, datasets.ClassLabel) else splits
    return _split_by_column(train, list(map(str, splits)))


def _rows_table(path: str, table: Any, files: Sequence[Path], data: ImagesConfig) -> ImageTable:
    import datasets

    # Pictures, still encoded.
    features = table.features
    image, label = find_columns(features, path, data)
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    pictures = table.select_columns([image])
    read, mark = partial(_read_cell, pictures, image), partial(_cell_length, pictures, image)

    # Names: the table's own, else of shard and row, else numbers.
    if "id" in features:
        ids = list(map(str, table["id"]))
    elif files and files[0].suffix == ".parquet":
        import pyarrow.parquet as pq

        ids = []
        for file in files:
            ids += row_ids(file.name, pq.read_metadata(file).num_rows)
    else:
        ids = [f"{i:09d}" for i in range(len(table))]
    refuse_repeated(ids, path)

    # Labels, as their column's type or their values say.
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if label is not None:
        known = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
        what = f"{path}: the column {label!r}"
        labels, class_names = number_classes(list(table[label]), what, known)
    behind = list(files) or [Path(file["filename"]) for file in table.cache_files]
    return ImageTable(path, ids, read, mark, labels, class_names, behind)


def _read_cell(table: Any, column: str, index: int) -> Picture:
    return read_cell(table[index][column])


def _cell_length(table: Any, column: str, index: int) -> int:
    cell = table[index][column]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(content) if isinstance(content, bytes) else -1


# Arrays


def _open_arrays(path: Path, channels: int) -> ImageTable:
    """A stack in a .npy file (mapped from the disk), or `images` (and `labels`) in a .npz file."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        is_archive = isinstance(loaded, np.lib.npyio.NpzFile)
        arrays = dict(loaded.items()) if is_archive else {"images": loaded}
    except Exception as error:  # NumPy raises many kinds
        raise UserError(
            f"{path} cannot be read as NumPy arrays ({first_line(error)}): check the file."
        ) from None
    number = len(arrays["images"]) if "images" in arrays else -1
    for name, array in arrays.items():
        per_image = array.ndim and len(array) == number
        if number < 0 or (name not in ("images", "labels") and per_image):
            raise UserError(
                f"{path} holds the arrays {list(arrays)}, but expected 'images' and perhaps "
                f"'labels': rename them, and leave others out."
            )
    return _array_table(arrays, channels, str(path))


def _array_table(data: PythonImages, channels: int, name: str) -> ImageTable:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), and numbers or names as labels, or none."""
    # Rows become arrays.
    if not isinstance(data, Mapping):
        rows = list(data)
        keys = [key for key in ("images", "labels") if any(key in row for row in rows)]
        for i, row in enumerate(rows):
            for key in keys:
                if row.get(key) is None:
                    raise UserError(f"{name}: row {i} has no {key!r}, but others have: add it.")
        data = {key: [np.asarray(row[key]) for row in rows] for key in keys}
    if "images" not in data:
        raise UserError(f"{name} has the keys {list(data)}, but 'images' is missing: add it.")
    try:
        images = np.asarray(data["images"])
    except ValueError:
        raise UserError(
            f"{name} has images of several shapes: resize them to one, or write them to files."
        ) from None
    if images.ndim not in (3, 4) or not len(images):
        raise UserError(
            f"{name} has images of shape {images.shape}, but expected (N, H, W), (N, H, W, C) or "
            f"(N, C, H, W): reshape them."
        )
    if images.ndim == 4 and images.shape[-1] not in (1, channels) and images.shape[1] == channels:
        images = np.moveaxis(images, 1, -1)
    elif images.ndim == 4 and images.shape[-1] not in (1, channels) and images.shape[1] == 1:
        images = images[:, 0]

    # Labels.
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if data.get("labels") is not None:
        values = np.asarray(data["labels"])
        if values.shape != (len(images),):
            raise UserError(
                f"{name} has {len(images)} images, but labels of shape {values.shape}: "
                f"give one for each image."
            )
        labels, class_names = number_classes(values.tolist(), f"{name}: labels")
    ids = [f"{i:09d}" for i in range(len(images))]
    read, mark = partial(_read_row, images), partial(_row_checksum, images)
    return ImageTable(name, ids, read, mark, labels, class_names)


def _read_row(images: np.ndarray, index: int) -> Picture:
    return np.array(images[index])


def _row_checksum(images: np.ndarray, index: int) -> int:
    return zlib.crc32(np.ascontiguousarray(images[index]).tobytes())


# Datasets


def load_table(data: ImagesConfig, config: PreprocessingConfig) -> ImageTable:
    """All images of a table, held out or not.

    Raises:
        UserError: see `open_source`; or the source is a stream.
    """
    train, held_out = open_source(data, config)
    if isinstance(train, ImageStream) or isinstance(held_out, ImageStream):
        raise UserError(_STREAMED.format(train.name))
    if held_out is None:
        return train
    read = partial(_of_either, train.read, held_out.read, len(train))
    mark = partial(_of_either, train.mark, held_out.mark, len(train))
    return ImageTable(train.name, [*train.ids, *held_out.ids], read, mark)


def _of_either(
    first: Callable[[int], Any], second: Callable[[int], Any], number: int, index: int
) -> Any:
    return first(index) if index < number else second(index - number)


_STREAMED = (
    "{} is a stream of shards, which are read in order: run vqvae2 prepare on it first, and give "
    "the prepared folder."
)


def split_table(sources: Sources, config: PreprocessingConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training and the held-out images of a table, not decoded yet.

    Raises:
        UserError: the source is a stream, or no training image is left.
    """
    train, held_out = sources
    if isinstance(train, ImageStream):
        raise UserError(_STREAMED.format(train.name))
    if held_out is None:
        chosen = choose_held_out(train.ids, train.files, config.validation_fraction)
        rows = [i for i, is_chosen in enumerate(chosen) if not is_chosen]
        held_out, held_out_rows = train, [i for i, is_chosen in enumerate(chosen) if is_chosen]
    else:
        rows = list(range(len(train)))
        if _is_of_files(train) and _is_of_files(held_out):
            rows = drop_held_out_files(train.files, held_out.files, train.name)
        if isinstance(held_out, ImageStream):
            held_out = _stack(held_out, held_out.all_rows(), config, False, []).source
        held_out_rows = list(range(len(held_out)))
    if not rows:
        raise UserError(
            f"{train.name}: all {len(train)} images are held out: "
            f"add images or lower image.validation_fraction."
        )
    return (
        ImageDataset(train, rows, config, cached=False),
        ImageDataset(held_out, held_out_rows, config, cached=False),
    )


def load_images(
    data: ImagesConfig | PythonImages,
    config: PreprocessingConfig,
    *,
    num_workers: int = 0,
    show_progress: bool = True,
    check: bool = True,
) -> ImageSplits:
    """Find, split and check the images that the configuration names, or take them from Python.

    Args:
        check: decode all images now; without it a broken one is found when it is read, and
            nothing is kept in memory.

    Raises:
        UserError: no images, a broken image, held-out images among the training images, or other
            classes; or the source is a stream.
    """
    train, held_out = split_table(open_source(data, config), config)
    if not check:
        return ImageSplits(train, held_out)
    skip = isinstance(data, ImagesConfig) and data.on_error == "skip"
    kept: list[ImageDataset] = []
    skipped: list[BadImage] = []
    for split in (train, held_out):
        images = ImageDataset(split.source, split.indices, config, shared=num_workers > 0)
        broken = images.check(skip=skip, show_progress=show_progress)
        kept.append(images.without(broken) if broken else images)
        skipped += broken.values()
    if not len(kept[0]):
        raise UserError(
            f"{train.source.name}: none of the {len(train)} training images can be read "
            f"(the first: {skipped[0].reason}): check data.path."
        )
    return ImageSplits(kept[0], kept[1], tuple(skipped))


def held_out_images(
    data: ImagesConfig, config: PreprocessingConfig, *, show_progress: bool = True
) -> ImageDataset:
    """The held-out images of a table, or of a stream (see `_held_out_of_stream`), at hand.

    Raises:
        UserError: see `load_images`.
    """
    sources = open_source(data, config)
    if isinstance(sources.train, ImageStream):
        return _held_out_of_stream(sources, data, config, [])
    return load_images(data, config, show_progress=show_progress).validation


def _held_out_of_stream(
    sources: Sources, data: ImagesConfig, config: PreprocessingConfig, skipped: list[BadImage]
) -> ImageDataset:
    """The stream's explicit held-out set, or the first `MAX_HELD_OUT` images held out by name."""
    train, held_out = sources
    assert isinstance(train, ImageStream)
    skip = data.on_error == "skip"
    if isinstance(held_out, ImageTable):
        images = ImageDataset(held_out, range(len(held_out)), config)
        broken = images.check(skip=skip)
        skipped += broken.values()
        return images.without(broken) if broken else images
    if held_out is not None:
        return _stack(held_out, held_out.all_rows(), config, skip, skipped)
    rows: Iterable[StreamRow] = ()  # where nothing is held out, nothing need be read
    if config.validation_fraction:
        rows = (row for row in train.all_rows() if is_held_out(row.id, config.validation_fraction))
    return _stack(train, islice(rows, MAX_HELD_OUT), config, skip, skipped)


def _stack(
    stream: ImageStream,
    rows: Iterable[StreamRow],
    config: PreprocessingConfig,
    skip: bool,
    skipped: list[BadImage],
) -> ImageDataset:
    """Rows of a stream in memory, at most `HELD_OUT_BYTES` of them."""
    ids: list[str] = []
    pixels: list[np.ndarray] = []
    for row in rows:
        try:
            pixels.append(stream.decode(row, config, no_change))
            ids.append(row.id)
        except BadImage as error:
            if not skip:
                raise
            skipped.append(error)
        if pixels and len(pixels) * pixels[0].nbytes > HELD_OUT_BYTES:
            logger.info("%s: the first %d held-out images are used.", stream.name, len(ids))
            break
    empty = np.zeros((0, config.channels, *config.height_width), np.uint8)
    pictures = PreparedPictures(config, np.stack(pixels) if pixels else empty)
    table = ImageTable(stream.name, ids, pictures.read, pictures.mark, prepared=pictures)
    return ImageDataset(table, range(len(ids)), config)


def stream_facts(sources: Sources, config: PreprocessingConfig) -> dict[str, str]:
    """What a run on a stream is bound to: its shards, and what is held out."""
    train, held_out = sources
    assert isinstance(train, ImageStream)
    content: list[Any] = [config.validation_fraction]
    marks: list[object] = [*train.marks()]
    if isinstance(held_out, ImageTable):
        content = list(held_out.ids)
        marks += [held_out.mark(i) for i in marked(len(held_out))]
    elif held_out is not None:
        content = held_out.lines()
        marks += held_out.marks()
    return image_facts([json.dumps([train.lines(), held_out is None, content])], marks)


@dataclass(frozen=True)
class TrainingImages:
    """What a training of the autoencoder sees."""

    loader: Loader
    """Batches without end."""
    validation: ImageDataset
    shown: ImageDataset
    """Images to draw reconstructions of: held-out ones, if there are any."""
    facts: Mapping[str, str | None]
    """What the run is bound to."""
    summary: str
    skipped: Sequence[BadImage]


def open_training_images(
    data: DataConfig,
    config: PreprocessingConfig,
    batch_size: int,
    *,
    images: PythonImages | None = None,
    on_skipped: Callable[[str, str], None],
    show_progress: bool = True,
    **place: int,
) -> TrainingImages:
    """Images found, split, checked and shuffled; or shards that are read as they come.

    Args:
        images: see `load_images`; instead of what `data.path` names.
        on_skipped: see `StreamedImages`.
        place: `seed`, `num_processes` and `process_index`.

    Raises:
        UserError: see `open_source` and `load_images`.
    """
    sources = open_source(data, config) if images is None else None
    if sources is not None and isinstance(sources.train, ImageStream):
        skipped: list[BadImage] = []
        validation = _held_out_of_stream(sources, data, config, skipped)
        by_name = sources.held_out is None
        loader = StreamedImages(
            sources.train,
            data,
            config,
            batch_size,
            held_out=by_name,
            on_skipped=on_skipped,
            **place,
        )
        summary = f"{len(sources.train)} shards, {len(validation)} images held out"
        facts = stream_facts(sources, config)
        return TrainingImages(loader, validation, validation, facts, summary, skipped)

    splits = load_images(
        data if images is None else images,
        config,
        num_workers=data.num_workers,
        show_progress=show_progress,
    )
    train: Any = splits.train
    if data.augmentation.horizontal_flip or data.augmentation.crop != "off":
        train = AugmentedImages(splits.train, data.augmentation, place["seed"])
    classes = f"{len(splits.class_names) or 'no'} classes"
    return TrainingImages(
        ShuffledLoader(train, batch_size, num_workers=data.num_workers, **place),
        splits.validation,
        splits.validation if len(splits.validation) else splits.train,
        {**splits.facts(), "skipped_hash": splits.skipped_hash()},
        f"{len(splits.train)} training images, {len(splits.validation)} held out, {classes}",
        splits.skipped,
    )
