"""How small codes are on disk (bytes per row), and how fast they are read (shuffled rows per second
into int64 batches).

python benchmarks/codes.py                # uniform codes of K = 512: the hardest to store
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
        batches = f"batches of {options.batch_size}, {options.workers} worker(s)"
        print(f"\n{name}, {rows} rows, K = {options.codebook_size}, {batches}")
        with tempfile.TemporaryDirectory() as folder:
            manifest = measure_size(Path(folder), grids, rows, options.codebook_size)
            measure_reading(Path(folder), manifest, options.workers, options.batch_size)


def measure_size(
    folder: Path, grids: tuple[tuple[int, int], ...], rows: int, size: int
) -> Manifest:
    """Write a dataset of uniform codes, and print its size beside those of simpler formats."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, size, (rows, h * w)) for h, w in grids]
    sizes, shards, started = (size,) * len(grids), [], time.perf_counter()
    for number, first in enumerate(range(0, rows, SHARD_SIZE)):
        part = [level[first : first + SHARD_SIZE] for level in codes]
        ids = [f"{i:08d}.png" for i in range(first, first + len(part[0]))]
        path = folder / "train" / f"{number:05d}.parquet"
        shards.append(write_shard(path, ids=ids, codes=part, codebook_sizes=sizes))
    print(f"  written at {rows / (time.perf_counter() - started):,.0f} rows/s")
    manifest = Manifest(
        encoder_hash="",
        grids=grids,
        codebook_sizes=sizes,
        class_names=(),
        rows_hash="",
        preprocessing=None,
        train=tuple(shards),
    )
    write_manifest(folder, manifest)

    # Beside the least that codes can take, and what they take elsewhere.
    per_row = sum(h * w for h, w in grids)
    paths = [folder / "train" / shard.name for shard in shards]
    least = per_row * math.ceil(math.log2(size)) / 8
    few = [level[:SHARD_SIZE].astype(np.uint16) for level in codes]
    on_disk = {
        "entropy, ceil(log2 K) bits per code": least,
        "ours, code columns": sum(map(code_bytes, paths)) / rows,
        "ours, whole files": sum(path.stat().st_size for path in paths) / rows,
        "zstd Parquet, no dictionary": naive_bytes(few) / len(few[0]),
        "pickled int64 arrays": 8.0 * per_row,
    }
    for name, taken in on_disk.items():
        print(f"  {name:<36} {taken:9,.1f} bytes/row  {taken / least - 1:+7.1%}")
    return manifest


def measure_reading(folder: Path, manifest: Manifest, workers: int, batch_size: int) -> None:
    """Print how fast the dataset is decoded, and read in shuffled batches."""
    datasets, memory = {}, prior.manifest.MEMORY_BYTES
    for name, most in {"into memory": memory, "to disk": 0}.items():
        prior.manifest.MEMORY_BYTES, started = most, time.perf_counter()
        datasets[name] = CodeDataset(folder, manifest, "train")
        rate = manifest.num_train / (time.perf_counter() - started)
        print(f"  checked and decoded {name} at {rate:,.0f} rows/s")
    prior.manifest.MEMORY_BYTES = memory
    for name, dataset in datasets.items():
        rate = rows_per_second(dataset, workers, batch_size)
        print(f"  read, shuffled, decoded {name:<14} {rate:10,.0f} rows/s")
    rate = naive_rows_per_second(folder, batch_size)
    print(f"  read, shuffled, datasets.load_dataset  {rate:10,.0f} rows/s")


def code_bytes(path: Path) -> int:
    """What the code columns of a shard take."""
    file = pq.ParquetFile(path).metadata
    groups = [file.row_group(i) for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    codes = [column for column in columns if column.path_in_schema.startswith("codes_")]
    return sum(column.total_compressed_size for column in codes)


def naive_bytes(codes: list[np.ndarray]) -> int:
    """The same codes as plain compressed Parquet."""
    columns = {}
    for i, level in enumerate(codes):
        flat = pa.array(level.reshape(-1))
        columns[f"codes_{i}"] = pa.FixedSizeListArray.from_arrays(flat, level.shape[1])
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=False)
    return file.tell()


def rows_per_second(dataset: CodeDataset, workers: int, batch_size: int) -> float:
    """Through the loader that trains."""
    batches = ShuffledLoader(dataset, batch_size, num_workers=workers).start_at(0)
    return timed(batches, batch_size)


def naive_rows_per_second(folder: Path, batch_size: int) -> float:
    """Through the datasets library's own random access."""
    import datasets

    datasets.disable_progress_bars()
    opened = datasets.load_dataset(str(folder), cache_dir=str(folder / "cache"))
    rows = opened["train"].with_format("torch")
    order = torch.randperm(len(rows)).tolist()
    starts = (i % len(order) for i in itertools.count(0, batch_size))
    return timed((rows[order[i : i + batch_size]] for i in starts), batch_size)


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
