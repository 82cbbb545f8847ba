"""From a path, a pattern, a Hub id or Python data to images: a table of rows in any order, or a
stream of shards in order."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ImageColor
from torch.utils.data import ConcatDataset

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.common.files import looks_like_path
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data import splits
from vqvae2.data.decoding import PICTURE_SUFFIXES, readable
from vqvae2.data.open_arrays import PythonImages, open_array_file, open_arrays
from vqvae2.data.open_lists import LISTS, open_list, open_metadata
from vqvae2.data.paths import (
    METADATA,
    PATTERN,
    expand,
    expand_url,
    fault_of,
    files_below,
    find_file,
    is_regular,
    is_used,
    scan,
)
from vqvae2.data.sources import Sources, make_table, numbered
from vqvae2.data.splits import few
from vqvae2.data.stream import (
    NO_LABELS,
    ImageStream,
    StreamRow,
    features_of,
    find_columns,
    named_columns,
    shard_stem,
)
from vqvae2.data.table import ImageTable, ParquetTable, TableColumn, open_parquet

logger = logging.getLogger(__name__)
# Suffixes of files, which no dataset of the Hub ends in.
FILES = PICTURE_SUFFIXES | LISTS | {".npz", ".parquet", ".arrow", ".tar", ".gz"}

KINDS = (
    "a picture, an image folder, a list (.txt, .csv, .tsv, .jsonl), .parquet, .arrow or .tar "
    "files, a .npy or .npz file, or a Hub dataset id"
)
PREPARED, UNFINISHED = "prepared.json", "prepare_config.yaml"  # what vqvae2 prepare leaves
SAVED = ("state.json", "dataset_dict.json")  # what datasets.save_to_disk leaves
MAX_STRAY = 10  # pictures beside shards that are a banner; more are a dataset of their own
MAX_HELD_OUT = 1024  # images of a stream that are held in memory to validate on


def open_source(data: ImagesConfig | PythonImages, config: PreprocessingConfig) -> Sources:
    """Open what the configuration names, or take {"images", "labels"} from Python.

    Raises:
        UserError: no images, or shards of held-out images among the training's.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        what = f"image.background is {config.background!r}"
        raise UserError(f"{what}: give a colour name or #rrggbb.") from None
    if not isinstance(data, ImagesConfig):
        return open_arrays(data, config.channels, "data")
    opened = _open_files(data, config)

    # All images have the vectors that are asked for (those of a stream, when they are read).
    for source in opened if data.condition_column is not None else ():
        if isinstance(source, ImageTable) and source.vectors is None:
            what = f"{source.name} has no condition column {data.condition_column!r}"
            advice = "give a table or a list with it (metadata.jsonl, Parquet, Arrow, .npz)"
            raise UserError(f"{what}: {advice}, or leave --data.condition-column out.")

    # Their places mean the same in both parts.
    train, held_out = opened
    known = train.vectors if isinstance(train, ImageTable) else None
    if known is not None and isinstance(held_out, ImageTable) and held_out.vectors is not None:
        same = held_out.vectors.placed_as(known, held_out.name)
        return Sources(train, replace(held_out, vectors=same))
    return opened


def _open_files(data: ImagesConfig, config: PreprocessingConfig) -> Sources:
    # An explicit held-out set wins over the source's own, and shares no shard with the training
    # images. (Files of one image each are compared where they are split: a link is no mistake.)
    train, held_out = _open(data.path, data, config.channels)
    if data.validation_path is not None:
        path = data.validation_path
        at_once = replace(data, path=path, streaming=data.streaming and _can_stream(path))
        held_out, others = _open(path, at_once, config.channels)
        if others is not None and not (isinstance(others, ImageTable) and not len(others)):
            raise UserError(f"{path} is split itself: name its held-out part alone.")
        for_sure = splits.not_held_out(train.files, held_out.files)
        if not (all(for_sure) or (train.is_of_files and held_out.is_of_files)):
            shared = train.files[for_sure.index(False)]
            raise UserError(f"{shared} is held out, but would be trained on too: keep them apart.")

    if data.label_column == NO_LABELS:
        train, held_out = _without_labels(train), _without_labels(held_out)

    # Beside a table the held-out images are one too, with their classes numbered alike.
    if isinstance(train, ImageTable) and isinstance(held_out, ImageStream):
        held_out = first_rows(held_out, held_out.all_rows())
        if len(held_out) == MAX_HELD_OUT:
            text = "%s: of this stream the first %d images are held out."
            logger.warning(text, held_out.name, MAX_HELD_OUT)
    elif isinstance(held_out, ImageTable):
        held_out = held_out.with_classes_of(train)
    return Sources(train, held_out)


