"""How small codes are on disk and how fast they are read: bytes per row and code, and shuffled rows per second into int64 batches.

python benchmarks/codes.py                # 8x8 + 16x16 and 32x32 + 64x64 codes of K = 512, uniform: the hardest to store
python benchmarks/codes.py --workers 0    # without a worker process
"""

import argparse
import io
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import prior.manifest
from prior.manifest import CodeDataset, Manifest, write_manifest
from prior.shards import write_shard
from vqvae2.common.loading import ShuffledLoader

GRIDS = {
    "8x8 + 16x16": (((8, 8), (16, 16)), 100_000),
    "32x32 + 64x64": (((32, 32), (64, 64)), 12_000),
}
SHARD_SIZE = 8192
SECONDS = 5.0


def main() -> None:
    """Print one block per pair of grids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codebook-size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    for name, (grids, rows) in GRIDS.items():
        print(
            f"\n{name}, {rows} rows, K = {options.codebook_size}, batches of {options.batch_size}, {options.workers} worker(s)"
        )
        with tempfile.TemporaryDirectory() as folder:
            measure(
                Path(folder),
                grids,
                rows,
                options.codebook_size,
                options.workers,
                options.batch_size,
            )


def measure(
    folder: Path,
    grids: tuple[tuple[int, int], ...],
    rows: int,
    size: int,
    workers: int,
    batch_size: int,
) -> None:
    """Write a dataset of uniform codes, print its sizes beside those of simpler formats, and how fast it is read."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, size, (rows, h * w)) for h, w in grids]
    shards, started = [], time.perf_counter()
    for number, first in enumerate(range(0, rows, SHARD_SIZE)):
        part = [level[first : first + SHARD_SIZE] for level in codes]
        ids = [f"{i:08d}.png" for i in range(first, first + len(part[0]))]
        shards.append(
            write_shard(
                folder / "train" / f"{number:05d}.parquet",
                ids=ids,
                codes=part,
                codebook_sizes=(size,) * len(grids),
            )
        )
    print(f"  written at {rows / (time.perf_counter() - started):,.0f} rows/s")
    manifest = Manifest(
        encoder_hash="",
        grids=grids,
        codebook_sizes=(size,) * len(grids),
        class_names=(),
        rows_hash="",
        preprocessing=None,
        train=tuple(shards),
    )
    write_manifest(folder, manifest)
    per_row = sum(h * w for h, w in grids)
    on_disk = {
        "entropy, ceil(log2 K) bits per code": per_row * math.ceil(math.log2(size)) / 8,
        "ours, code columns": sum(code_bytes(folder / "train" / shard.name) for shard in shards)
        / rows,
        "ours, whole files": sum((folder / "train" / shard.name).stat().st_size for shard in shards)
        / rows,
        "zstd Parquet, no dictionary": naive_bytes(
            [level[:SHARD_SIZE].astype(np.uint16) for level in codes], "zstd"
        )
        / min(rows, SHARD_SIZE),
        "pickled int64 arrays": 8.0 * per_row,
    }
    least = on_disk["entropy, ceil(log2 K) bits per code"]
    for name, taken in on_disk.items():
        print(f"  {name:<36} {taken:9,.1f} bytes/row  {taken / least - 1:+7.1%}")
    started = time.perf_counter()
    in_memory = CodeDataset(folder, manifest, "train")
    print(
        f"  checked and decoded into memory at {rows / (time.perf_counter() - started):,.0f} rows/s"
    )
    prior.manifest.MEMORY_BYTES = 0
    started = time.perf_counter()
    mapped = CodeDataset(folder, manifest, "train")
    print(f"  checked and decoded to disk at {rows / (time.perf_counter() - started):,.0f} rows/s")
    prior.manifest.MEMORY_BYTES = 2 << 30
    for name, dataset in {"in memory": in_memory, "mapped from disk": mapped}.items():
        print(
            f"  read, shuffled, {name:<22} {rows_per_second(dataset, workers, batch_size):10,.0f} rows/s"
        )
    print(
        f"  read, shuffled, {'datasets.load_dataset':<22} {naive_rows_per_second(folder, batch_size):10,.0f} rows/s"
    )


def code_bytes(path: Path) -> int:
    """What the code columns of a shard take."""
    file = pq.ParquetFile(path).metadata
    groups = [file.row_group(i) for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.startswith("codes_")
    )


def naive_bytes(codes: list[np.ndarray], compression: str) -> int:
    """The same codes as plain compressed Parquet."""
    columns = {
        f"codes_{i}": pa.FixedSizeListArray.from_arrays(pa.array(level.reshape(-1)), level.shape[1])
        for i, level in enumerate(codes)
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression=compression, use_dictionary=False)
    return file.tell()


def rows_per_second(dataset: CodeDataset, workers: int, batch_size: int) -> float:
    """Through the loader that trains."""
    batches = ShuffledLoader(dataset, batch_size, num_workers=workers).start_at(0)
    return timed(batches, batch_size)


def naive_rows_per_second(folder: Path, batch_size: int) -> float:
    """Through the datasets library's own random access."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(str(folder), cache_dir=str(folder / "cache"))["train"].with_format(
        "torch"
    )
    order = torch.randperm(len(rows)).tolist()
    batches = (
        rows[order[i % len(order) : i % len(order) + batch_size]]
        for i in itertools.count(0, batch_size)
    )
    return timed(batches, batch_size)


def timed(batches: Iterator[Any], batch_size: int) -> float:
    """Rows per second over some seconds, after the first two batches."""
    next(batches), next(batches)
    number, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        next(batches)
        number += batch_size
    return number / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
