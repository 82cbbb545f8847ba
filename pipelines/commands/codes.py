"""`vqvae2 codes info | view | verify`: what a code dataset holds, what its rows look like, and whether all of it is sound."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from tqdm.auto import tqdm

from pipelines.config import CodesInfoConfig, CodesVerifyConfig, CodesViewConfig
from pipelines.pictures import in_rows, refuse_other_encoder
from prior.manifest import SPLITS, Manifest, check_range, read_manifest, read_rows, read_shard
from prior.shards import (
    ORIGINAL,
    ShardRecord,
    check_file,
    column_name,
    content_hash,
    flat_values,
    row_groups,
)
from vqvae2.codebook_stats import level_name, perplexity, usage
from vqvae2.common.accelerate import processes
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import save_picture, sheet, to_pil
from vqvae2.model import VQVAE2

SHOWN_CLASSES = 12  # of more classes, so many are named
DECODED_AT_ONCE = 32


def info(config: CodesInfoConfig) -> None:
    """Print what a code dataset holds.

    Raises:
        UserError: it is no code dataset, or a shard of it is not what the manifest says.
    """
    folder = Path(config.codes)
    manifest = read_manifest(folder)
    counts = [torch.zeros(size, dtype=torch.int64) for size in manifest.codebook_sizes]
    for split, shard in tqdm(
        _shards(manifest), desc="counting codes", unit="shard", delay=3, leave=False
    ):
        for table in read_shard(
            folder,
            manifest,
            split,
            shard,
            [column_name(level) for level in range(manifest.num_levels)],
        ):
            for level, size in enumerate(manifest.codebook_sizes):
                counts[level] += torch.from_numpy(
                    np.bincount(flat_values(table[column_name(level)]), minlength=size)
                )
    print("\n".join(describe(folder, manifest, counts)))


def describe(folder: Path, manifest: Manifest, counts: list[torch.Tensor]) -> list[str]:
    """The lines of `vqvae2 codes info`, given how often each code occurs."""
    rows = manifest.num_train + manifest.num_validation
    taken = sum((folder / split / shard.name).stat().st_size for split, shard in _shards(manifest))
    number = len(manifest.class_names)
    names = ", ".join([*manifest.class_names[:SHOWN_CLASSES], *["..."] * (number > SHOWN_CLASSES)])
    lines = [
        f"{folder}: codes of {manifest.source or 'an unnamed source'}",
        f"  rows      {manifest.num_train} to train on, {manifest.num_validation} held out; views: {', '.join(manifest.views)}",
        f"  classes   {f'{number} ({names})' if number else 'none'}",
        f"  encoder   {manifest.encoder_hash}",
        f"  content   {manifest.codes_hash}",
        f"  written   {', '.join(f'{name} {version}' for name, version in manifest.versions.items()) or 'by unknown versions'}",
        f"  on disk   {taken / max(rows, 1):,.1f} bytes per row in {len(_shards(manifest))} shard(s)",
    ]
    for level, ((height, width), size, found) in enumerate(
        zip(manifest.grids, manifest.codebook_sizes, counts, strict=True)
    ):
        used = f"{int((found > 0).sum())} used ({usage(found):.0%})"
        entropy = (
            f"{math.log2(perplexity(found)):.2f} of {math.log2(size):.2f} bits by frequency alone"
            if rows
            else "no row"
        )
        lines.append(
            f"  {column_name(level):<9} {level_name(level, manifest.num_levels)}, {height} x {width} of {size} codes: {used}, {entropy}"
        )
    return lines


@torch.no_grad()
def view(config: CodesViewConfig) -> None:
    """Write a picture of decoded rows, and say which rows they are.

    Raises:
        UserError: another autoencoder than the one that made the codes, or no such row.
    """
    folder = Path(config.codes)
    manifest = read_manifest(folder)
    model = VQVAE2.from_pretrained(config.vqvae).to(processes().device)
    refuse_other_encoder(config.vqvae, model, folder, manifest)
    table = read_rows(folder, manifest, config.split, config.rows)
    pictures = []
    for first in range(0, len(table), DECODED_AT_ONCE):
        part = table.slice(first, DECODED_AT_ONCE)
        levels = [
            torch.from_numpy(flat_values(part[column_name(level)]).astype(np.int64))
            for level in range(manifest.num_levels)
        ]
        grids = [
            rearrange(codes, "(b h w) -> b h w", h=h, w=w).to(processes().device)
            for codes, (h, w) in zip(levels, manifest.grids, strict=True)
        ]
        pictures += to_pil(model.decode_codes(grids))
    save_picture(sheet(in_rows(pictures, 8)), Path(config.output_dir) / "rows.png")
    for number, row in zip(config.rows, table.to_pylist(), strict=True):
        said = [
            f"{config.split} row {number}: {row['id']}",
            *[row["view"]] * (row["view"] != ORIGINAL),
        ]
        print(
            ", ".join(
                [*said, *([manifest.class_names[row["label"]]] if manifest.class_names else [])]
            )
        )
    print(f"{config.output_dir}/rows.png: {len(pictures)} decoded rows, in reading order.")


def verify(config: CodesVerifyConfig) -> int:
    """Print a line for each problem of a code dataset; the exit code is 1 if there is any.

    Raises:
        UserError: there is no manifest, or it is broken or edited: nothing says what should be there.
    """
    folder = Path(config.codes)
    manifest = read_manifest(folder)
    number = 0
    for problem in problems(folder, manifest):
        number += 1
        print(problem, flush=True)
    if number:
        print(f"\n{number} problem(s).")
        return 1
    rows = manifest.num_train + manifest.num_validation
    print(
        f"{folder}: all {rows} rows in {len(_shards(manifest))} shard(s) are what the manifest says ({manifest.codes_hash[:12]}), none twice."
    )
    return 0


def problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for everything that is wrong with the shards of a code dataset."""
    for split in SPLITS:
        names = {shard.name for shard in manifest.shards(split)}
        for path in sorted((folder / split).glob("*.parquet")):
            if path.name not in names:
                yield f"{path} is not in the manifest, but would be read with it elsewhere: remove it."
        keys: dict[Path, np.ndarray] = {}
        for shard in tqdm(
            manifest.shards(split), desc=f"verifying {split}", unit="shard", delay=3, leave=False
        ):
            path = folder / split / shard.name
            try:
                check_file(path, shard)
                tables = list(row_groups(path, manifest.schema)) or [manifest.schema.empty_table()]
                keys[path] = np.concatenate([_keys(table) for table in tables])
                yield from _problems_of(path, manifest, shard, tables)
            except UserError as error:
                yield str(error)
        yield from _repeats(keys)


