"""Train stage 1 from a configuration: images in, a model folder out."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from vqvae2.codebook_stats import level_name, perplexity, usage, verdict
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.artifact import load_weights, local_folder
from vqvae2.common.errors import UserError
from vqvae2.common.fit import Draw, fit, is_finished
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.config import TrainVQVAEConfig
from vqvae2.data import ImageDataset, PythonImages, open_training_images, to_images
from vqvae2.discriminator import AdversarialPair
from vqvae2.losses import AdversarialTerm, Perceptual, make_adversarial_term, make_loss
from vqvae2.model import VQVAE2
from vqvae2.perceptual import load_perceptual

logger = logging.getLogger(__name__)
RECORD_NAME = "train_config.yaml"
MakeDraw = Callable[[ImageDataset, torch.device], Draw]


def train(
    config: TrainVQVAEConfig,
    *,
    images: PythonImages | None = None,
    make_draw: MakeDraw | None = None,
) -> None:
    """Train the autoencoder; continue the run, or do nothing if it is finished.

    Args:
        images: {"images", "labels"} in memory, or an iterable of such rows, instead of what `config.data.path` names (see `array_source`).
        make_draw: given held-out images and the device, makes the function that draws a picture of a model (see `fit`).

    Raises:
        UserError: bad data, or an output folder that holds another run.
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
    """
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(config, output_dir)
    run = RunRecord("train", config, RECORD_NAME)
    run.check(output_dir)
    if is_finished(output_dir, config):
        accelerator.print(f"{output_dir}: all {config.num_steps} steps are done already.")
        return
    if config.discriminator.weight and accelerator.mixed_precision == "fp16":
        raise UserError(
            "mixed_precision is 'fp16', in which the gradients that the adaptive weight compares vanish: use 'bf16' or 'no' with a discriminator."
        )
    set_seed(config.seed)
    model = VQVAE2(config.model)
    if config.init_from is not None:
        load_weights(model, local_folder(config.init_from))
    perceptual = (
        load_perceptual(config.perceptual).to(accelerator.device)
        if config.perceptual.weight
        else None
    )
    source = Path(config.data.path).expanduser()
    if source.is_dir() and output_dir.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{output_dir} lies in {config.data.path}, so the run's own pictures would be trained on: choose another --output-dir."
        )
    data = open_training_images(
        config.data,
        config.model.image,
        config.batch_size // config.gradient_accumulation_steps,
        images=images,
        on_skipped=partial(_skip, output_dir, accelerator.process_index),
        show_progress=accelerator.is_main_process,
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    run = replace(run, facts=data.facts)
    run.check(output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.write(output_dir)
    if accelerator.is_main_process:
        list_skipped(output_dir, [(error.name, error.reason) for error in data.skipped])
    accelerator.print(
        f"{data.summary}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        f"{accelerator.device.type}, {accelerator.mixed_precision} precision"
    )
    draw = (
        make_draw(data.shown, accelerator.device) if make_draw and len(data.shown) else None
    )  # a stream without held-out images shows none

    # With a discriminator, what is trained is a pair; what is validated, drawn and saved is its autoencoder.
    pair = AdversarialPair(model, config.discriminator) if config.discriminator.weight else None
    adversarial: AdversarialTerm | None = None
    if pair is not None:
        start = (config.discriminator.start_step - 1) * config.gradient_accumulation_steps
        adversarial = make_adversarial_term(config.discriminator, model.last_layer, start=start)

    def evaluate_autoencoder(net: VQVAE2 | AdversarialPair) -> dict[str, float]:
        rows = min(
            64,
            config.batch_size // (config.gradient_accumulation_steps * accelerator.num_processes),
        )
        figures = evaluate(
            _autoencoder(net),
            data.validation,
            accelerator,
            perceptual=perceptual,
            kind=config.reconstruction_loss,
            batch_size=rows,
        )
        if (
            pair is None
        ):  # of a pair the last weights are kept: those that fool the discriminator are not those with the lowest error
            figures["loss"] = figures["reconstruction"] + config.perceptual.weight * figures.get(
                "perceptual", 0.0
            )
        return figures

    fit(
        accelerator,
        pair or model,
        make_loss(
            config.reconstruction_loss,
            config.model.codebook_size_per_level,
            perceptual=perceptual,
            perceptual_weight=config.perceptual.weight,
            adversarial=adversarial,
        ),
        data.loader,
        config,
        output_dir,
        evaluate=evaluate_autoencoder if len(data.validation) else None,
        draw=(lambda net: draw(_autoencoder(net))) if draw else None,
        describe=CodebookWatch(config.model.num_levels, accelerator),
        shown=[f"perplexity_{level}" for level in range(config.model.num_levels)],
        parameter_groups=pair.parameter_groups(config.discriminator) if pair is not None else None,
    )
    accelerator.wait_for_everyone()
    report_skipped(output_dir)


def _skip(output_dir: Path, process_index: int, name: str, reason: str) -> None:
    """List an image that a stream could not read."""
    logger.info("skipped %s: %s", name, reason)
    list_skipped(output_dir, [(name, reason)], process_index)


def _autoencoder(net: VQVAE2 | AdversarialPair) -> VQVAE2:
    return net.autoencoder if isinstance(net, AdversarialPair) else net


def read_training(vqvae: str) -> dict[str, Any]:
    """What a model folder says of its training; nothing where it has no record (of the Hub, or imported)."""
    path = Path(vqvae).expanduser() / RECORD_NAME
    record = read_record(path) if path.exists() else {}
    data = record.get("data")
    if record and not (
        isinstance(data, dict)
        and isinstance(data.get("path"), str)
        and isinstance(data.get("validation_path"), str | None)
    ):
        raise UserError(f"{path} is broken: its 'data' names no path; restore it, or remove it.")
    return record


def trained_with(vqvae: str, path: str) -> tuple[bool, str | None]:
    """Whether a model folder was trained on the images at `path`, and with which explicit held-out set, as its record says."""
    data = read_training(vqvae).get("data", {})
    same = bool(data) and same_place(data["path"], path)
    return same, data.get("validation_path") if same else None


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths (or URLs, or ids) name the same."""
    if one is None or other is None or "://" in one + other:
        return one == other
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def evaluate(
    model: VQVAE2,
    images: ImageDataset,
    accelerator: Accelerator,
    *,
    kind: Literal["mse", "l1"] = "mse",
    perceptual: Perceptual | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Overall figures on a set of images, the same for any number of processes (each sees its share, none twice).

    Returns:
        `mse`: mean squared error in [-1, 1] over all values; `reconstruction`: what the training minimises, the same or the mean absolute error;
        `perceptual` where there is one; `perplexity_l` and `usage_l` for each level l: the exponential of the entropy of its code frequencies over
        the whole set (K when all codes are equally frequent), and the share that occurs.
    """
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    errors = torch.zeros(
        3, dtype=torch.float64, device=accelerator.device
    )  # squared, absolute, perceptual
    counts = [
        torch.zeros(k, dtype=torch.float64, device=accelerator.device)
        for k in model.config.codebook_size_per_level
    ]
    for first in range(0, len(mine), batch_size):
        batch = to_images(
            images.__getitems__(mine[first : first + batch_size])["images"].to(accelerator.device)
        )
        reconstruction, levels = model(batch)
        clamped = reconstruction.float().clamp(-1, 1)
        errors[0] += (clamped - batch).square().sum(dtype=torch.float64)
        errors[1] += (clamped - batch).abs().sum(dtype=torch.float64)
        if perceptual is not None:
            errors[2] += perceptual(clamped, batch) * len(batch)
        for count, level in zip(counts, levels, strict=True):
            count.add_(torch.bincount(level.codes.flatten(), minlength=len(count)))
    totals: Any = accelerator.reduce([errors, *counts], reduction="sum")
    squared, absolute, seen = totals[0].tolist()
    number = len(images) * model.config.image.channels * math.prod(model.config.image.height_width)
    figures = {
        "mse": squared / number,
        "reconstruction": (squared if kind == "mse" else absolute) / number,
    }
    if perceptual is not None:
        figures["perceptual"] = seen / len(images)
    for level, count in enumerate(totals[1:]):
        figures |= {f"perplexity_{level}": perplexity(count), f"usage_{level}": usage(count)}
    return figures


class CodebookWatch:
    """Turns what `fit` averaged over a window of steps into figures, and warns on the main process while a codebook collapses."""

    PATIENCE = 200  # steps before the first warning, and between two of the same level

    def __init__(self, num_levels: int, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.names = [level_name(level, num_levels) for level in range(num_levels)]
        self.quiet_until = [self.PATIENCE] * num_levels

    def __call__(self, step: int, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
        """`sums` holds sums of `count` scalars, and in `assignments_l` how often each code of level l was chosen."""
        figures = {}
        for name, value in sums.items():
            if not name.startswith("assignments_"):
                figures[name] = value.item() / count
                continue
            level = int(name.removeprefix("assignments_"))
            figures |= {f"perplexity_{level}": perplexity(value), f"usage_{level}": usage(value)}
            healthy, sentence = verdict(self.names[level], value)
            if not healthy and step >= self.quiet_until[level] and self.accelerator.is_main_process:
                tqdm.write(f"step {step}: warning: {sentence}")
                self.quiet_until[level] = step + self.PATIENCE
        return figures
