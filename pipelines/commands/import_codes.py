"""`vqvae2 import-codes`: a code dataset of another implementation's codes."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.config import ImportCodesConfig
from pipelines.importers.rosinality_codes import Row, read_rows
from prior.manifest import MANIFEST_NAME, SPLITS, Manifest, is_complete, write_manifest
from prior.shards import ShardRecord, write_shard
from vqvae2.common.accelerate import refuse_several_processes
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.runs import RunRecord, last_names, versions
from vqvae2.common.vocabulary import IMPORT_RECORD, first_names
from vqvae2.data import is_held_out
from vqvae2.model import VQVAE2

logger = logging.getLogger(__name__)


@writes_output
def import_codes(config: ImportCodesConfig) -> None:
    """Write the code dataset of an LMDB file, or do nothing if it is finished. All rows are checked
    before the first is written. Raises as `read_rows`, and a `UserError` if a row does not fit the
    autoencoder, or all rows are held out."""
    # The folder: new, or that of the same import.
    refuse_several_processes()
    folder, path, vqvae = Path(config.output_dir), Path(config.lmdb), config.vqvae
    model = VQVAE2.from_pretrained(vqvae)
    facts = {"encoder_hash": model.content_hash()}
    run = RunRecord("import-codes", config, IMPORT_RECORD, facts=facts)
    run.check(folder)
    if is_complete(folder):  # the file may have been removed
        logger.info(f"{folder}: all codes are imported already.")
        return
    if not (Path(vqvae) / IMPORT_RECORD).exists():
        text = "%s was not imported (import-weights): did it make the codes? The file does not say."
        logger.warning(text, vqvae)

    # Read every row once to check it, and to decide which are held out.
    names: list[str] = []
    for row in progress_bar(read_rows(path), desc="checking", unit="row"):
        _check(row, f"{path}: row {len(names)}", model, vqvae)
        names.append(row.name)
    ids = _unique(names)
    held_out = [is_held_out(name, config.validation_fraction) for name in names]
    if all(held_out):
        raise UserError(f"{path}: all {len(names)} rows are held out: lower the fraction.")

    # The folders of the images are their classes, if there are several.
    folders = [PurePosixPath(name).parent.name for name in names]
    class_names, labels = np.unique(folders, return_inverse=True)
    class_names = class_names[: len(class_names) * (len(class_names) > 1)]

    # Write the shards of both splits; what an earlier import left unfinished goes first.
    for left in (folder / MANIFEST_NAME, *folder.glob("*/*.parquet")):
        left.unlink(missing_ok=True)
    run.write(folder)
    records: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        chosen = [i for i, out in enumerate(held_out) if out == (split == "validation")]
        starts = range(0, len(chosen), config.shard_size)
        for first in progress_bar(starts, desc=f"importing {split}", unit="shard"):
            numbers = chosen[first : first + config.shard_size]
            levels = zip(*(row.codes for row in read_rows(path, numbers)), strict=True)
            record = write_shard(
                folder / split / f"{first // config.shard_size:05d}.parquet",
                ids=[ids[number] for number in numbers],
                codes=[np.stack(level).reshape(len(numbers), -1) for level in levels],
                codebook_sizes=model.config.codebook_size_per_level,
                labels=labels[numbers] if len(class_names) else None,
                class_names=class_names.tolist(),
            )
            records[split].append(record)

    # The manifest makes it a code dataset.
    text = "".join(f"{name} {out}\n" for name, out in zip(ids, held_out, strict=True))
    manifest = Manifest(
        encoder_hash=model.content_hash(),
        grids=model.config.grids,
        codebook_sizes=model.config.codebook_size_per_level,
        class_names=tuple(class_names.tolist()),
        rows_hash=hashlib.sha256(text.encode()).hexdigest(),
        preprocessing=to_dict(model.config.image),
        train=tuple(records["train"]),
        validation=tuple(records["validation"]),
        source=last_names(config.lmdb),
        versions=versions(),
    )
    write_manifest(folder, manifest)
    counts = f"{manifest.num_train} training rows, {manifest.num_validation} held out"
    classes = f"{len(class_names)} classes ({first_names(manifest.class_names)})"
    logger.info(f"{folder}: {counts}, {classes if len(class_names) else 'no classes'}.")


def _check(row: Row, where: str, model: VQVAE2, vqvae: str | Path) -> None:
    grids, sizes = model.config.grids, model.config.codebook_size_per_level
    shapes = tuple(codes.shape for codes in row.codes)
    if shapes != grids:
        fault = f"{where} has codes of the grids {shapes}, but {vqvae} makes {grids} of its images"
        raise UserError(f"{fault}: import its weights with the --image.size that the images had.")
    for codes, size in zip(row.codes, sizes, strict=True):
        low, high = int(codes.min()), int(codes.max())
        if not 0 <= low <= high < size:
            fault = f"{where} has codes from {low} to {high}, but {vqvae} has {size}"
            raise UserError(f"{fault}: give the autoencoder that made the codes.")


def _unique(names: Sequence[str]) -> list[str]:
    """Names as ids; a repeated one (only the last folder of a path is in the file) with its row."""
    ids: dict[str, None] = {}
    for number, name in enumerate(names):
        unique = name
        while unique in ids:
            unique = f"{unique}#{number}"
        ids[unique] = None
    return list(ids)
