"""Images to a code dataset: one row per image, in input order, whatever the number of processes; continues after a kill."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.config import ExtractConfig
from prior.code_shards import ShardRecord, record_shard, shard_schema, write_shard
from prior.codes import MANIFEST_NAME, SPLITS, Manifest, read_manifest, write_manifest
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import RunRecord
from vqvae2.common.machine import processes, versions
from vqvae2.data import ImageDataset, load_images, to_images
from vqvae2.model import VQVAE2
from vqvae2.training import trained_with

RECORD_NAME = "extract_config.yaml"
LANES = 32  # images encoded at once, always: the last bits of a convolution depend on the batch size, and codes must not


def extract(config: ExtractConfig) -> None:
    """Write the code dataset; continue it, or do nothing if it is finished.

    Each shard holds a fixed range of rows, and process r of n writes the shards r, r + n, ...: which rows are where depends on nothing else.

    Raises:
        UserError: bad images, no such model, or an output folder that holds another run.
    """
    output_dir = Path(config.output_dir)
    state = processes()
    model = VQVAE2.from_pretrained(config.vqvae)
    run = RunRecord("extract", config, RECORD_NAME, facts={"encoder_hash": model.content_hash()})
    run.check(output_dir)
    _refuse_other_split(config)
    if _is_finished(output_dir):
        state.print(f"{output_dir}: all codes are extracted already.")
        return
    images = load_images(config.data, model.config.image, show_progress=state.is_main_process)
    run = replace(run, facts={**run.facts, "image_names_hash": images.names_hash()})
    run.check(output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    model.to(state.device)
    sizes = model.config.codebook_size_per_level
    schema = shard_schema([h * w for h, w in model.config.grids], sizes, labelled=bool(images.class_names))
    records: dict[str, list[ShardRecord]] = {}
    for split, dataset in images.items():
        starts = range(0, len(dataset), config.shard_size)
        mine = list(enumerate(starts))[state.process_index :: state.num_processes]
        bar = tqdm(total=len(dataset), desc=f"extracting {split}", unit="image", disable=not state.is_main_process)
        written: list[ShardRecord] = []
        for number, first in mine:
            path = shard_path(output_dir, split, number)
            rows = range(first, min(first + config.shard_size, len(dataset)))
            written.append(record_shard(path, schema) if path.exists() else encode_shard(path, model, dataset, rows))
            bar.update(min(len(rows) * state.num_processes, len(dataset) - bar.n))
        bar.close()
        records[split] = sorted(gather_object(written), key=lambda shard: (len(shard.name), shard.name))
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = Manifest(
            encoder_hash=model.content_hash(),
            grids=model.config.grids,
            codebook_sizes=sizes,
            class_names=images.class_names,
            rows_hash=images.names_hash(),
            preprocessing=to_dict(model.config.image),
            train=tuple(records["train"]),
            validation=tuple(records["validation"]),
            source=config.data.path,
            versions=versions(),
        )
        write_manifest(output_dir, manifest)
    state.wait_for_everyone()


def _refuse_other_split(config: ExtractConfig) -> None:
    """The images that the autoencoder's training held out must be held out here: the priors are validated on them."""
    same, validation_path = trained_with(config.vqvae, config.data.path)
    if same and validation_path != config.data.validation_path:
        raise UserError(
            f"--data.validation-path is {config.data.validation_path!r}, but {config.vqvae} was trained with {validation_path!r}: "
            f"give the same, or images that trained the autoencoder would validate the priors."
        )


def _is_finished(output_dir: Path) -> bool:
    """Whether the manifest and every shard that it speaks of are there."""
    if not (output_dir / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(output_dir)
    return all((output_dir / split / shard.name).exists() for split in SPLITS for shard in manifest.shards(split))


def shard_path(output_dir: Path, split: str, number: int) -> Path:
    """Where a shard lies."""
    return output_dir / split / f"{number:05d}.parquet"


def encode_shard(path: Path, model: VQVAE2, dataset: ImageDataset, rows: range) -> ShardRecord:
    """Encode these rows and write them as one Parquet file, whole or not at all."""
    codes: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for first in range(0, len(rows), LANES):
        batch = dataset.__getitems__(rows[first : first + LANES])
        codes.append(encode_lanes(model, batch["images"]))
        labels += [batch["labels"]] if "labels" in batch else []
    return write_shard(
        path,
        ids=[dataset.source.ids[dataset.indices[i]] for i in rows],
        codes=[torch.cat(level).numpy() for level in zip(*codes, strict=True)],
        codebook_sizes=model.config.codebook_size_per_level,
        labels=torch.cat(labels).numpy() if labels else None,
    )


@torch.inference_mode()
def encode_lanes(model: VQVAE2, pixels: Tensor) -> list[Tensor]:
    """Codes `(B, h*w)` of every level for at most `LANES` images `(B, C, H, W)`; the batch is filled up with black ones and cut again."""
    device = next(model.parameters()).device
    padding = pixels.new_zeros(LANES - len(pixels), *pixels.shape[1:])
    levels = model.encode(to_images(torch.cat([pixels, padding]).to(device)))
    return [rearrange(level.codes[: len(pixels)], "b h w -> b (h w)").cpu() for level in levels]
