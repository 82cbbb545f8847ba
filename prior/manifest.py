"""The contract between the stages: a folder of Parquet shards with the codes of every image, and a manifest that says what they mean.

    manifest.json   train/00000.parquet ...   validation/00000.parquet ...

A row is a view of an image; `prior.shards` says what a shard holds.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from prior.shards import (
    ORIGINAL,
    ShardRecord,
    check_file,
    column_name,
    flat_values,
    row_groups,
    shard_schema,
)
from vqvae2.common.config import check, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, whole_file, write_json

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
MEMORY_BYTES = 2 << 30  # a split of codes up to this size is held in memory, by every process
NOT_CONTENT = (
    "source",
    "versions",
    "codes_hash",
)  # keys of the manifest that say where the codes come from, not what they are


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the codes of a dataset mean. Written last: a folder without it is unfinished."""

    encoder_hash: str
    """Content hash of the encoder that made the codes."""
    grids: tuple[tuple[int, ...], ...]
    """`(h, w)` of every level, coarse to fine."""
    codebook_sizes: tuple[int, ...]
    """K of every level."""
    class_names: tuple[str, ...]
    """Names of the classes that labels count, or empty."""
    rows_hash: str
    """Content hash of which images the rows are: names, labels, splits."""
    preprocessing: Any
    """How the images were prepared (stage 1's business; here for people)."""
    train: tuple[ShardRecord, ...] = ()
    """The shards of train/, in order."""
    validation: tuple[ShardRecord, ...] = ()
    """The shards of validation/, in order."""
    views: tuple[str, ...] = (ORIGINAL,)
    """The views that each image has a row of."""
    source: str = ""
    """Where the images came from."""
    versions: Any = field(default_factory=dict)
    """What wrote it: package -> version."""
    codes_hash: str = ""
    """Content hash of all of this (but for source, versions and the files' bytes) and of all rows. Priors remember it."""

    def __post_init__(self) -> None:
        check(
            len(self.grids) == len(self.codebook_sizes) >= 1,
            "grids",
            self.grids,
            "one (h, w) per level",
        )
        check(
            all(len(grid) == 2 and 1 <= min(grid) <= max(grid) <= 4096 for grid in self.grids),
            "grids",
            self.grids,
            "(h, w) from 1 to 4096 per level",
        )
        check(
            all(1 <= size <= 1 << 24 for size in self.codebook_sizes),
            "codebook_sizes",
            self.codebook_sizes,
            "from 1 to 2^24",
        )
        check(isinstance(self.versions, dict), "versions", self.versions, "a mapping")
        for split in SPLITS:
            names = [shard.name for shard in self.shards(split)]
            check(len(set(names)) == len(names), split, names, "a list of shards without repeats")

    def shards(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of "train" or "validation", in order."""
        return self.train if split == "train" else self.validation

    @property
    def num_train(self) -> int:
        """Rows in train/."""
        return sum(shard.rows for shard in self.train)

    @property
    def num_validation(self) -> int:
        """Rows in validation/."""
        return sum(shard.rows for shard in self.validation)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.grids)

    @property
    def values_per_image(self) -> int:
        """Channels times height times width of the images that the codes were made of."""
        size = self.preprocessing["size"]
        return self.preprocessing["channels"] * size[0] * size[-1]

    @property
    def schema(self) -> pa.Schema:
        """The columns of every shard."""
        return shard_schema(
            [math.prod(grid) for grid in self.grids],
            self.codebook_sizes,
            labelled=bool(self.class_names),
        )

    def content_hash(self) -> str:
        """What `codes_hash` must be."""
        content = {key: value for key, value in to_dict(self).items() if key not in NOT_CONTENT}
        for split in SPLITS:
            content[split] = [[shard.rows, shard.content_hash] for shard in self.shards(split)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a code dataset, with its `codes_hash`: the last file, which makes the folder a finished dataset."""
    write_json(folder / MANIFEST_NAME, {**to_dict(manifest), "codes_hash": manifest.content_hash()})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a code dataset.

    Raises:
        UserError: there is none, it is broken, or it was edited.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: make the code dataset with vqvae2 extract.")
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(
            f"{folder} has no {MANIFEST_NAME}: it is no finished code dataset; run vqvae2 extract (again)."
        )
    manifest = from_dict(Manifest, read_json(path), str(path))
    if manifest.codes_hash != manifest.content_hash():
        raise UserError(
            f"{path} was edited: it says codes_hash {manifest.codes_hash[:12]}, but what it says of the codes has {manifest.content_hash()[:12]}: "
            f"restore it, or remove it and run vqvae2 extract again."
        )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether the manifest and every shard that it speaks of are there.

    Raises:
        UserError: the manifest is broken, or was edited.
    """
    if not (folder / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(folder)
    return all(
        (folder / split / shard.name).exists()
        for split in SPLITS
        for shard in manifest.shards(split)
    )


def parse_level(level: str, num_levels: int) -> int:
    """'top', 'bottom' or a number, as a level's number.

    Raises:
        UserError: no such level.
    """
    number = {"top": 0, "bottom": num_levels - 1}.get(
        level, int(level) if level.isdecimal() else -1
    )
    check(
        0 <= number < num_levels,
        "level",
        level,
        f"top, bottom, or a number from 0 to {num_levels - 1}",
    )
    return number


class CodeDataset(Dataset):
    """One split of a code dataset up to some level, as batches {"codes": one (B, h, w) int64 per level, "labels": (B,) int64 if there are labels}.

    Codes and labels are kept in the type that they are stored in: in memory if they take at most `MEMORY_BYTES`, else decoded once into files
    that are mapped into memory (see `decode_to_disk`). Either way any row is at hand, so that a loader's order is all that a resumed run needs.

    Args:
        split: "train" or "validation".
        num_levels: levels from the top on; all of them if not given.
        cache_dir: where codes too large for the memory are decoded to; `.decoded` in the dataset's folder if not given.

    Raises:
        UserError: a shard is missing, broken or another than the manifest says, or holds codes outside of the codebook.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        *,
        num_levels: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.num_levels = num_levels or manifest.num_levels
        names = column_names(manifest, self.num_levels)
        if fits_in_memory(manifest, split, names):
            columns = {name: np.empty(*shape_and_type(manifest, split, name)) for name in names}
            decode(folder, manifest, split, columns)
        else:
            columns = decode_to_disk(folder, manifest, split, names, cache_dir)
        self.codes = [columns[column_name(level)] for level in range(self.num_levels)]
        self.labels = columns.get("label")
        self._counts: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.codes[0])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = np.asarray(indices, np.int64)
        grids = zip(self.codes, self.manifest.grids, strict=False)
        batch: dict[str, Any] = {
            "codes": [
                torch.from_numpy(
                    rearrange(codes[chosen].astype(np.int64), "b (h w) -> b h w", h=height)
                )
                for codes, (height, _) in grids
            ]
        }
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[chosen].astype(np.int64))
        return batch

    def counts(self, level: int) -> np.ndarray:
        """How often each code of a level occurs: `(K,)`."""
        if level not in self._counts:
            size = self.manifest.codebook_sizes[level]
            parts = [
                self.codes[level][first : first + 4096] for first in range(0, len(self), 4096)
            ]  # a few rows at a time: counting takes int64
            self._counts[level] = sum(
                (np.bincount(part.reshape(-1), minlength=size) for part in parts),
                start=np.zeros(size, np.int64),
            )
        return self._counts[level]

    def unigram_bits(self, level: int) -> float:
        """Entropy in bits of a level's code frequencies: what a code costs when each is coded alone, knowing the frequencies."""
        counts = torch.from_numpy(self.counts(level)).double()
        return torch.special.entr(counts / counts.sum()).sum().item() / math.log(2)


