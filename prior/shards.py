"""One shard of a code dataset: a Parquet file of images' codes, and its record. Torch-free.

The columns are `id`, `view` (which variant of the image: "original", "flip", ...), `codes_0` ...
`codes_L` (one fixed-size list per level in raster order, the smallest unsigned type that fits) and
`label` where there are classes, whose names are in the metadata as `datasets` keeps them, and
`vector`, a fixed-size list of floats, where images have conditions.

Parquet packs codes into ceil(log2 K) bits each: from 1000 to 8000 rows on, 0.2 to 3 % more.
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
from vqvae2.common.files import file_hash, whole_file, write_json
from vqvae2.common.vocabulary import ORIGINAL

ROW_GROUP_CODES = 1 << 24  # codes read at once: a row group of at most 32 MiB of uint16
DICTIONARY_BYTES = 1 << 26  # large enough for every column: without it a code takes a third more
REMAKE = "remove it and run vqvae2 extract again"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the manifest says about a shard."""

    name: str  #: of the file inside the split's folder
    rows: int
    sha256: str  #: of the file's bytes: whether it is this file
    content_hash: str  #: of the rows in order, however compressed: whether these are the same rows

    def __post_init__(self) -> None:
        is_name = self.name.endswith(".parquet") and not set(self.name) & set("/\\\0")
        check(is_name, "name", self.name, "a file name that ends with .parquet")
        check(self.rows >= 0, "rows", self.rows, "0 or more")


def column_name(level: int) -> str:
    """The column that holds a level's codes."""
    return f"codes_{level}"


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds the codes 0 ... K - 1."""
    return np.min_scalar_type(codebook_size - 1)


def shard_schema(
    codes_per_level: Sequence[int],
    codebook_sizes: Sequence[int],
    *,
    labelled: bool,
    vector_size: int = 0,
) -> pa.Schema:
    """The columns of a shard, for `h*w` and K of every level, and the vectors' length, if any."""
    fields = [pa.field("id", pa.string()), pa.field("view", pa.string())]
    for level, (number, size) in enumerate(zip(codes_per_level, codebook_sizes, strict=True)):
        kind = pa.from_numpy_dtype(smallest_type(size))
        fields.append(pa.field(column_name(level), pa.list_(kind, number)))
    if labelled:
        fields.append(pa.field("label", pa.int64()))
    if vector_size:
        fields.append(pa.field("vector", pa.list_(pa.float32(), vector_size)))
    return pa.schema(fields)