def _problems_of(
    path: Path, manifest: Manifest, shard: ShardRecord, tables: list[pa.Table]
) -> Iterator[str]:
    """What is wrong with the rows of a shard whose bytes are those that were recorded."""
    rows, found = sum(map(len, tables)), content_hash(tables)
    if rows != shard.rows:
        yield f"{path} holds {rows} rows, but the manifest says {shard.rows}: extract again."
    if found != shard.content_hash:
        yield f"{path} holds rows of the content hash {found[:12]}, but the manifest says {shard.content_hash[:12]}: extract again."
    views = (
        (ORIGINAL,) if path.parent.name == "validation" else manifest.views
    )  # held-out images are not changed
    counts = Counter(view for table in tables for view in table["view"].to_pylist())
    if set(counts) - set(views) or len({counts[view] for view in views}) > 1:
        yield f"{path} holds {dict(counts)} rows of views, but as many of each of {', '.join(views)} are due: extract again."
    for name in manifest.schema.names:
        try:
            for table in tables:
                check_range(path, manifest, name, table[name])
        except UserError as error:
            yield str(error)


def _keys(table: pa.Table) -> np.ndarray:
    """16 bytes for each row's id and view, the same only for the same."""
    pairs = zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)
    digests = b"".join(
        hashlib.blake2b(f"{len(name)} {name} {view}".encode(), digest_size=16).digest()
        for name, view in pairs
    )
    return np.frombuffer(digests, np.dtype("V16"))


def _repeats(keys: dict[Path, np.ndarray]) -> Iterator[str]:
    """A sentence for each file with rows whose id and view another row has, too."""
    if not keys:
        return
    unique, counts = np.unique(np.concatenate(list(keys.values())), return_counts=True)
    repeated = unique[counts > 1]
    for path, here in keys.items() if len(repeated) else ():
        rows = np.flatnonzero(np.isin(here, repeated))
        if len(rows):
            what_to_do = "give each image a name of its own, and extract again"
            yield f"{path}: {len(rows)} rows, the first of them row {rows[0]}, have an id and view that another row of the split has: {what_to_do}."


def _shards(manifest: Manifest) -> list[tuple[str, ShardRecord]]:
    return [(split, shard) for split in SPLITS for shard in manifest.shards(split)]