def _refuse_columns(data: ImagesConfig, name: str, what: str) -> None:
    """Raise a `UserError` where columns are named of images that have none."""
    for key, column in named_columns(data).items():
        problem = f"{name} holds {what}, which have no {key} column {column!r}"
        raise UserError(f"{problem}: leave --data.{key}-column out.")


def _can_stream(path: str) -> bool:
    return "://" in path or path.endswith(".parquet")


def _without_labels(table: Any) -> Any:
    is_table = isinstance(table, ImageTable)
    return replace(table, labels=None, class_names=()) if is_table else table


def load_table(data: ImagesConfig, config: PreprocessingConfig) -> ImageTable:
    """All images of a table, held out or not, without their labels.

    Raises:
        UserError: see `open_source`; or the source is a stream.
    """
    opened = open_source(data, config)
    tables = [refuse_stream(table) for table in opened if table is not None]
    ids = [name for table in tables for name in table.ids]
    files = [file for table in tables if table.is_of_files for file in table.files]
    cells: Any = ConcatDataset([table.cells for table in tables])
    return ImageTable(tables[0].name, ids, cells, files=files)


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


def _open(path: str, data: ImagesConfig, channels: int) -> Sources:
    """What one path names, with the source's own split."""
    if len(path) > splits.MAX_NAME:
        raise UserError(f"data.path has {len(path):,} characters: give {KINDS}.")

    # Names that are not local: URLs are streamed; a Hub dataset is downloaded, or streamed.
    local = find_file(Path(os.path.expanduser(path)), {})
    is_pattern = PATTERN.search(path) is not None and not local.exists()
    is_file = looks_like_path(path) or local.suffix.lower() in FILES
    is_hub_id = not (local.exists() or is_pattern or is_file or "://" in path)
    if "://" in path or (is_hub_id and data.streaming):
        url = f"hf://datasets/{path}/**/*.parquet" if is_hub_id else path
        return _open_stream(path, expand_url(url), data)
    if is_hub_id:
        return _open_tables(path, [], data)

    # Folders that a library or an earlier step has written, else shards, else pictures.
    if local.is_dir() and not data.streaming:
        if (local / PREPARED).exists():
            from vqvae2.data.prepared import open_prepared

            _refuse_columns(data, path, "prepared images")
            return open_prepared(local, data.condition_column)
        if any((local / name).exists() for name in SAVED):
            return _open_tables(str(local), [], data, saved=True)
        if (local / UNFINISHED).exists():
            raise UserError(f"{path} holds unfinished prepared images: run vqvae2 prepare again.")
    if local.is_dir():
        files = _find_shards(local, data)
        if not files and not data.streaming:
            return _open_folder(local, data)
    elif is_pattern:
        files = expand(local)
    elif local.is_file():
        files = [local]
    else:
        raise UserError(f"{path} {fault_of(local)}: check data.path ({KINDS}).")

    # Files, by their suffix.
    suffixes = {file.suffix for file in files}
    if data.streaming or suffixes <= {".tar", ".gz"}:
        return _open_stream(path, list(map(str, files)), data)
    if suffixes in ({".parquet"}, {".arrow"}):
        return _open_tables(path, files, data)
    if suffixes <= LISTS and len(files) == 1:
        return open_list(files, files[0].parent, data)
    if suffixes <= {".npy", ".npz"} and len(files) == 1:
        return open_array_file(files[0], channels, data)
    if {suffix.lower() for suffix in suffixes} <= PICTURE_SUFFIXES - {".npy"}:
        folder = os.path.commonpath([file.parent for file in files])
        ids = [file.relative_to(folder).as_posix() for file in files]
        _refuse_columns(data, path, "picture files")
        return make_table(path, ids, files, files=files)
    if suffixes == {".npy"}:
        raise UserError(f"{path} names several .npy files: give their folder, or one stack.")
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
            own = set(by_split[split])
            shards = tuple(url for url in urls if Path(url) in own)
            streams[place] = ImageStream(path, shards, data)
    return Sources(*streams)


