"""Train the prior of one level from a configuration: a code dataset in, a model folder out."""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn

from prior import PixelSNAILPriorConfig, PriorConfig, TrainPriorConfig, TransformerPriorConfig
from prior.audit import stop_if_unsound, warn_of_noise
from prior.base import Prior, nats_of
from prior.manifest import CodeDataset, Manifest, parse_level, read_manifest
from prior.probes import rows_of
from prior.registry import load_prior, make_prior
from prior.vector import VectorNetwork
from vqvae2.common.accelerate import (
    check_same_images,
    describe_place,
    make_accelerator,
    on_main_process,
)
from vqvae2.common.artifact import CONFIG_NAME, check_memory
from vqvae2.common.config import as_begun, from_dict, shown, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.fit import Draw, LossFunction, fit, is_finished, load_first_weights
from vqvae2.common.loading import ShuffledLoader
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import best_validation, conclusion
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.torch_settings import settings_restored
from vqvae2.common.vocabulary import (
    MIN_HELD_OUT,
    ORIGINAL,
    SPLITS,
    TRAINING_RECORD,
    describe_vectors,
)

logger = logging.getLogger(__name__)
BEGUN = "fine_tuned"  # in the record of a fine-tuning: the prior's configuration


@settings_restored()
@writes_output
def train_prior(config: TrainPriorConfig, *, draw: Draw | None = None) -> None:
    """Train the prior of one level; continue the run, or do nothing if it is finished. `draw` is
    `fit`'s. Raises a `UserError` for no such level or codes, an unsound prior (`prior.audit`) or
    another run's folder, and `Stopped` at SIGTERM or Ctrl-C, when the state is saved."""
    # Open the manifest and the run folder, which may hold this run.
    output_dir = Path(config.output_dir)
    if (output_dir / TRAINING_RECORD).exists():
        config = as_begun(config, read_record(output_dir / TRAINING_RECORD))
    manifest = read_manifest(Path(config.codes))
    if not manifest.num_train:
        raise UserError(f"{config.codes} holds no rows to train on: extract codes of more images.")
    network = prior_config(config, manifest)
    accelerator = make_accelerator(config, output_dir)
    facts = {key: getattr(manifest, key) for key in ("encoder_hash", "rows_hash", "codes_hash")}
    notes = {f"codes_{key}": getattr(manifest, key) for key in ("source", "versions")}
    notes["codes_views"] = list(manifest.views)
    if config.init_from is not None:  # whose sizes and views count, even if it is gone one day
        notes[BEGUN] = to_dict(network)
    check_same_images(facts, manifest.num_train + manifest.num_validation)
    run = RunRecord("train-prior", config, TRAINING_RECORD, facts=facts, notes=notes)
    run.check(output_dir)
    if on_main_process(accelerator, partial(is_finished, output_dir, config)):
        logger.info("%s: %s.", output_dir, conclusion(output_dir, config))
        _warn_of_noise(output_dir)
        return

    # Make the prior, and refuse one that cannot learn before it costs hours.
    check_memory(lambda: make_prior(network))
    set_seed(config.seed)
    model = make_prior(network)
    load_first_weights(model, config, output_dir)
    stop_if_unsound(model, accelerator.device)

    # Open the codes: what is wrong with them leaves no run folder behind.
    train, validation = open_codes(config, manifest, network.level + 1, accelerator)
    if train.vectors is not None and config.init_from is None:
        values = torch.from_numpy(train.vectors[:: 1 + len(train) // 100_000].copy())
        for module in model.modules():
            if isinstance(module, VectorNetwork):
                module.normalise_as(values, attributes=bool(network.vector_names))
    if network.num_classes and train.labels is not None:
        counts = np.bincount(train.labels, minlength=network.num_classes)
        if not counts.all():
            unseen = [network.class_names[i] for i in np.flatnonzero(counts == 0)]
            text = "%s: no training image shows %s, so samples of that are of no class."
            logger.warning(text, config.codes, shown(unseen))
    on_main_process(accelerator, partial(run.write, output_dir))
    vectors = describe_vectors(network.vector_size, network.vector_names)
    vectors = f"{vectors}; " if network.vector_size else ""
    millions = model.num_parameters / 1e6
    logger.info(
        f"{len(train)} training rows, {len(validation)} held out, level {network.level} of "
        f"{manifest.num_levels}: {network.num_positions} codes of {network.codebook_sizes[-1]}, "
        f"{network.num_classes or 'no'} classes; {vectors}{millions:.2f} M parameters; "
        f"{describe_place(accelerator)}"
    )

    # Train. A forward on held-out rows has at most as many as one in training, which fits.
    rows = config.batch_size // config.gradient_accumulation_steps
    number, rank = accelerator.num_processes, accelerator.process_index
    loader = ShuffledLoader(train, rows, seed=config.seed, num_processes=number, process_index=rank)
    batch_size = min(128, rows // number)
    evaluated = None
    if len(validation) < MIN_HELD_OUT:
        text = "%d held-out rows are too few to see whether a prior memorises what it reads."
        logger.warning(text, len(validation))
    if len(validation):
        alone = validation.unigram_bits(network.level, train)
        options: dict[str, Any] = {"accelerator": accelerator, "batch_size": batch_size}
        evaluated = partial(evaluate, codes=validation, unigram_bits=alone, **options)
    loss_fn = make_loss(network, token_corruption=config.token_corruption)
    fit(accelerator, model, loss_fn, loader, config, output_dir, evaluate=evaluated, draw=draw)
    _warn_of_noise(output_dir)


def _warn_of_noise(output_dir: Path) -> None:
    if best := best_validation(output_dir):
        warn_of_noise(output_dir, best["bits_per_code"], best["unigram_bits"])


def open_codes(
    config: TrainPriorConfig, manifest: Manifest, num_levels: int, accelerator: Accelerator
) -> list[CodeDataset]:
    """The training and the held-out rows; raises as `CodeDataset`."""
    folder = Path(config.codes)
    cache = Path(config.codes_cache) if config.codes_cache is not None else None
    options: dict[str, Any] = {"num_levels": num_levels, "cache_dir": cache}
    opened: list[CodeDataset] = []
    # Codes too large for memory are decoded by one process of all that share a disk.
    for is_turn in (accelerator.is_main_process, accelerator.is_local_main_process, True):
        if is_turn and not opened:
            opened = [CodeDataset(folder, manifest, split, **options) for split in SPLITS]
        accelerator.wait_for_everyone()
    return opened


def prior_config(
    config: TrainPriorConfig, manifest: Manifest, *, num_rows: int | None = None
) -> PriorConfig:
    """The prior that the configuration asks for, over the codes that the manifest describes, and
    for this many training rows (by default those that it counts). Raises a `UserError` for a class
    of the name that means the hidden label, and for other views than the first weights know."""
    level, start = parse_level(config.level, manifest.num_levels), _first_prior(config)
    if config.class_conditional and config.label_dropout and "none" in manifest.class_names:
        what = "a class is named 'none', which in sampling means the hidden label"
        raise UserError(f"{what}: rename its folder and extract again, or set label_dropout 0.")
    facts: dict[str, Any] = {
        "level": level,
        "grids": manifest.grids[: level + 1],
        "codebook_sizes": manifest.codebook_sizes[: level + 1],
        "class_names": manifest.class_names if config.class_conditional else (),
        "label_dropout": config.label_dropout,
        "encoder_hash": manifest.encoder_hash,
        "codes_hash": manifest.codes_hash,
        "vector_size": manifest.vector_size,
        "vector_names": manifest.vector_names,
        "views": _views(config, manifest, start),
    }
    if config.family == "pixelsnail":
        return PixelSNAILPriorConfig(network=config.pixelsnail, **facts)
    rows = manifest.num_train if num_rows is None else num_rows
    options = config.transformer
    if isinstance(start, TransformerPriorConfig):
        options = options.like(start.network)  # its sizes, where none are given
    return TransformerPriorConfig(network=options.for_rows(rows), **facts)


def _first_prior(config: TrainPriorConfig) -> PriorConfig | None:
    """The configuration of the prior that a fine-tuning starts from; or of one like it, that of a
    run that has begun."""
    if config.init_from is None:
        return None
    own = Path(str(config.output_dir))
    record = own / TRAINING_RECORD
    kind = PixelSNAILPriorConfig if config.family == "pixelsnail" else TransformerPriorConfig
    with suppress(UserError):  # of a folder without a prior, which loading its weights explains
        if record.exists() and BEGUN in (begun := read_record(record)):
            return from_dict(kind, begun[BEGUN], str(record))
        return load_prior(own if (own / CONFIG_NAME).exists() else config.init_from).config
    return None


def _views(
    config: TrainPriorConfig, manifest: Manifest, start: PriorConfig | None
) -> tuple[str, ...]:
    """The views that the prior is told apart; in a fine-tuning those that its first weights know,
    of which the rows must be, if they are of several."""
    if start is None:
        return manifest.other_views if config.view_conditional else ()
    if start.views and {*manifest.views} != {ORIGINAL} and manifest.other_views != start.views:
        known, here = " ".join((ORIGINAL, *start.views)), " ".join(manifest.views)
        seen = f"{config.codes} holds the views {here}, but {config.init_from} knows {known}"
        raise UserError(f"{seen}: extract with --views {known}, or with {ORIGINAL} alone.")
    return start.views


def make_loss(config: PriorConfig, *, token_corruption: float) -> LossFunction:
    """The loss of stage 2 for `fit`: the mean negative log-likelihood of a code, in nats. Some
    labels and vectors are hidden, and some codes replaced by random ones where they are read."""

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        codes, condition, labels, views = rows_of(config, batch)
        share = torch.full(codes.shape[:1], config.label_dropout, device=codes.device)
        if labels is not None and config.label_dropout:
            hidden = torch.rand(labels.shape, device=labels.device) < config.label_dropout
            labels = labels.masked_fill(hidden, config.num_classes)
            share = torch.where(hidden, 0.5, share)  # guidance needs both hidden together
        if config.vector_size and config.label_dropout:
            hidden = torch.rand(share.shape, device=share.device) < share
            condition[-1] = condition[-1].masked_fill(hidden[:, None], torch.nan)
        read = codes
        if token_corruption:
            wrong = torch.rand(codes.shape, device=codes.device) < token_corruption
            read = torch.where(wrong, torch.randint_like(codes, config.codebook_sizes[-1]), codes)
        logits = model(read, condition, labels, views).float()
        nats = nats_of(logits, codes).mean()  # in a fixed order on CUDA
        return nats, {"bits_per_code": nats / math.log(2)}

    return loss_fn


def evaluate(
    model: Prior,
    codes: CodeDataset,
    accelerator: Accelerator,
    *,
    unigram_bits: float,
    batch_size: int = 128,
) -> dict[str, float]:
    """Figures on held-out codes, the same for any number of processes: `loss` and `nats`, the mean
    negative log-likelihood of a code, and `bits_per_code`; `unigram_bits`, what a code costs by
    frequency alone; `bits_per_code_without_condition`, where vectors are hidden in training, with
    all of them hidden; `code_bits_per_image_value`, the level's bits over all values of the image
    (a rate of a lossy code, not a likelihood of pixels)."""
    own_rows = range(accelerator.process_index, len(codes), accelerator.num_processes)
    config = model.config
    hides = (False, True) if config.vector_size and config.label_dropout else (False,)
    totals = torch.zeros(len(hides), dtype=torch.float64, device=accelerator.device)
    for first in range(0, len(own_rows), batch_size):
        batch = codes.__getitems__(own_rows[first : first + batch_size])
        given, condition, labels, _ = rows_of(config, send_to_device(batch, accelerator.device))
        for place, is_hidden in enumerate(hides):
            if is_hidden:
                condition[-1] = torch.full_like(condition[-1], torch.nan)
            logits = model(given, condition, labels).float()
            totals[place] += nats_of(logits, given).sum(dtype=torch.float64)
    num_positions = config.num_positions
    sums = accelerator.reduce(totals, reduction="sum").tolist()
    nats, *others = [total / (len(codes) * num_positions) for total in sums]
    figures = {"loss": nats, "nats": nats, "bits_per_code": nats / math.log(2)}
    figures["unigram_bits"] = unigram_bits
    if others:
        figures["bits_per_code_without_condition"] = others[0] / math.log(2)
    if num_values := codes.manifest.values_per_image:
        rate = figures["bits_per_code"] * num_positions / num_values
        figures["code_bits_per_image_value"] = rate
    return figures