def write_shard(
    path: Path,
    *,
    ids: Sequence[str],
    codes: Sequence[np.ndarray],
    codebook_sizes: Sequence[int],
    labels: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    views: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    note: Path | None = None,
) -> ShardRecord:
    """Write one Parquet file, whole or not at all; equal rows and pyarrow give equal bytes.

    Args:
        ids: N names of images, and `views` N names of views (all `ORIGINAL` if not given).
        codes: `(N, h*w)` integers per level, coarse to fine; their K are `codebook_sizes`.
        labels: `(N,)` class labels, if there are classes; `class_names` of these, where known.
        vectors: `(N, V)` floats that images are conditioned on, if there are any.
        facts: extra metadata for the file's schema.
        note: a JSON file that receives the record before the shard appears, so that a shard
            without a note was not written by this function.

    Raises a `UserError` if a code is not in [0, K).
    """
    # The table.
    grid_sizes = [level.shape[1] for level in codes]
    size = vectors.shape[1] if vectors is not None else 0
    has_labels = labels is not None
    schema = shard_schema(grid_sizes, codebook_sizes, labelled=has_labels, vector_size=size)
    views = [ORIGINAL] * len(ids) if views is None else views
    columns = [_strings(ids), _strings(views)]
    for level, (values, size) in enumerate(zip(codes, codebook_sizes, strict=True)):
        name, low, high = column_name(level), int(values.min(initial=0)), int(values.max(initial=0))
        check(0 <= low <= high < size, name, (low, high), f"codes from 0 to {size - 1}")
        flat = _numbers(values.astype(smallest_type(size)).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type))
    if labels is not None:
        columns.append(_numbers(labels.astype(np.int64)))
    if vectors is not None:
        flat = _numbers(vectors.astype(np.float32).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type))
    metadata = dict(facts or {})
    if class_names:
        label = {"names": list(class_names), "_type": "ClassLabel"}
        metadata["huggingface"] = json.dumps({"info": {"features": {"label": label}}})
    table = pa.Table.from_arrays(columns, schema=schema).replace_schema_metadata(metadata)

    # The file and its record. `datasets` cannot read a row group without rows: none is written.
    packed = ["view", "label"] + [f"{column_name(i)}.list.element" for i in range(len(codes))]
    options: dict = {"dictionary_pagesize_limit": DICTIONARY_BYTES, "write_statistics": False}
    options |= {"use_dictionary": packed, "compression": "zstd"}
    with whole_file(path) as aside:
        with pq.ParquetWriter(aside, table.schema, **options) as writer:
            if len(table):
                rows = max(1, ROW_GROUP_CODES // sum(grid_sizes))
                writer.write_table(table, row_group_size=rows)
        hashes = {"sha256": file_hash(aside), "content_hash": content_hash([table])}
        record = ShardRecord(name=path.name, rows=len(ids), **hashes)
        if note is not None:
            write_json(note, to_dict(record))
    return record


# Arrow arrays without `pa.array`, which imports pandas (0.5 s).


def _numbers(values: np.ndarray) -> pa.Array:
    kind, content = pa.from_numpy_dtype(values.dtype), np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(content)])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def content_hash(tables: Sequence[pa.Table]) -> str:
    """SHA-256 over the rows of these tables, column after column: names, types and values."""
    digest = hashlib.sha256()
    for name in tables[0].schema.names:
        for table in tables:
            column = table[name].combine_chunks()
            if name == "label":  # 32 bits, as they once were stored
                column = column.cast(pa.int32(), safe=False)
            if pa.types.is_string(column.type):
                digest.update("".join(map(json.dumps, column.to_pylist())).encode())
            else:
                digest.update(flat_values(column).tobytes())
        digest.update(f" {name} {column.type.num_fields and column.type.list_size}".encode())
    return digest.hexdigest()


def flat_values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column: `(N * h * w,)` of one with lists, `(N,)` of one without."""
    return np.from_dlpack(_flat(column))  # to_numpy would import pandas


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten() if pa.types.is_fixed_size_list(column.type) else column


def check_file(path: Path, record: ShardRecord) -> None:
    """Raise a `UserError` if a shard is missing or its bytes are not those of its record; to be
    called before any of it is parsed."""
    if not path.is_file():
        raise UserError(f"{path} is not there, but is in the manifest: run vqvae2 extract again.")
    actual = file_hash(path)
    if actual != record.sha256:
        seen = f"its SHA-256 is {actual[:12]}, but the manifest says {record.sha256[:12]}"
        raise UserError(f"{path} was changed: {seen}: restore it, or {REMAKE}.")


def row_groups(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a shard, as tables that fit into memory. Raises a `UserError` if it cannot be
    read, has other columns than `schema`, or lacks values."""
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if "label" in found.names and found.field("label").type == pa.int32():  # an older shard
                place = found.names.index("label")
                found = found.set(place, pa.field("label", pa.int64()))
            if not found.equals(schema):
                raise ValueError(f"it has the columns {_columns(found)}, not {_columns(schema)}")
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=columns)
                table = table.cast(pa.schema([schema.field(name) for name in table.schema.names]))
                if any(column.null_count or _flat(column).null_count for column in table.columns):
                    raise ValueError("it lacks values")
                yield table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is broken ({error}): {REMAKE}.") from None


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
