"""`vqvae2 import-codes`: a code dataset of another implementation's codes."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm.auto import tqdm

from pipelines.config import ImportCodesConfig
from pipelines.importers.rosinality_codes import Row, open_rows
from prior.manifest import MANIFEST_NAME, SPLITS, Manifest, is_complete, write_manifest
from prior.shards import ShardRecord, write_shard
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import RunRecord, last_names, versions
from vqvae2.data import is_held_out
from vqvae2.model import VQVAE2

logger = logging.getLogger(__name__)


def import_codes(config: ImportCodesConfig) -> None:
    """Write the code dataset of an LMDB file, or do nothing if it is finished. All rows are checked
    before the first one is written.

    Raises:
        UserError: the file is no such LMDB, a row is broken or does not fit the autoencoder, all
            rows are held out, or the output folder holds another run.
    """
    output_dir, path = Path(config.output_dir), Path(config.lmdb)
    model = VQVAE2.from_pretrained(config.vqvae)
    facts = {"encoder_hash": model.content_hash()}
    run = RunRecord("import-codes", config, "import_config.yaml", facts=facts)
    run.check(output_dir)
    if is_complete(output_dir):  # the file may have been removed
        logger.info(f"{output_dir}: all codes are imported already.")
        return
    with open_rows(path) as rows:
        # Read every row once to check it and to decide which are held out.
        names = []
        for number in tqdm(range(len(rows)), desc="checking", unit="row"):
            row = rows[number]
            _check(row, f"{path}: row {number}", model, config.vqvae)
            names.append(row.name)
        held_out = [is_held_out(name, config.validation_fraction) for name in names]
        if all(held_out):
            raise UserError(f"{path}: all {len(names)} rows are held out: lower the fraction.")
        ids = _unique(names)
        text = "".join(f"{name} {out}\n" for name, out in zip(ids, held_out, strict=True))
        rows_hash = hashlib.sha256(text.encode()).hexdigest()
        run = replace(run, facts={**facts, "rows_hash": rows_hash})
        run.check(output_dir)

        # Write the shards of both splits; what an earlier import left unfinished goes first.
        for left in (output_dir / MANIFEST_NAME, *output_dir.glob("*/*.parquet")):
            left.unlink(missing_ok=True)
        run.write(output_dir)
        folders = [PurePosixPath(name).parent.name for name in names]
        class_names = tuple(sorted(set(folders))) if len(set(folders)) > 1 else ()
        labels = [class_names.index(folder) for folder in folders] if class_names else None
        records: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            chosen = [i for i, out in enumerate(held_out) if out == (split == "validation")]
            starts = range(0, len(chosen), config.shard_size)
            for shard, first in enumerate(tqdm(starts, desc=f"importing {split}", unit="shard")):
                numbers = chosen[first : first + config.shard_size]
                read = [rows[number].codes for number in numbers]
                record = write_shard(
                    output_dir / split / f"{shard:05d}.parquet",
                    ids=[ids[number] for number in numbers],
                    codes=[
                        np.stack(level).reshape(len(read), -1) for level in zip(*read, strict=True)
                    ],
                    codebook_sizes=model.config.codebook_size_per_level,
                    labels=np.array(labels, np.int32)[numbers] if labels else None,
                )
                records[split].append(record)
    manifest = Manifest(
        encoder_hash=model.content_hash(),
        grids=model.config.grids,
        codebook_sizes=model.config.codebook_size_per_level,
        class_names=class_names,
        rows_hash=rows_hash,
        preprocessing=to_dict(model.config.image),
        train=tuple(records["train"]),
        validation=tuple(records["validation"]),
        source=last_names(config.lmdb),
        versions=versions(),
    )
    write_manifest(output_dir, manifest)
    shown = ", ".join([*class_names[:12], *["..."] * (len(class_names) > 12)])
    classes = f"{len(class_names)} classes ({shown})" if class_names else "no classes"
    counts = f"{manifest.num_train} training rows, {manifest.num_validation} held out"
    logger.info(f"{output_dir}: {counts}, {classes}.")


def _check(row: Row, where: str, model: VQVAE2, vqvae: str) -> None:
    grids, sizes = model.config.grids, model.config.codebook_size_per_level
    found = tuple(codes.shape for codes in row.codes)
    if found != grids:
        raise UserError(
            f"{where} has codes of the grids {found}, but {vqvae} makes {grids} of its images: "
            "import its weights with the --image.size that the images had."
        )
    for codes, size in zip(row.codes, sizes, strict=True):
        if not 0 <= codes.min() <= codes.max() < size:
            raise UserError(
                f"{where} has codes from {codes.min()} to {codes.max()}, but {vqvae} has {size}: "
                "give the autoencoder that made the codes."
            )


def _unique(names: Sequence[str]) -> list[str]:
    """Names as ids; a repeated one (only the last folder of a path is in the file) with its row."""
    seen: set[str] = set()
    ids = []
    for number, name in enumerate(names):
        unique = name
        while unique in seen:
            unique = f"{unique}#{number}"
        ids.append(unique)
        seen.add(unique)
    return ids
