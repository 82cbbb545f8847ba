"""`vqvae2 codes info | view | verify`: what a code dataset holds, and whether it is sound."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from pipelines.belonging import refuse_mismatches
from pipelines.config import CodesInfoConfig, CodesVerifyConfig, CodesViewConfig
from prior.manifest import read_manifest, read_rows, read_shard
from prior.shards import column_name, flat_values
from prior.verification import problems
from vqvae2.codebook_stats import level_name, perplexity, usage
from vqvae2.common.accelerate import processes, refuse_several_processes
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import in_rows, num_columns, save_picture, sheet, to_pil
from vqvae2.common.vocabulary import (
    ORIGINAL,
    describe_grids,
    describe_vectors,
    first_names,
)
from vqvae2.model import VQVAE2

logger = logging.getLogger(__name__)
DECODED_AT_ONCE = 32


def info(config: CodesInfoConfig) -> None:
    """Print what a code dataset holds."""
    refuse_several_processes()
    print(code_info(Path(config.codes)))


def code_info(codes: Path) -> str:
    """What a code dataset holds, in lines; raises as `read_manifest` and `read_shard`."""
    # Count the codes.
    manifest = read_manifest(codes)
    counts = [torch.zeros(size, dtype=torch.int64) for size in manifest.codebook_sizes]
    columns = [column_name(level) for level in range(manifest.num_levels)]
    shards, on_disk = manifest.all_shards, 0
    for split, shard in progress_bar(shards, "counting codes", unit="shard", delay=3, leave=False):
        for table in read_shard(codes, manifest, split, shard, columns):
            for level, column in enumerate(columns):
                values = torch.from_numpy(flat_values(table[column]).astype(np.int64))
                counts[level] += values.bincount(minlength=len(counts[level]))
        on_disk += (codes / split / shard.name).stat().st_size

    # What it is, and how each level is used.
    rows, classes = manifest.num_train + manifest.num_validation, manifest.class_names
    written_by = [f"{name} {version}" for name, version in manifest.versions.items()]
    split_rows = f"{manifest.num_train} to train on, {manifest.num_validation} held out"
    facts = {
        "rows": f"{split_rows}; views: {', '.join(manifest.views)}",
        "classes": f"{len(classes)} ({first_names(classes)})" if classes else "none",
        "encoder": manifest.encoder_hash,
        "content": manifest.codes_hash,
        "written": " ".join(written_by) or "by unknown versions",
        "on disk": f"{on_disk / max(rows, 1):,.1f} bytes per row in {len(shards)} shard(s)",
    }
    if manifest.vector_size:
        facts["condition"] = describe_vectors(manifest.vector_size, manifest.vector_names)
    grids = describe_grids(manifest.grids, manifest.codebook_sizes)
    for level, count in enumerate(counts):
        bits, most = math.log2(perplexity(count)) if rows else 0, math.log2(len(count))
        entropy = f"{bits:.2f} of {most:.2f} bits of entropy"
        used = f"{int((count > 0).sum())} used ({usage(count):.0%}), {entropy}"
        facts[columns[level]] = f"{level_name(level, len(counts))}, {grids[level]} codes: {used}"
    lines = [f"  {name:<9} {fact}" for name, fact in facts.items()]
    return "\n".join([f"{codes}: codes of {manifest.source or 'an unnamed source'}", *lines])


@writes_output
def view(config: CodesViewConfig) -> None:
    """Write a picture of decoded rows, and print which rows they are."""
    refuse_several_processes()
    output_dir = Path(config.output_dir)
    print(view_rows(Path(config.codes), config.vqvae, output_dir, config.rows, config.split))
    logger.info(f"{output_dir / 'rows.png'}: the decoded rows, in reading order.")


@torch.no_grad()
def view_rows(codes: Path, vqvae: str, output_dir: Path, rows: Sequence[int], split: str) -> str:
    """Write a sheet of decoded rows, rows.png, and return a line about each of them. Raises a
    `UserError` for another autoencoder, or no such row."""
    check(len(rows) >= 1, "rows", rows, "one number or more")
    manifest, device = read_manifest(codes), processes().device
    if not manifest.num_rows(split):
        raise UserError(f"{codes} has no rows in {split}: choose the other --split.")
    model = VQVAE2.from_pretrained(vqvae).to(device)
    refuse_mismatches(model, (), manifest)
    table, pictures, captions = read_rows(codes, manifest, split, rows), [], []
    for first in range(0, len(table), DECODED_AT_ONCE):
        few, levels = table.slice(first, DECODED_AT_ONCE), []
        for level, (h, w) in enumerate(manifest.grids):
            flat = torch.from_numpy(flat_values(few[column_name(level)]).astype(np.int64))
            levels.append(rearrange(flat, "(b h w) -> b h w", h=h, w=w).to(device))
        pictures += to_pil(model.decode_codes(levels))
    for number, row in zip(rows, table.to_pylist(), strict=True):
        view = f", {row['view']}" if row["view"] != ORIGINAL else ""
        label = f", {manifest.class_names[row['label']]}" if manifest.class_names else ""
        captions.append(f"{split} row {number}: {row['id']}{view}{label}")
    save_picture(sheet(in_rows(pictures, num_columns(len(pictures)))), output_dir / "rows.png")
    return "\n".join(captions)


def verify(config: CodesVerifyConfig) -> int:
    """Print a line for each problem of a code dataset; the exit code is 1 if there is any."""
    refuse_several_processes()
    folder, number = Path(config.codes), 0
    manifest = read_manifest(folder)
    for problem in problems(folder, manifest):
        print(problem, flush=True)
        number += 1
    rows, shards = manifest.num_train + manifest.num_validation, len(manifest.all_shards)
    sound = f"{folder}: all {rows} rows in {shards} shard(s) are what the manifest says"
    verdict = f"{sound} ({manifest.codes_hash[:12]}), none twice."
    print(f"\n{number} problem(s)." if number else verdict)
    return int(number > 0)