def column_names(manifest: Manifest, num_levels: int) -> list[str]:
    """The columns that a prior of the last of these levels reads."""
    return [column_name(level) for level in range(num_levels)] + ["label"] * bool(
        manifest.class_names
    )


def shape_and_type(manifest: Manifest, split: str, column: str) -> tuple[tuple[int, ...], np.dtype]:
    """What an array that holds a column of a split is: `(N, h*w)` for codes, `(N,)` for labels."""
    rows = sum(shard.rows for shard in manifest.shards(split))
    kind = manifest.schema.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return (rows, kind.list_size), kind.value_type.to_pandas_dtype()
    return (rows,), kind.to_pandas_dtype()


def fits_in_memory(manifest: Manifest, split: str, columns: Sequence[str]) -> bool:
    """Whether these columns of a split are read into memory."""
    return _num_bytes(manifest, split, columns) <= MEMORY_BYTES


def _num_bytes(manifest: Manifest, split: str, columns: Sequence[str]) -> int:
    described = [shape_and_type(manifest, split, column) for column in columns]
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in described)


def decode_to_disk(
    folder: Path,
    manifest: Manifest,
    split: str,
    columns: Sequence[str],
    cache_dir: Path | None = None,
) -> dict[str, np.ndarray]:
    """These columns of a split as arrays that are mapped from files; a file that is not there yet is made, whole or not at all.

    The files bear the dataset's content hash, so they are never those of other codes. They may be removed when nothing trains on them.

    Raises:
        UserError: see `decode`; the disk has no room, or a file is broken.
    """
    target = (cache_dir or folder / ".decoded") / manifest.codes_hash[:32] / split
    paths = {name: target / f"{name}.npy" for name in columns}
    missing = [name for name in columns if not paths[name].exists()]
    if missing:
        target.mkdir(parents=True, exist_ok=True)
        needed, free = _num_bytes(manifest, split, missing), shutil.disk_usage(target).free
        if (
            needed > free
        ):  # running out of space while writing to a mapped file would kill the process
            raise UserError(
                f"{target} needs {needed / 2**30:.1f} GiB for decoded codes, but its disk has {free / 2**30:.1f} GiB: set another codes_cache."
            )
        with ExitStack() as stack:
            arrays = {}
            for name in missing:
                shape, kind = shape_and_type(manifest, split, name)
                arrays[name] = np.lib.format.open_memmap(
                    stack.enter_context(whole_file(paths[name])), mode="w+", dtype=kind, shape=shape
                )
            decode(folder, manifest, split, arrays)
            for array in arrays.values():
                array.flush()
    return {
        name: _map(path, *shape_and_type(manifest, split, name)) for name, path in paths.items()
    }