def _find_shards(folder: Path, data: ImagesConfig) -> list[Path]:
    """The Parquet, Arrow or tar files of a folder (perhaps in folders of splits).

    Raises UserError: there are such, and pictures beside them."""
    # By kind.
    suffixes = (".parquet", ".arrow", ".tar", ".tar.gz")
    entries = scan(folder, lambda name: name.endswith(suffixes))
    for entry in list(entries):
        if entry.is_dir():
            entries += scan(entry.path, lambda name: name.endswith(suffixes))
    kinds: dict[str, list[Path]] = {}
    for kind in suffixes:
        named = [Path(entry.path) for entry in entries if entry.name.endswith(kind)]
        named = [path for path in sorted(named) if path.name not in METADATA and is_regular(path)]
        kinds |= {kind: named} if named else {}

    # Tables without pictures are notes, where there is something else.
    pictures = islice(files_below(folder), MAX_STRAY + 1) if kinds else ()
    stray = [path for path in pictures if path.name not in METADATA]
    notes: list[Path] = []
    fault = UserError()
    if stray or len(kinds) > 1:
        tables, kept = kinds.pop(".parquet", []), []
        for table in tables:
            try:
                with readable(str(table), "read as Parquet"):
                    features = features_of(open_parquet(table).schema_arrow)
                find_columns(features, str(table), replace(data, label_column=NO_LABELS))
                kept.append(table)
            except UserError as error:
                notes.append(table)
                fault = error
        kinds = ({".parquet": kept} if kept else {}) | kinds
    if notes and not kinds:
        if data.image_column is not None:
            raise fault
        logger.info("%s: %s is not used: %s", folder, notes[0].name, fault)
    if not kinds:
        return []

    # One kind alone is used.
    shards, *others = kinds.values()
    if len(stray) > MAX_STRAY:
        what = f"{folder} holds pictures and {shards[0].relative_to(folder)}"
        raise UserError(f"{what}: move one kind out, or name the files of one by a pattern.")
    for unused in filter(None, (stray, notes, *others)):
        name, beside = unused[0].relative_to(folder), shards[0].name
        logger.info("%s: files beside %s, such as %s, are not used.", folder, beside, name)
    return shards


# Picture files


def _open_folder(root: Path, data: ImagesConfig) -> Sources:
    """Pictures with class folders or without, or with train/ and validation/ or test/ in it."""
    # Are its folders splits? In any case where train is one, and in seg_train/ and seg_test/.
    folders = [entry.name for entry in scan(root) if entry.is_dir()]
    exact = "train" in map(splits.split_of, folders)
    word_of = splits.split_of if exact else splits.loose_split_of
    words = set(map(word_of, folders))
    if len(folders) > 1 and all(map(splits.split_of, folders)) and not exact:
        what = f"{root} holds {few(folders)}, of which none is to be trained on"
        raise UserError(f"{what}: name one as data.path, and another as data.validation_path.")
    if "train" not in words or not (exact or words & {"validation", "test"}):
        inner = _inner_folder(root)
        return _open_pictures(root, data) if inner is None else _open_folder(inner, data)
    if None in words or (not exact and len(words) < len(folders)):
        name = next(name for name in folders if word_of(name) == "train")
        what = f"{root} holds the folders {few(folders)}, of which {name!r} is no class"
        advice = "name it as data.path, and another as data.validation_path"
        raise UserError(f"{what}: {advice}; or rename it, if it is one.")

    # A metadata file beside them names the pictures of all, else each is opened alone.
    beside = [root / name for name in METADATA if (root / name).is_file()]
    if (listed := open_metadata(root, beside, [], data)) is not None:
        return listed
    train, held_out = splits.pick_splits(folders, str(root), word_of)
    table = _open_pictures(root / train, data).train
    return Sources(table, _open_pictures(root / held_out, data).train if held_out else None)


def _inner_folder(root: Path) -> Path | None:
    """The one folder that wraps all others, as archives have it: nothing else is in `root`."""
    outer = scan(root, is_used)
    if len(outer) != 1 or not outer[0].is_dir(follow_symlinks=False):
        return None
    inner = scan(outer[0].path, is_used)
    if not inner or not all(entry.is_dir() for entry in inner):
        return None
    logger.info("%s: its one folder, %s, is opened instead.", root, outer[0].name)
    return root / outer[0].name


