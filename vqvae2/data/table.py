"""A table of named pictures, and the cells that hold them: files, rows of Parquet, pixels."""

import contextlib
import glob
import logging
import threading
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from vqvae2.config import PreprocessingConfig
from vqvae2.data import splits
from vqvae2.data.decoding import Picture, mark_cell, readable
from vqvae2.data.paths import fault_of
from vqvae2.data.splits import few
from vqvae2.data.stream import ImageStream, features_of, row_ids
from vqvae2.data.vectors import Vectors

logger = logging.getLogger(__name__)
ROWS_BYTES = 1 << 30  # of a Parquet table that stay in memory


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
    vectors: Vectors | None = None

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

    def facts(self) -> dict[str, str]:
        """What a run on all of its images is bound to."""
        return splits.image_facts([f"{name}\n" for name in self.ids], self.marks())

    def choose(self, rows: Sequence[int]) -> "ImageTable":
        """These rows alone."""
        return replace(
            self,
            ids=[self.ids[i] for i in rows],
            cells=Subset(self.cells, rows),
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            files=[self.files[i] for i in rows] if self.is_of_files else self.files,
            vectors=self.vectors and self.vectors.choose(rows),
        )

    def with_classes_of(self, train: "ImageTable | ImageStream") -> "ImageTable":
        """This table with its labels numbered as in the training images; without labels, saying
        so, where those have other classes."""
        if isinstance(train, ImageStream):  # its classes are numbers
            class_names = tuple(name for name in self.class_names if name.isdecimal())
            numbers = {name: int(name) for name in class_names}
        else:
            class_names = train.class_names
            numbers = {name: number for number, name in enumerate(class_names)}
        found: list[Any] = [splits.find_class(name, numbers) for name in self.class_names]
        if self.labels is not None and class_names and None not in found:
            return replace(self, labels=[found[i] for i in self.labels], class_names=class_names)
        if class_names:
            own = f"has the classes {few(self.class_names)}" if self.labelled else "has none"
            text = "%s: held out without labels: it %s; the training's are %s."
            logger.info(text, self.name, own, few(class_names))
        return replace(self, labels=None, class_names=())


# Cells


@dataclass(frozen=True)
class PreparedPictures:
    """Pixels in their final form: the Arrow-formatted column `pixels` of a `datasets` table, with
    uint8 values, or float32 in [-1, 1]."""

    config: PreprocessingConfig
    rows: Any  #: None of an empty split

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """The pixels `(B, C, H, W)` of these rows."""
        column = self.rows[list(indices)]["pixels"].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(-1, self.config.channels, *self.config.height_width).copy()

    def __getitem__(self, index: int) -> Picture:
        """As a picture, or as an array, that can be prepared once more, in another size."""
        values = np.moveaxis(self.pixels([index])[0], 0, -1)
        low, high = self.config.value_range
        if values.dtype != np.uint8:
            return ((values + 1) / 2 * (high - low) + low).clip(low, high)
        number = values.shape[2]
        flat = values[..., 0] if number == 1 else values
        return Image.fromarray(flat) if number in (1, 3, 4) else values


@dataclass(frozen=True)
class TableColumn:
    """A column of a `datasets` table, row by row (twice as fast as its own lazy columns)."""

    table: Any
    column: str
    folders: Sequence[Path]
    """Where files that it names may lie."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return find_cell(self.table[index][self.column], self.folders)


class ParquetTable:
    """Parquet files that are read where they lie, and the cells of one column of theirs, row by
    row: the row groups read last stay in memory."""

    def __init__(self, files: Sequence[Path], column: str = "") -> None:
        self.files, self.column = files, column
        self.features: dict[str, Any] = {}  # of all files, so that none has what others lack
        self.groups: list[tuple[Path, int]] = []  # every row group: its file and number in it
        self.ends = [0]  # its last row, plus one
        self.ids: list[str] = []
        sizes: list[int] = []
        for file in files:
            opened = open_parquet(file)
            metadata, schema = opened.metadata, opened.schema_arrow
            if new := {*schema.names} - {*self.features}:
                self.features |= {k: v for k, v in features_of(schema).items() if k in new}
            self.ids += row_ids(file.name, metadata.num_rows)
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                self.groups.append((file, number))
                self.ends.append(self.ends[-1] + group.num_rows)
                sizes.append(group.total_byte_size)
        if sum(sizes) > ROWS_BYTES and max(sizes) > ROWS_BYTES >> 4:
            text = "%s: slow, as a row is read with all %d MiB of its row group: prepare it first."
            logger.info(text, files[0], max(sizes) >> 20)
        self.read: dict[int, Any] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:  # another process reads for itself
        return ParquetTable, (self.files, self.column)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """A cell of the column, or of a column by its name all values."""
        if isinstance(index, str):
            tables = [open_parquet(file).read([index], use_threads=False) for file in self.files]
            return [value for table in tables for value in table[index].to_pylist()]
        number = bisect_right(self.ends, index) - 1
        file, group = self.groups[number]
        with self.lock:
            rows = self.read.pop(number, None)
            if rows is None:
                with readable(str(file), "read", "restore it"):
                    opened = open_parquet(file)
                    rows = opened.read_row_group(group, [self.column], use_threads=False)
                kept = sum(other.nbytes for other in self.read.values())
                while self.read and kept + rows.nbytes > ROWS_BYTES:
                    kept -= self.read.pop(next(iter(self.read))).nbytes
            self.read[number] = rows  # the group used last is the last to go
        return find_cell(rows[self.column][index - self.ends[number]].as_py(), [file.parent])


def load_parquet(files: Sequence[Path], num_bytes: int) -> Any:
    """Parquet files as a table of `datasets`: in memory, or, if they are too large for that, from
    its cache on the disk, into which they are copied."""
    import datasets
    import pyarrow as pa

    if num_bytes > ROWS_BYTES:
        names = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset("parquet", data_files=names, split="train")
    return datasets.Dataset(pa.concat_tables([open_parquet(file).read() for file in files]))


def open_parquet(file: Path) -> Any:
    """Through an open file, since pyarrow and fsspec see more in a path than a path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.OSFile(str(file)))


def find_cell(cell: Any, folders: Sequence[Path]) -> Any:
    """A cell that names a file in one of these folders as that file. (Others are refused when they
    are read: a stranger's table must not show the files of this machine.)"""
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        with contextlib.suppress(OSError, RuntimeError, TypeError, ValueError):
            for folder in folders:
                file = (folder / cell["path"]).resolve()
                if file.is_relative_to(folder.resolve()) and fault_of(file) is None:
                    return file
    return cell
