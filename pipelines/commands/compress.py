"""`vqvae2 compress` and `vqvae2 decompress`: images as .vq2 files, and back."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipelines.codec import CODER_VERSION, Codec
from pipelines.config import CompressConfig, DecompressConfig
from pipelines.file_names import below_their_folder, file_names
from pipelines.pipeline import VQVAE2Pipeline
from vqvae2.common.accelerate import processes, refuse_several_processes
from vqvae2.common.errors import UserError
from vqvae2.common.files import open_regular, whole_file
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import file_suffix, save_image
from vqvae2.common.runs import RunRecord
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.data import ImageDataset, load_table

logger = logging.getLogger(__name__)
SUFFIX, BATCH = ".vq2", 64


@writes_output
def compress(config: CompressConfig) -> None:
    """Write images as the configuration says: an archive of all, or a file of each."""
    # The images.
    refuse_several_processes()
    pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline).to(processes().device)
    codec = Codec(pipeline)
    if not config.fast:
        codec.refuse_unhidden()
    settings, folder = pipeline.vqvae.config.image, Path(config.output_dir)
    source = load_table(config.data, settings)
    images = ImageDataset(source, range(len(source)), settings)
    facts = {**pipeline.content_hashes(), **source.facts()}
    run = RunRecord("compress", config, "compress_config.yaml", facts=facts)
    run.check(folder)
    skipped = images.check(skip=config.data.on_error == "skip")
    if not len(images):
        raise UserError(f"{source.name}: no image can be read: check data.path.")
    run.write(folder)
    list_skipped(folder, [(bad.name, bad.reason) for bad in skipped])
    report_skipped(folder)

    # Their codes.
    batches: list[list[Tensor]] = []
    starts = range(0, len(images), BATCH)
    for first in progress_bar(starts, desc="encoding", total=len(starts)):
        rows = range(first, min(first + BATCH, len(images)))
        encoded = pipeline.encode(images.pixel_rows(rows))
        batches.append([level.int() for level in encoded])
    codes = [torch.cat(level) for level in zip(*batches, strict=True)]

    # Their files.
    names, size = below_their_folder(images.ids), 0
    files = {folder / f"images{SUFFIX}": range(len(images))}
    if config.separate:
        files = {folder / name: range(i, i + 1) for i, name in enumerate(file_names(names, SUFFIX))}
    for path, rows in progress_bar(files.items(), desc="writing", total=len(files)):
        own = [level[rows.start : rows.stop] for level in codes]
        kept, show = ([], False) if config.separate else (names, True)
        data = codec.compress(own, kept, fast=config.fast, show_progress=show)
        with whole_file(path) as aside:
            aside.write_bytes(data)
        size += len(data)
    what = f"{len(files):,} files {SUFFIX}" if config.separate else f"images{SUFFIX}"
    bits = f"{8 * size / len(images):,.0f} bits each"
    logger.info(f"{folder}: {what}: {len(images):,} images in {size:,} bytes, {bits}.")


@writes_output
def decompress(config: DecompressConfig) -> None:
    """Write the images that are in files of `compress`, under their own names."""
    # The files.
    refuse_several_processes()
    pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline).to(processes().device)
    folder, codec = Path(config.output_dir), Codec(pipeline)
    settings, most = pipeline.vqvae.config.image, pipeline.vqvae.config.num_levels
    contents, digest = read_files(config.files), hashlib.sha256()
    for data in contents.values():
        digest.update(hashlib.sha256(data).digest())
    hashes = {**pipeline.content_hashes(), "files_hash": digest.hexdigest()}
    run = RunRecord("decompress", config, "decompress_config.yaml", facts=hashes)
    run.check(folder)

    # What is in them, before anything is written.
    levels, alone = config.levels or most, len(contents) == 1
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in contents])
    names: list[str] = []
    codes: list[list[Tensor]] = []
    for path, data in progress_bar(contents.items(), desc="decoding", disable=alone):
        where, stem = str(path), os.path.relpath(path.with_suffix(""), root)
        codes.append(codec.decompress(data, levels=levels, where=where, show_progress=alone))
        _, number, inside, _ = codec.read_header(data, where)
        numbered = [f"{stem}-{i}" for i in range(number)] if number > 1 else [stem]
        names += [name if alone else f"{stem}/{name}" for name in inside] or numbered

    # What is not as it was compressed says so, in its name and beside its pixels.
    imagined = config.imagine and levels < most
    mark = ".imagined" if imagined else ".coarse" if levels < most else ""
    suffix = mark + file_suffix(settings.channels, settings.value_range)
    facts = {"decompressed_by": codec.hashes[0].hex(), "coder_version": CODER_VERSION}
    note = json.dumps({**facts, "levels": levels, "of_levels": most, "imagined": imagined})

    # Their images.
    run.write(folder)
    files = iter(file_names(names, suffix))
    for grids in progress_bar(codes, desc="writing", disable=alone):
        for first in range(0, len(grids[0]), BATCH):
            few = [grid[first : first + BATCH] for grid in grids]
            for image in codec.decode(few, imagine=imagined, first=first):
                save_image(image, folder / next(files), settings.value_range, note)
    logger.info(f"{folder}: {len(names):,} images out of {len(contents):,} file(s).")


def read_files(names: Sequence[str]) -> dict[Path, bytes]:
    """The files that are named, or lie in folders that are, or a `UserError` if these hold none."""
    contents: dict[Path, bytes] = {}
    for given in map(Path, names):
        inside = sorted(given.rglob(f"*{SUFFIX}")) if given.is_dir() else [given]
        if not inside:
            raise UserError(f"{given} holds no {SUFFIX} file: give what vqvae2 compress wrote.")
        for path in inside:
            with open_regular(path) as file:
                contents[path] = file.read()
    return contents
