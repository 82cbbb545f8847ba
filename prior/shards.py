"""One shard of a code dataset: a Parquet file whose rows are images' codes, and what the manifest records of it. Torch-free.

The columns are `id` and `view` (which variant of the image: "original", "flip", ...), `codes_0` ... `codes_L` (one fixed-size list per level
in raster order, the smallest unsigned type that fits) and `label` where there are classes.

Parquet numbers the distinct values of a column and packs the numbers into ceil(log2 K) bits each: uniform codes take that and 0.2 to 3 % more from
about 1000 rows on. Only with many codes on a small grid (K = 8192 on 8 x 8) does the list of distinct values weigh more until there are 8000 rows.
Statistics (the least and the largest value) say nothing of codes and are left out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqvae2.common.config import check, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file, write_json

ORIGINAL = "original"
"""The view that is the image as it is."""
ROW_GROUP_CODES = 1 << 24  # codes that are read at once: a row group of at most 32 MiB of uint16
DICTIONARY_BYTES = 1 << 26  # never given up: without it a code takes a third more


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the manifest says of a shard."""

    name: str
    """File name inside the split's folder."""
    rows: int
    """Number of rows."""
    sha256: str
    """Of the file's bytes: whether it is this file."""
    content_hash: str
    """Of the values in order, whatever the file's compression: whether these are the same codes of the same images."""

    def __post_init__(self) -> None:
        check(
            self.name.endswith(".parquet") and not set(self.name) & set("/\\\0"),
            "name",
            self.name,
            "a file name that ends with .parquet",
        )
        check(self.rows >= 0, "rows", self.rows, "0 or more")


def column_name(level: int) -> str:
    """The column that holds a level's codes."""
    return f"codes_{level}"


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds the codes 0 ... K - 1."""
    return np.min_scalar_type(codebook_size - 1)


def shard_schema(
    codes_per_level: Sequence[int], codebook_sizes: Sequence[int], *, labelled: bool
) -> pa.Schema:
    """The columns of a shard, for `h*w` and K of every level."""
    fields = [pa.field("id", pa.string()), pa.field("view", pa.string())]
    for level, (number, size) in enumerate(zip(codes_per_level, codebook_sizes, strict=True)):
        fields.append(
            pa.field(column_name(level), pa.list_(pa.from_numpy_dtype(smallest_type(size)), number))
        )
    return pa.schema(fields + [pa.field("label", pa.int32())] * labelled)


def write_shard(
    path: Path,
    *,
    ids: Sequence[str],
    codes: Sequence[np.ndarray],
    codebook_sizes: Sequence[int],
    labels: np.ndarray | None = None,
    views: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    note: Path | None = None,
) -> ShardRecord:
    """Write rows as one Parquet file, whole or not at all; the same rows give the same bytes (with the same version of pyarrow).

    Args:
        ids: N names of images.
        codes: `(N, h*w)` integers per level, coarse to fine.
        codebook_sizes: K of every level.
        labels: `(N,)` class labels, if there are classes.
        views: N names of views; without them all are `ORIGINAL`.
        facts: what else the file is to say, in its schema's metadata.
        note: a JSON file to write the record to before the shard appears: what is not noted was not written by this.

    Raises:
        UserError: a code is not in [0, K).
    """
    schema = shard_schema(
        [level.shape[1] for level in codes], codebook_sizes, labelled=labels is not None
    )
    columns = [
        pa.array(ids, pa.string()),
        pa.array(views if views is not None else [ORIGINAL] * len(ids), pa.string()),
    ]
    for level, (values, size) in enumerate(zip(codes, codebook_sizes, strict=True)):
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        check(
            0 <= low <= high < size, column_name(level), (low, high), f"codes from 0 to {size - 1}"
        )
        flat = pa.array(values.astype(smallest_type(size)).reshape(-1))
        columns.append(
            pa.FixedSizeListArray.from_arrays(flat, type=schema.field(column_name(level)).type)
        )
    columns += [pa.array(labels, pa.int32())] if labels is not None else []
    table = pa.Table.from_arrays(columns, schema=schema).replace_schema_metadata(dict(facts or {}))
    packed = [
        "view",
        "label",
        *(f"{column_name(level)}.list.element" for level in range(len(codes))),
    ]
    rows = max(1, ROW_GROUP_CODES // sum(level.shape[1] for level in codes))
    options = {
        "use_dictionary": packed,
        "dictionary_pagesize_limit": DICTIONARY_BYTES,
        "write_statistics": False,
    }
    with whole_file(path) as aside:
        with pq.ParquetWriter(aside, table.schema, compression="zstd", **options) as writer:
            if len(
                table
            ):  # a row group without rows is an error to `datasets`; no row group is none
                writer.write_table(table, row_group_size=rows)
        record = ShardRecord(
            name=path.name,
            rows=len(ids),
            sha256=file_hash(aside),
            content_hash=content_hash([table]),
        )
        if note is not None:
            write_json(note, to_dict(record))
    return record


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(tables: Sequence[pa.Table]) -> str:
    """SHA-256 over the rows of these tables, column after column: names, types and values."""
    digest = hashlib.sha256()
    for name in tables[0].schema.names:
        for table in tables:
            column = table[name].combine_chunks()
            if pa.types.is_string(column.type):
                digest.update("".join(map(json.dumps, column.to_pylist())).encode())
            else:
                digest.update(flat_values(column).tobytes())
        digest.update(f" {name} {column.type.num_fields and column.type.list_size}".encode())
    return digest.hexdigest()


def flat_values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column, `(N * h * w,)` of one with lists and `(N,)` of one without."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return (column.flatten() if pa.types.is_fixed_size_list(column.type) else column).to_numpy()


def check_file(path: Path, record: ShardRecord) -> None:
    """Whether a shard's file is the one that the manifest speaks of, by its bytes: nothing of another file is read.

    Raises:
        UserError: it is not there, or is another.
    """
    what_to_do = "restore it, or remove it and run vqvae2 extract again"
    if not path.is_file():
        raise UserError(f"{path} is not there, but the manifest speaks of it: {what_to_do}.")
    found = file_hash(path)
    if found != record.sha256:
        raise UserError(
            f"{path} was changed: its SHA-256 is {found[:12]}, but the manifest says {record.sha256[:12]}: {what_to_do}."
        )


def row_groups(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a shard, a part that fits into memory at a time.

    Raises:
        UserError: it cannot be read, has other columns than `schema`, or misses values.
    """
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(schema):
                found, due = (
                    ", ".join(f"{f.name}: {f.type}" for f in s) for s in (file.schema_arrow, schema)
                )
                raise UserError(
                    f"{path} has the columns {found}, but {due} are due: remove it and run vqvae2 extract again."
                )
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=columns)
                if any(column.null_count or flat_null_count(column) for column in table.columns):
                    raise UserError(
                        f"{path} misses values: remove it and run vqvae2 extract again."
                    )
                yield table
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is broken ({error}): remove it and run vqvae2 extract again."
        ) from None


def flat_null_count(column: pa.ChunkedArray) -> int:
    """How many numbers inside a column's lists are missing."""
    return (
        sum(chunk.flatten().null_count for chunk in column.chunks)
        if pa.types.is_fixed_size_list(column.type)
        else 0
    )
