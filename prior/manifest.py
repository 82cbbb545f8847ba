"""The contract between the stages: a folder of Parquet shards with the codes of every image (see
`prior.shards`), and a manifest that says what they mean.

    manifest.json   train/00000.parquet ...   validation/00000.parquet ...
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from torch.utils.data import Dataset

from prior import shards
from prior.config import MOST_LEVELS, check_codes, check_vectors
from prior.shards import REMAKE, ShardRecord, column_name, flat_values
from vqvae2.common.config import added, check, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, read_json, whole_file, write_json, write_text
from vqvae2.common.messages import progress_bar
from vqvae2.common.vocabulary import ORIGINAL, SPLITS

MANIFEST_NAME, README_NAME = "manifest.json", "README.md"
MEMORY_BYTES = 2 << 30  # a split of codes up to this size is held in memory, by every process
README = """---
pretty_name: Codes of images
---
The codes of each level, coarse to fine, are a grid row after row; `manifest.json` has the sizes.
The column `label`, where there are classes, knows their names:

```python
import datasets

codes = datasets.load_dataset("parquet", data_files="train/*.parquet", split="train")
print(codes.features)
```
"""
NOT_CONTENT = ("source", "versions", "codes_hash")  # keys that do not say what the codes are


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the codes of a dataset mean. Written last: a folder without it is unfinished."""

    encoder_hash: str  #: content hash of the encoder that made the codes
    grids: tuple[tuple[int, ...], ...]  #: (h, w) of every level, coarse to fine
    codebook_sizes: tuple[int, ...]  #: K of every level
    class_names: tuple[str, ...]  #: of the classes that labels count, or empty
    rows_hash: str  #: content hash of which images the rows are: names, labels and splits
    preprocessing: Any  #: how the images were prepared (stage 1's business; here for people)
    train: tuple[ShardRecord, ...] = ()  #: the shards of train/, in order
    validation: tuple[ShardRecord, ...] = ()  #: the shards of validation/, in order
    views: tuple[str, ...] = (ORIGINAL,)  #: each training image has a row of each
    source: str = ""  #: where the images came from
    versions: Any = field(default_factory=dict)  #: of the packages that wrote it
    codes_hash: str = ""  #: content hash of all but `NOT_CONTENT` and file bytes; priors store it
    vector_size: int = added(0)  #: length V of the vectors that images are conditioned on; 0: none
    vector_names: tuple[str, ...] = added(())  #: of attributes, what the V places stand for

    def __post_init__(self) -> None:
        grids, sizes = self.grids, self.codebook_sizes
        check(len(grids) == len(sizes) >= 1, "grids", grids, "one (h, w) per level")
        check(len(grids) <= MOST_LEVELS, "grids", grids, f"of at most {MOST_LEVELS} levels")
        check_codes(self)
        check_vectors(self)
        check(isinstance(self.versions, dict), "versions", self.versions, "a mapping")
        fits = self.preprocessing is None or self.values_per_image > 0
        allowed = "null, or a mapping with the channels and the size of an image"
        check(fits, "preprocessing", self.preprocessing, allowed)
        for split in SPLITS:
            names = [shard.name for shard in self.shards(split)]
            check(len(set(names)) == len(names), split, names, "a list of shards without repeats")

    @property
    def values_per_image(self) -> int:
        """Channels x height x width of an image, 0 if `preprocessing` does not say so."""
        image = self.preprocessing if isinstance(self.preprocessing, dict) else {}
        size = image.get("size")
        numbers = [image.get("channels"), *(size if isinstance(size, list) else [])]
        if len(numbers) not in (2, 3) or any(type(number) is not int for number in numbers):
            return 0
        return numbers[0] * numbers[1] * numbers[-1]

    @property
    def other_views(self) -> tuple[str, ...]:
        """What priors can be told of training rows: the views besides the original, in order; none
        where no rows are original, for then that view, which is sampled, would not be learned."""
        return tuple(v for v in self.views if v != ORIGINAL) if ORIGINAL in self.views else ()

    def shards(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of "train" or "validation", in order."""
        return self.train if split == "train" else self.validation

    @property
    def all_shards(self) -> list[tuple[str, ShardRecord]]:
        """(split, record) of every shard."""
        return [(split, shard) for split in SPLITS for shard in self.shards(split)]

    def num_rows(self, split: str) -> int:
        """Rows of "train" or "validation"."""
        return sum(shard.rows for shard in self.shards(split))

    @property
    def num_train(self) -> int:
        """Rows in train/."""
        return self.num_rows("train")

    @property
    def num_validation(self) -> int:
        """Rows in validation/."""
        return self.num_rows("validation")

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.grids)

    @property
    def schema(self) -> pa.Schema:
        """The columns of every shard."""
        grid_sizes = [math.prod(grid) for grid in self.grids]
        labelled, size = bool(self.class_names), self.vector_size
        sizes = self.codebook_sizes
        return shards.shard_schema(grid_sizes, sizes, labelled=labelled, vector_size=size)

    def content_hash(self) -> str:
        """What `codes_hash` must be."""
        content = {key: value for key, value in to_dict(self).items() if key not in NOT_CONTENT}
        for split in SPLITS:
            content[split] = [[shard.rows, shard.content_hash] for shard in self.shards(split)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a README.md for people, then the manifest with its `codes_hash`: the last file, which
    finishes the dataset."""
    write_text(folder / README_NAME, README)
    write_json(folder / MANIFEST_NAME, {**to_dict(manifest), "codes_hash": manifest.content_hash()})


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a code dataset; a `UserError` if it is absent, broken or edited."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():
        reason = "is not a finished code dataset" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {reason}: make the code dataset with vqvae2 extract.")
    manifest = from_dict(Manifest, read_json(path), str(path))
    recorded, actual = manifest.codes_hash, manifest.content_hash()
    if recorded != actual:
        seen = f"it says codes_hash {recorded[:12]}, but its content has {actual[:12]}"
        raise UserError(f"{path} was edited: {seen}: restore it, or {REMAKE}.")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether the manifest and every shard that it names are there, as they were written; raises
    as `read_manifest`."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    records = read_manifest(folder).all_shards
    paths = {folder / split / shard.name: shard.sha256 for split, shard in records}
    return all(path.is_file() and file_hash(path) == paths[path] for path in paths)


def parse_level(level: str, num_levels: int) -> int:
    """'top', 'bottom' or a number, as a level's number; a `UserError` if there is no such level."""
    names = {"top": 0, "bottom": num_levels - 1, **{str(i): i for i in range(num_levels)}}
    allowed = f"top, bottom, or a number from 0 to {num_levels - 1}"
    check(level in names, "level", level, allowed)
    return names[level]


class CodeDataset(Dataset):
    """One split of a code dataset ("train" or "validation"), as batches {"codes": one `(B, h, w)`
    int64 per level, "labels": `(B,)` int64 if there are classes, "vectors": `(B, V)` float32 if
    there are conditions, "views": `(B,)` int64 if training rows are of several, 0 for the original
    and 1 + the place in `Manifest.other_views`}: all levels, or `num_levels` from the top.
    Arguments and errors are those of `load_columns`. A `DataLoader` needs `collate_fn=dict`, as
    batches come whole."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        split: str,
        *,
        num_levels: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.manifest, number = manifest, num_levels or manifest.num_levels
        check(split in SPLITS, "split", split, " or ".join(map(repr, SPLITS)))
        columns = load_columns(Path(folder), manifest, split, number, cache_dir)
        self.codes = [columns[column_name(level)] for level in range(number)]
        self.labels, self.vectors = columns.get("label"), columns.get("vector")
        self.views = columns.get("view")

    def __len__(self) -> int:
        return len(self.codes[0])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = np.asarray(indices, np.int64)
        codes = []
        for level, (height, _) in zip(self.codes, self.manifest.grids, strict=False):
            rows = torch.from_numpy(level[chosen].astype(np.int64))
            codes.append(rearrange(rows, "b (h w) -> b h w", h=height))
        batch: dict[str, Any] = {"codes": codes}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[chosen].astype(np.int64))
        if self.vectors is not None:
            batch["vectors"] = torch.from_numpy(self.vectors[chosen])
        if self.views is not None:
            batch["views"] = torch.from_numpy(self.views[chosen].astype(np.int64))
        return batch

    def counts(self, level: int, *, step: int = 1) -> np.ndarray:
        """How often each code of a level occurs, in every row or in each `step`-th: `(K,)`."""
        counts = np.zeros(self.manifest.codebook_sizes[level], np.int64)
        for first in range(0, len(self), 4096 * step):  # counting needs rows as int64
            rows = self.codes[level][first : first + 4096 * step : step]
            counts += np.bincount(rows.reshape(-1), minlength=len(counts))
        return counts

    def unigram_bits(self, level: int, train: "CodeDataset") -> float:
        """What a code of a level costs here by frequency alone, in bits: by its count in the
        training rows (200,000 are enough), plus one so that none is impossible."""
        step = 1 + len(train) // 200_000
        counts, known = self.counts(level), train.counts(level, step=step) + 1
        return float(np.average(-np.log2(known / known.sum()), weights=counts))


def load_columns(
    folder: Path, manifest: Manifest, split: str, num_levels: int, cache_dir: Path | None = None
) -> dict[str, np.ndarray]:
    """Columns of a split, in the types that shards have: `(N, h*w)` codes, `(N,)` labels,
    `(N, V)` condition vectors, `(N,)` numbers of views in training rows, if there are several.

    They are in memory if they take at most `MEMORY_BYTES`, else decoded once into mapped files in
    `cache_dir` (or .decoded beside the shards), by content hash; remove them when nothing trains.
    Raises as `read_shard`, and a `UserError` if the disk has no room, or a file is broken.
    """
    # The shape and type of every column.
    rows = manifest.num_rows(split)
    layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for level in range(num_levels):
        kind = shards.smallest_type(manifest.codebook_sizes[level])
        layout[column_name(level)] = ((rows, math.prod(manifest.grids[level])), kind)
    if manifest.class_names:
        layout["label"] = ((rows,), np.dtype(np.int32))
    if manifest.vector_size:
        layout["vector"] = ((rows, manifest.vector_size), np.dtype(np.float32))
    if manifest.other_views and split == "train":
        layout["view"] = ((rows,), shards.smallest_type(1 + len(manifest.other_views)))
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in layout.items()}
    if sum(sizes.values()) <= MEMORY_BYTES:
        columns = {name: np.empty(shape, kind) for name, (shape, kind) in layout.items()}
        _decode(folder, manifest, split, columns)
        return columns

    # Running out of space while writing to a mapped file would kill the process.
    target = (cache_dir or folder / ".decoded") / manifest.codes_hash[:32] / split
    missing = [name for name in layout if not (target / f"{name}.npy").exists()]
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(".*.partial"):  # by a run that was killed, if it is older than a day
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(target).free
    if needed > free:
        seen = f"{needed / 2**30:.1f} GiB for codes, but its disk has {free / 2**30:.1f} GiB"
        raise UserError(f"{target} needs {seen}: set another codes_cache.")

    # All missing columns in one pass over the shards, whole or not at all.
    with ExitStack() as files:
        arrays: dict[str, Any] = {}
        for name in missing:
            shape, kind = layout[name]
            path = files.enter_context(whole_file(target / f"{name}.npy"))
            arrays[name] = np.lib.format.open_memmap(path, "w+", kind, shape)
        _decode(folder, manifest, split, arrays)
        for name, array in arrays.items():
            array.flush()
            time_ns = Path(array.filename).stat().st_mtime_ns
            note = {"sha256": file_hash(array.filename), "modified": time_ns}
            write_json(target / f"{name}.json", note)
    return {name: _map(target / f"{name}.npy", *layout[name]) for name in layout}


def _map(path: Path, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    note = path.with_suffix(".json")
    try:
        # Hashing terabytes takes an hour: not if nobody has written to the file since it was made.
        said = read_json(note) if note.exists() else {}
        was_written = said and said.get("modified") != path.stat().st_mtime_ns
        if was_written and said.get("sha256") != file_hash(path):
            raise ValueError("its bytes were changed")
        array = np.load(path, mmap_mode="r")
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"it holds {array.shape} {array.dtype}, not {shape} {kind}")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}): remove it, and it is made again.") from None
    return np.asarray(array)  # without the class memmap, which is slower to index


def _decode(folder: Path, manifest: Manifest, split: str, columns: dict[str, np.ndarray]) -> None:
    """Read columns of a split's shards into arrays, one entry per row; nothing for no columns."""
    first, records = 0, manifest.shards(split) if columns else ()
    for shard in progress_bar(
        records, f"reading {split} codes", unit="shard", delay=3, leave=False
    ):
        for table in read_shard(folder, manifest, split, shard, list(columns)):
            end = first + len(table)
            for name, array in columns.items():
                if name == "view":
                    values = _view_numbers(folder / split / shard.name, manifest, table[name])
                else:
                    values = flat_values(table[name])
                array[first:end] = values.reshape(len(table), *array.shape[1:])
            first = end


def _view_numbers(path: Path, manifest: Manifest, column: pa.ChunkedArray) -> np.ndarray:
    """0 for each row of the original, 1 + the place in `other_views` for each of another view.
    Raises a `UserError` for a view that the manifest does not name."""
    encoded, order = column.combine_chunks().dictionary_encode(), (ORIGINAL, *manifest.other_views)
    names = encoded.dictionary.to_pylist()
    if unknown := sorted(set(names) - set(order)):
        shown = ", ".join(order)
        raise UserError(f"{path} holds rows of the view {unknown[0]!r}, not {shown}: {REMAKE}.")
    return np.array([order.index(name) for name in names])[flat_values(encoded.indices)]


def read_shard(
    folder: Path, manifest: Manifest, split: str, shard: ShardRecord, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Columns of a shard, as tables that fit into memory, each checked before it is yielded: a
    `UserError` if the shard is missing, broken or not the manifest's, or a number out of range."""
    path, rows = folder / split / shard.name, 0
    shards.check_file(path, shard)
    for table in shards.row_groups(path, manifest.schema, columns):
        rows += len(table)
        if rows <= shard.rows:
            for name in columns:
                check_range(path, manifest, name, table[name])
            yield table
    if rows != shard.rows:
        raise UserError(f"{path} holds {rows} rows, but the manifest says {shard.rows}: {REMAKE}.")


def read_rows(folder: Path, manifest: Manifest, split: str, rows: Sequence[int]) -> pa.Table:
    """All columns of a few rows, in the order asked for; reads only the shards that hold them.
    Raises a `UserError` for a row that does not exist, and as `read_shard`."""
    number, first = manifest.num_rows(split), 0
    for row in rows:
        allowed = f"from 0 to {number - 1}, the rows of {folder / split}"
        check(0 <= row < number, "rows", row, allowed)
    by_row: dict[int, pa.Table] = {}
    for shard in manifest.shards(split):
        here = {row for row in rows if first <= row < first + shard.rows}
        if here:
            tables = read_shard(folder, manifest, split, shard, manifest.schema.names)
            table = pa.concat_tables(tables)
            by_row |= {row: table.take([row - first]) for row in here}
        first += shard.rows
    return pa.concat_tables([manifest.schema.empty_table(), *(by_row[row] for row in rows)])


def check_range(path: Path, manifest: Manifest, column: str, numbers: pa.ChunkedArray) -> None:
    """Raise a `UserError` if a column of codes or labels holds a number out of range, or one of
    vectors a number that is not finite."""
    if column == "vector" and not np.isfinite(flat_values(numbers)).all():
        raise UserError(f"{path}: {column} holds numbers that are not finite: {REMAKE}.")
    sizes = {column_name(level): (k, "codes") for level, k in enumerate(manifest.codebook_sizes)}
    sizes["label"] = (len(manifest.class_names), "classes")
    if column not in sizes or not len(numbers):
        return
    values, (size, what) = flat_values(numbers), sizes[column]
    low, high = int(values.min()), int(values.max())
    if not 0 <= low <= high < size:
        reach = f"{column} ranges from {low} to {high}, but there are {size} {what}"
        raise UserError(f"{path}: {reach}: {REMAKE}.")
