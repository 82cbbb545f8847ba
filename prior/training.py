"""Train the prior of one level from a configuration: a code dataset in, a model folder out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from prior.audit import stop_if_unsound
from prior.base import Prior
from prior.config import (
    PixelSNAILPriorConfig,
    PriorConfig,
    TrainPriorConfig,
    TransformerPriorConfig,
)
from prior.manifest import (
    SPLITS,
    CodeDataset,
    Manifest,
    column_names,
    decode_to_disk,
    fits_in_memory,
    parse_level,
    read_manifest,
)
from prior.registry import make_prior
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.artifact import load_weights, local_folder
from vqvae2.common.fit import Draw, LossFunction, fit, is_finished
from vqvae2.common.loading import ShuffledLoader
from vqvae2.common.runs import RunRecord

RECORD_NAME = "train_config.yaml"


def train_prior(config: TrainPriorConfig, *, draw: Draw | None = None) -> None:
    """Train the prior of one level; continue the run, or do nothing if it is finished.

    Args:
        draw: a picture of what the prior does now, for `fit`.

    Raises:
        UserError: no such level, no code dataset, a prior that fails a structural check (see `prior.audit`), or an output folder that holds another run.
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
    """
    folder, output_dir = Path(config.codes), Path(config.output_dir)
    manifest = read_manifest(folder)
    facts = prior_config(config, manifest)
    accelerator = make_accelerator(config, output_dir)
    hashes = {
        "encoder_hash": manifest.encoder_hash,
        "rows_hash": manifest.rows_hash,
        "codes_hash": manifest.codes_hash,
    }
    notes = {
        "codes_source": manifest.source,
        "codes_views": list(manifest.views),
        "codes_versions": manifest.versions,
    }
    run = RunRecord("train-prior", config, RECORD_NAME, facts=hashes, notes=notes)
    run.check(output_dir)
    if is_finished(output_dir, config):
        accelerator.print(f"{output_dir}: all {config.num_steps} steps are done already.")
        return
    set_seed(config.seed)
    model = make_prior(facts)
    if config.init_from is not None:
        load_weights(model, local_folder(config.init_from))
    stop_if_unsound(model, accelerator.device)
    train, validation = open_codes(config, manifest, facts.level + 1, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.write(output_dir)
    accelerator.print(
        f"{len(train)} training rows, {len(validation)} held out, level {facts.level} of {manifest.num_levels}: {facts.num_positions} codes "
        f"of {facts.codebook_sizes[-1]}, {facts.num_classes or 'no'} classes; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        f"{accelerator.device.type}, {accelerator.mixed_precision} precision"
    )
    loader = ShuffledLoader(
        train,
        config.batch_size // config.gradient_accumulation_steps,
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    rows = min(
        128, config.batch_size // (config.gradient_accumulation_steps * accelerator.num_processes)
    )  # what fits for training fits
    fit(
        accelerator,
        model,
        make_loss(facts, token_corruption=config.token_corruption),
        loader,
        config,
        output_dir,
        evaluate=(lambda net: evaluate(net, validation, accelerator, batch_size=rows))
        if len(validation)
        else None,
        draw=draw,
    )


def open_codes(
    config: TrainPriorConfig, manifest: Manifest, num_levels: int, accelerator: Accelerator
) -> tuple[CodeDataset, CodeDataset]:
    """The training and the held-out rows. What must be decoded to disk is decoded by one process of each machine, or of all that share the disk.

    Raises:
        UserError: see `CodeDataset`.
    """
    folder, cache_dir = (
        Path(config.codes),
        Path(config.codes_cache) if config.codes_cache is not None else None,
    )
    names = column_names(manifest, num_levels)
    for mine in (accelerator.is_main_process, accelerator.is_local_main_process):
        for split in SPLITS:
            if mine and not fits_in_memory(manifest, split, names):
                decode_to_disk(folder, manifest, split, names, cache_dir)
        accelerator.wait_for_everyone()
    train, validation = (
        CodeDataset(folder, manifest, split, num_levels=num_levels, cache_dir=cache_dir)
        for split in SPLITS
    )
    return train, validation


def prior_config(config: TrainPriorConfig, manifest: Manifest) -> PriorConfig:
    """The prior that the configuration asks for over the codes that the manifest describes."""
    level = parse_level(config.level, manifest.num_levels)
    facts: dict[str, Any] = {
        "level": level,
        "grids": manifest.grids[: level + 1],
        "codebook_sizes": manifest.codebook_sizes[: level + 1],
        "class_names": manifest.class_names if config.class_conditional else (),
        "label_dropout": config.label_dropout,
        "encoder_hash": manifest.encoder_hash,
        "codes_hash": manifest.codes_hash,
    }
    if config.family == "pixelsnail":
        return PixelSNAILPriorConfig(network=config.pixelsnail, **facts)
    return TransformerPriorConfig(network=config.transformer, **facts)


def make_loss(config: PriorConfig, *, token_corruption: float) -> LossFunction:
    """The loss function of stage 2 for `fit`: the mean negative log-likelihood of a code, in nats.

    Some labels are hidden (`label_dropout`), and some codes are replaced by random ones where the network reads them.
    """

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        *condition, codes = batch["codes"]
        labels = batch.get("labels") if config.num_classes else None
        if labels is not None and config.label_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < config.label_dropout
            labels = labels.masked_fill(hidden, config.num_classes)
        read = codes
        if token_corruption:
            wrong = torch.rand(codes.shape, device=codes.device) < token_corruption
            read = torch.where(wrong, torch.randint_like(codes, config.codebook_sizes[-1]), codes)
        nats = F.cross_entropy(model(read, condition, labels).float(), codes)
        return nats, {"bits_per_code": nats / math.log(2)}

    return loss_fn


def evaluate(
    model: Prior, codes: CodeDataset, accelerator: Accelerator, *, batch_size: int = 128
) -> dict[str, float]:
    """Overall figures on held-out codes, the same for any number of processes (each sees its share, none twice).

    Returns:
        `loss` and `nats`: mean negative log-likelihood of a code in nats; `bits_per_code`: the same in bits;
        `unigram_bits`: what a code of these rows would cost without any model, coded by its frequency alone; `code_bits_per_image_value`: the
        bits of this level's codes, spread over all values of the image. That is the rate of a lossy code, not a likelihood of pixels.
    """
    mine = range(accelerator.process_index, len(codes), accelerator.num_processes)
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for first in range(0, len(mine), batch_size):
        batch = send_to_device(
            codes.__getitems__(mine[first : first + batch_size]), accelerator.device
        )
        *condition, given = batch["codes"]
        logits = model(given, condition, batch.get("labels") if model.config.num_classes else None)
        total += F.cross_entropy(logits.float(), given, reduction="none").sum(dtype=torch.float64)
    nats = accelerator.reduce(total, reduction="sum").item() / (
        len(codes) * model.config.num_positions
    )
    bits = nats / math.log(2)
    rate = bits * model.config.num_positions / codes.manifest.values_per_image
    unigram_bits = codes.unigram_bits(model.config.level)
    return {
        "loss": nats,
        "nats": nats,
        "bits_per_code": bits,
        "unigram_bits": unigram_bits,
        "code_bits_per_image_value": rate,
    }