def _open_pictures(root: Path, data: ImagesConfig) -> Sources:
    """All pictures below a folder; metadata files, or the first folders, may name classes."""
    # Pictures, and what lists them.
    while (inner := _inner_folder(root)) is not None:
        root = inner
    by_name = {path.relative_to(root).as_posix(): path for path in files_below(root)}
    ids = sorted(name for name, path in by_name.items() if path.name not in METADATA)
    if not ids:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise UserError(f"{root} holds no image ({suffixes}): check the folder.")
    metadata = [path for path in by_name.values() if path.name in METADATA]
    if (listed := open_metadata(root, metadata, ids, data)) is not None:
        return listed

    # Class folders.
    _refuse_columns(data, str(root), "picture files without a list (metadata.csv, ...)")
    loose = [name for name in ids if "/" not in name]
    if loose and len(loose) < len(ids):
        logger.info("%s: no classes, because %s lies in no class folder.", root, loose[0])
    labels = None
    if not loose and data.label_column != NO_LABELS:
        labels = [name.split("/")[0] for name in ids], str(root), None
        numbers = splits.whole_numbers(set(labels[0])) or [1]
        if len(numbers) > 1 and not any(number % 1000 for number in numbers):
            text = "%s: are the folders %s classes? (If not: --data.label-column none.)"
            logger.info(text, root, few(sorted(set(labels[0]))))

    # Splits in the class folders, as in cat/train and cat/test.
    words = [splits.split_of(name.split("/")[1]) for name in ids if name.count("/") > 1]
    split_words = {*words}
    is_split = len(words) == len(ids) and None not in split_words and "train" in split_words
    files = [by_name[name] for name in ids]
    options: Any = {"labels": labels, "row_splits": words if is_split else (), "files": files}
    return make_table(str(root), ids, files, **options)


# Tables


def _open_tables(
    path: str, files: Sequence[Path], data: ImagesConfig, *, saved: bool = False
) -> Sources:
    """Parquet or Arrow files, a folder that `datasets` saved, or (with neither) a Hub dataset."""
    import datasets

    by_split = splits.split_files(files)
    loaded: Any = {}
    what_to_do = "check data.path" + ", and the room in HF_HOME" * (not files)
    with readable(path, "read as a dataset", what_to_do):
        for split, paths in by_split.items():
            if files[0].suffix == ".parquet":
                loaded[split] = ParquetTable(paths)
            else:
                loaded[split] = datasets.concatenate_datasets(list(map(_open_arrow, paths)))
        if not files:
            loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    loaded = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    train, held_out = splits.pick_splits(loaded, path)
    own = saved or bool(files)
    sources = _open_table(path, loaded[train], by_split.get(train, []), data, own)
    if held_out is None:
        return sources
    others = _open_table(path, loaded[held_out], by_split.get(held_out, []), data, own)
    return Sources(sources.train, others.train)


def _open_arrow(file: Path) -> Any:
    """A file as `datasets` writes it, or of Arrow's other format; neither is copied."""
    import datasets
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    if mapped.read(6) == b"ARROW1":
        return datasets.Dataset(pa.ipc.open_file(mapped).read_all())
    return datasets.Dataset.from_file(str(file))


def _open_table(
    path: str, table: Any, files: Sequence[Path], data: ImagesConfig, is_own: bool
) -> Sources:
    """A table of `datasets`, or of Parquet files; `is_own` says that it is no one else's."""
    import datasets

    # Pictures, still encoded.
    if not isinstance(table, ParquetTable):
        table = table.with_format(None)  # it may have been saved as one of tensors
    features = table.features
    image, label = find_columns(features, path, data)
    cells: Any = table
    if isinstance(table, ParquetTable):
        table.column = image
    else:
        if isinstance(features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        files = files or [Path(file["filename"]) for file in table.cache_files]
        folders = [file.parent for file in files[:1]] if is_own else _hub_folders()
        cells = TableColumn(table.select_columns([image]), image, folders)

    # Names: the table's own, else of shard and row, else numbers.
    with readable(path, "read as a dataset"):
        if "id" in features:
            ids = list(table["id"])
            if wrong := [name for name in ids if type(name) not in (str, int)]:
                what = f"{path} has the id {shown(wrong[0])}"
                raise UserError(f"{what}: give each image a name, or rename the column.")
            ids = list(map(str, ids))
        elif isinstance(table, ParquetTable):
            ids = table.ids
        else:
            ids = numbered(len(table))

        # Labels and splits, as their columns' types or their values say.
        labels, row_splits = None, []
        if label is not None:
            kind = features[label]
            names = kind.names if isinstance(kind, datasets.ClassLabel) else None
            labels = (list(table[label]), f"{path}: the column {label!r}", names)
        if "split" in features:
            row_splits = list(table["split"])
            if isinstance(features["split"], datasets.ClassLabel):
                row_splits = features["split"].int2str(row_splits)
        column = data.condition_column
        conditions = list(table[column]) if column else None
    options: Any = {"row_splits": row_splits, "files": files, "conditions": conditions}
    return make_table(path, ids, cells, labels=labels, **options)


def _hub_folders() -> list[Path]:
    """Where pictures from the Hub are kept."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(HF_HUB_CACHE), Path(HF_DATASETS_CACHE)]
