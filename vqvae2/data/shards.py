"""Tar and Parquet shards on a disk or behind a URL, read row by row as they come."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vqvae2.common.artifact import looks_like_path
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig
from vqvae2.data.preprocessing import Picture, first_line
from vqvae2.data.source import refuse_duplicates, shard_stem, split_files
from vqvae2.data.sources import expand, expand_ranges, find_shards
from vqvae2.data.tables import find_column, read_cell, row_ids
from vqvae2.data.tars import read_row, tar_rows

MAX_CLASSES = 1 << 20


class StreamRow(NamedTuple):
    """A row of a shard as it is met."""

    id: str
    label: int | None
    read: Callable[[], Picture]


@dataclass(frozen=True)
class Shards:
    """Tar or Parquet shards, in order."""

    name: str
    urls: tuple[str, ...]
    image_column: str | None = None
    label_column: str | None = None

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def files(self) -> list[Path]:
        """Those on this machine."""
        return [
            Path(url.removeprefix("file://"))
            for url in self.urls
            if "://" not in url.removeprefix("file://")
        ]

    def rows(self, number: int) -> Iterator[StreamRow]:
        """The rows of one shard, in order.

        Raises:
            UserError: the shard is absent or broken, or its labels are no numbers.
        """
        url = self.urls[number]
        with _opened(url) as file:
            yield from (
                _parquet_rows(file, url, self.image_column, self.label_column)
                if url.endswith(".parquet")
                else _tar_rows(file, url)
            )

    def ids(self, number: int) -> Iterator[str]:
        """The rows' names alone, without reading pictures where the shard can be sought in."""
        url = self.urls[number]
        with _opened(url) as file:
            if not url.endswith(".parquet"):
                yield from (row.id for row in tar_rows(file, url, positions="://" not in url))
                return
            table = _parquet_file(file, url)
            names = table.schema_arrow.names
            yield from (
                map(str, table.read(columns=["id"])["id"].to_pylist())
                if "id" in names
                else row_ids(shard_stem(url), table.metadata.num_rows)
            )


def find_stream(data: ImagesConfig) -> Shards:
    """The shards that a configuration names.

    Raises:
        UserError: none, or of another kind.
    """
    urls = _find_urls(data.path)
    unknown = next((url for url in urls if not url.endswith((".parquet", ".tar", ".tar.gz"))), None)
    if unknown is not None or not urls:
        raise UserError(
            f"{data.path}: {unknown or 'nothing'} is no .tar or .parquet shard, and only such can be streamed: remove --data.streaming."
        )
    stems = [shard_stem(url) for url in urls]
    refuse_duplicates(
        stems, f"{data.path} (names of shards, which the names of their rows begin with)"
    )
    parts = split_files([Path(url) for url in urls])
    if len(parts) > 1:
        raise UserError(
            f"{data.path} holds shards of the splits {', '.join(parts)}, which a stream would mix: name the training shards alone, for example by a "
            f"pattern, and the held-out ones as --data.validation-path."
        )
    return Shards(data.path, tuple(urls), data.image_column, data.label_column)


def _find_urls(path: str) -> list[str]:
    local = Path(path).expanduser()
    if local.is_dir():
        return list(map(str, find_shards(local)))
    if local.is_file():
        return [str(local)]
    if "://" not in path and not looks_like_path(path):
        path = f"hf://datasets/{path}/**/*.parquet"  # an id of the Hub
    if "://" not in path:
        return list(map(str, expand(path)))
    import fsspec

    urls: list[str] = []
    try:
        for one in expand_ranges(path):
            system, inside = fsspec.core.url_to_fs(one)
            scheme = one.split("://")[0]
            found = (
                sorted(map(str, system.glob(inside))) if any(c in inside for c in "*?[") else [one]
            )
            urls += [
                url
                if "://" in url
                else f"{scheme}://{url.removeprefix('/') if scheme == 'memory' else url}"
                for url in found
            ]
    except Exception as error:  # each file system raises its own kinds
        raise UserError(
            f"{path} cannot be listed ({type(error).__name__}: {first_line(error)}): check data.path and your access to it."
        ) from None
    return urls


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    import fsspec

    try:
        file = fsspec.open(url, "rb").open()
    except Exception as error:  # each file system raises its own kinds
        raise UserError(
            f"{url} cannot be opened ({type(error).__name__}: {first_line(error)}): check data.path and your access to it."
        ) from None
    with file:
        yield file


def _number(label: Any, url: str) -> int | None:
    if label is not None and (type(label) is not int or not 0 <= label < MAX_CLASSES):
        raise UserError(
            f"{url} has the label {label!r}, but streamed classes must be numbers from 0 to {MAX_CLASSES - 1:,}: number them in the shards."
        )
    return label


def _tar_rows(file: BinaryIO, url: str) -> Iterator[StreamRow]:
    for row in tar_rows(file, url):
        yield StreamRow(row.id, _number(row.label, url), partial(read_row, row))


def _parquet_file(file: BinaryIO, url: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{url} cannot be read as Parquet ({first_line(error)}): restore or remove it."
        ) from None
    if "split" in table.schema_arrow.names:
        raise UserError(
            f"{url} has a column 'split', but a stream is held out by whole shards: write the splits to shards of their own."
        )
    return table


def _parquet_rows(
    file: BinaryIO, url: str, image_column: str | None, label_column: str | None
) -> Iterator[StreamRow]:
    import pyarrow as pa

    table = _parquet_file(file, url)
    names = dict.fromkeys(table.schema_arrow.names)
    image = find_column(names, url, image_column)
    label = label_column or ("label" if "label" in names else _typed_classes(table.schema_arrow))
    if label is not None and label not in names:
        raise UserError(
            f"{url} has the columns {list(names)}, but no {label!r}: correct --data.label-column."
        )
    columns = [name for name in (image, label, "id" if "id" in names else None) if name is not None]
    met: set[str] = set()
    made_up = iter(row_ids(shard_stem(url), table.metadata.num_rows))
    try:
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                name = str(row.get("id", next(made_up)))
                if name in met or row.get("id", name) is None:
                    raise UserError(
                        f"{url} has the id {name!r} twice, or a row without: give each image a name of its own, or rename the column."
                    )
                met.add(name)
                yield StreamRow(
                    name,
                    _number(row.get(label), url) if label is not None else None,
                    partial(read_cell, row[image]),
                )
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{url} cannot be read as Parquet ({first_line(error)}): restore or remove it."
        ) from None


def _typed_classes(schema: Any) -> str | None:
    """The column that `datasets` wrote as classes, if there is one."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"][
            "features"
        ]
        return next(
            (
                name
                for name, kind in features.items()
                if name in schema.names
                and name != "split"
                and isinstance(kind, dict)
                and kind.get("_type") == "ClassLabel"
            ),
            None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # written by something else
        return None