def _map(path: Path, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}): remove it, and it is made again.") from None
    if array.shape != shape or array.dtype != kind:
        raise UserError(
            f"{path} is broken (it holds {array.shape} {array.dtype}, not {shape} {np.dtype(kind)}): remove it, and it is made again."
        )
    return np.asarray(array)  # without the class memmap, which is slower to index


def decode(folder: Path, manifest: Manifest, split: str, columns: Mapping[str, np.ndarray]) -> None:
    """Read these columns of a split's shards into arrays of one row per row.

    Raises:
        UserError: see `read_shard`.
    """
    first = 0
    for shard in tqdm(
        manifest.shards(split), desc=f"reading {split} codes", unit="shard", delay=3, leave=False
    ):
        for table in read_shard(folder, manifest, split, shard, list(columns)):
            for name, array in columns.items():
                array[first : first + len(table)] = flat_values(table[name]).reshape(
                    len(table), *array.shape[1:]
                )
            first += len(table)


def read_shard(
    folder: Path, manifest: Manifest, split: str, shard: ShardRecord, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """These columns of a shard, a part that fits into memory at a time, checked as they come.

    Raises:
        UserError: the shard is missing, broken or another than the manifest says, or holds numbers out of their range.
    """
    path, rows = folder / split / shard.name, 0
    check_file(path, shard)
    for table in row_groups(path, manifest.schema, columns):
        rows += len(table)
        if rows <= shard.rows:
            for name in columns:
                check_range(path, manifest, name, table[name])
            yield table
    if rows != shard.rows:
        raise UserError(
            f"{path} holds {rows} rows, but the manifest says {shard.rows}: remove it and run vqvae2 extract again."
        )


def read_rows(folder: Path, manifest: Manifest, split: str, rows: Sequence[int]) -> pa.Table:
    """All columns of a few rows, in the order asked for; only the shards that hold them are read.

    Raises:
        UserError: there is no such row; or see `read_shard`.
    """
    number = sum(shard.rows for shard in manifest.shards(split))
    for row in rows:
        check(
            0 <= row < number, "rows", row, f"from 0 to {number - 1}, the rows of {folder / split}"
        )
    found: dict[int, pa.Table] = {}
    first = 0
    for shard in manifest.shards(split):
        here = sorted({row for row in rows if first <= row < first + shard.rows})
        if here:
            table = pa.concat_tables(
                read_shard(folder, manifest, split, shard, manifest.schema.names)
            )
            found |= {row: table.slice(row - first, 1) for row in here}
        first += shard.rows
    return pa.concat_tables([manifest.schema.empty_table(), *(found[row] for row in rows)])


def check_range(path: Path, manifest: Manifest, column: str, numbers: pa.ChunkedArray) -> None:
    """Whether the numbers of a column of codes or labels are in their range; other columns pass.

    Raises:
        UserError: naming the file, the column and what was found.
    """
    if column == "label":
        size, of = len(manifest.class_names), f"{len(manifest.class_names)} classes"
    elif column.startswith("codes_"):
        size = manifest.codebook_sizes[int(column.removeprefix("codes_"))]
        of = f"{size} codes"
    else:
        return
    values = flat_values(numbers)
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
        raise UserError(
            f"{path}: {column} reaches from {values.min()} to {values.max()}, but there are {of}: remove the file and run vqvae2 extract again."
        )
