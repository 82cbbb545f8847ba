"""Train stage 1 from a configuration: images in, a model folder out."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from vqvae2.code_noise import CodeNoise
from vqvae2.codebook_stats import CodebookWatch, perplexity, usage, warn_of_few
from vqvae2.common.accelerate import (
    check_same_images,
    describe_place,
    make_accelerator,
    on_main_process,
)
from vqvae2.common.artifact import check_memory
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash
from vqvae2.common.fit import fit, is_finished, load_first_weights
from vqvae2.common.loading import ordered
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import best_validation, conclusion, quality
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.common.torch_settings import settings_restored
from vqvae2.common.vocabulary import MIN_HELD_OUT, TRAINING_RECORD
from vqvae2.config import TrainVQVAEConfig, VQVAE2Config
from vqvae2.data import (
    ImageDataset,
    PythonImages,
    open_training_images,
    to_images,
)
from vqvae2.discriminator import AdversarialPair
from vqvae2.inspection import reconstruction_sheet
from vqvae2.losses import Perceptual, assignments, make_adversarial_term, make_loss
from vqvae2.model import VQVAE2
from vqvae2.perceptual import load_perceptual, perceptual_file
from vqvae2.training_record import read_training, same_place

logger = logging.getLogger(__name__)
Trained = VQVAE2 | CodeNoise | AdversarialPair


@settings_restored()
@writes_output
def train(config: TrainVQVAEConfig, *, images: PythonImages | None = None) -> None:
    """Train the autoencoder; continue the run, or do nothing if it is finished.

    Args:
        images: in place of `config.data.path`: see `vqvae2.data.load_images`.

    Raises:
        UserError: bad data, or an output folder that holds another run.
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
    """
    # The folder: new, or that of the same run.
    config = with_finetuned_model(config)
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(config, output_dir)
    record = RunRecord("train", config, TRAINING_RECORD)
    record.check(output_dir)
    if on_main_process(accelerator, partial(is_finished, output_dir, config)):
        logger.info("%s: %s.", output_dir, conclusion(output_dir, config))
        _warn_of_other_images(config)
        return
    if config.discriminator.weight and accelerator.mixed_precision == "fp16":
        raise UserError("with a discriminator, gradients vanish in fp16: use bf16 or no.")

    # The networks.
    check_memory(lambda: VQVAE2(config.model))
    set_seed(config.seed)
    model = VQVAE2(config.model)
    load_first_weights(model, config, output_dir)
    perceptual, perceptual_weight = None, config.perceptual.weight
    of_perceptual: dict[str, str] = {}
    if perceptual_weight:
        perceptual = load_perceptual(config.perceptual).to(accelerator.device)
        of_perceptual["perceptual_sha256"] = file_hash(perceptual_file(config.perceptual))

    # The images, and a record of what this run is made of.
    source = Path(config.data.path).expanduser()
    if source.is_dir() and output_dir.resolve().is_relative_to(source.resolve()):
        problem = f"{output_dir} lies in {config.data.path}"
        raise UserError(f"{problem}: its own pictures would become data; choose another folder.")
    num_parts = config.gradient_accumulation_steps

    def check_facts(facts: Mapping[str, str | None], number: int) -> None:
        check_same_images(facts, number)
        replace(record, facts={**facts, **of_perceptual}).check(output_dir)

    data = open_training_images(
        config.data,
        config.model.image,
        config.batch_size // num_parts,
        images=images,
        check_facts=check_facts,
        on_skipped=partial(_list_skipped, output_dir, accelerator.process_index),
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    check_facts(data.facts, data.number)
    record = replace(record, facts={**data.facts, **of_perceptual})
    accelerator.wait_for_everyone()

    def write_record() -> None:
        record.write(output_dir)
        list_skipped(output_dir, [(error.name, error.reason) for error in data.skipped])

    on_main_process(accelerator, write_record)
    millions = model.num_parameters / 1e6
    place = describe_place(accelerator)
    logger.info("%s; %.2f M parameters; %s", data.summary, millions, place)
    rows = getattr(data.loader, "dataset", ())  # none, of a stream
    if rows:
        warn_of_few(len(rows), config.model.codebook_size_per_level)

    # What is trained; its autoencoder is validated, drawn and saved. With a discriminator or noise
    # the last one is kept: the one with the lowest error is blurrier, or forgives less.
    trained = make_trained(model, config)
    adversarial = None
    if isinstance(trained, AdversarialPair):
        if config.discriminator.start_step > config.num_steps:
            when = f"from step {config.discriminator.start_step:,} on, after the last one"
            logger.warning(
                "the discriminator shapes images %s: lower --discriminator.start-step.", when
            )
        adversarial = make_adversarial_term(config.discriminator, model.last_layer)

    def validate(net: Trained) -> dict[str, float]:
        figures = evaluate(autoencoder_of(net), data.validation, accelerator, config, perceptual)
        # The weights with the lowest "loss" are kept, where enough images tell.
        if trained is model and len(data.validation) >= MIN_HELD_OUT:
            weighted = perceptual_weight * figures.get("perceptual", 0.0)
            figures["loss"] = figures["reconstruction"] + weighted
        return figures

    def draw(net: Trained) -> Image.Image:
        net = autoencoder_of(net)
        return reconstruction_sheet(net, data.shown, accelerator.device, num_images=16)

    # How many different features there can be, where that is known.
    num_features: list[int] = []
    if isinstance(rows, ImageDataset):
        num_features = [len(rows) * math.prod(grid) for grid in config.model.grids]

    # The training itself. A stream may hold out nothing: then nothing is validated or drawn.
    kind, sizes = config.reconstruction_loss, config.model.codebook_size_per_level
    loss_fn = make_loss(kind, sizes, perceptual, perceptual_weight, adversarial=adversarial)
    fit(
        accelerator,
        trained,
        loss_fn,
        data.loader,
        config,
        output_dir,
        evaluate=validate if len(data.validation) else None,
        draw=draw if len(data.shown) else None,
        describe=CodebookWatch(config.model.num_levels, num_features),
        shown=[f"perplexity_{level}" for level in range(config.model.num_levels)],
    )
    accelerator.wait_for_everyone()
    if best := best_validation(output_dir):
        logger.info("%s: reconstructions of held-out images: %s.", output_dir, quality(best["mse"]))
    report_skipped(output_dir)


def make_trained(model: VQVAE2, config: TrainVQVAEConfig) -> Trained:
    """The module to train: a model, perhaps with noise on its codes, perhaps a discriminator."""
    trained: VQVAE2 | CodeNoise = model
    decoder_only = config.finetune == "decoder"
    if config.code_noise or decoder_only:
        trained = CodeNoise(model, config.code_noise, decoder_only=decoder_only)
    if not config.discriminator.weight:
        return trained
    return AdversarialPair(trained, config.discriminator, config.gradient_accumulation_steps)


def autoencoder_of(net: Trained) -> VQVAE2:
    """The inverse of `make_trained`."""
    return net if isinstance(net, VQVAE2) else autoencoder_of(net.autoencoder)


def with_finetuned_model(config: TrainVQVAEConfig) -> TrainVQVAEConfig:
    """The configuration with the model whose decoder is to be fine-tuned, if one is.

    Raises:
        UserError: another model is asked for, or there is none in the folder.
    """
    if config.finetune != "decoder" or config.init_from is None:
        return config
    record = Path(config.output_dir) / TRAINING_RECORD
    if record.exists():  # a run goes on without the model that it began with
        model = from_dict(VQVAE2Config, read_record(record).get("model", {}), str(record))
    else:
        model = VQVAE2.from_pretrained(config.init_from).config
    if config.model not in (model, VQVAE2Config()):
        problem = f"the settings of the model differ from those of {config.init_from}"
        raise UserError(f"{problem}, whose decoder is fine-tuned: leave out --model and --image.")
    return replace(config, model=model)


def _warn_of_other_images(config: TrainVQVAEConfig) -> None:
    """Of a run that is finished: its images are not opened again, as they may be gone."""
    recorded = read_training(config.output_dir).get("data", {}).get("path")
    if not same_place(recorded, config.data.path):
        text = "%s was trained on %s, and nothing here on %s: choose another --output-dir for that."
        logger.warning(text, config.output_dir, recorded, config.data.path)


def _list_skipped(output_dir: Path, process_index: int, name: str, reason: str) -> None:
    logger.info("skipped %s: %s", name, reason)
    list_skipped(output_dir, [(name, reason)], process_index)


def evaluate(
    model: VQVAE2,
    images: ImageDataset,
    accelerator: Accelerator,
    config: TrainVQVAEConfig,
    perceptual: Perceptual | None = None,
) -> dict[str, float]:
    """Figures over a set of images, the same for any number of processes, which share the set.

    `mse` in [-1, 1] over all values; `reconstruction`, as the training minimises it (MSE or mean
    absolute error); `perceptual` where there is such a loss; and for each level l `perplexity_l`
    and `usage_l` over the whole set (see `vqvae2.codebook_stats`).
    """
    # Sums over this process's share: squared, absolute and perceptual errors, and code counts.
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    shares = config.gradient_accumulation_steps * accelerator.num_processes
    batch_size = min(64, config.batch_size // shares)
    sizes = (3, *model.config.codebook_size_per_level)
    sums = [torch.zeros(n, dtype=torch.float64, device=accelerator.device) for n in sizes]
    errors, *counts = sums
    pieces = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    workers = config.data.num_workers
    for rows in ordered(images.__getitems__, pieces, num_threads=workers, ahead=2 * workers):
        batch = to_images(rows["images"].to(accelerator.device))  # (B, C, H, W)
        reconstruction, levels = model(batch)
        clamped = reconstruction.float().clamp(-1, 1)
        errors[0] += (clamped - batch).square().sum(dtype=torch.float64)
        errors[1] += (clamped - batch).abs().sum(dtype=torch.float64)
        if perceptual is not None:
            errors[2] += perceptual(clamped, batch) * len(batch)
        for count, level in zip(counts, levels, strict=True):
            count.add_(assignments(level.codes, len(count)))

    # Means over all processes.
    errors, *counts = cast(list[Tensor], accelerator.reduce(sums, reduction="sum"))
    squared, absolute, perceived = errors.tolist()
    number = len(images) * model.config.image.channels * math.prod(model.config.image.height_width)
    minimised = squared if config.reconstruction_loss == "mse" else absolute
    figures = {"mse": squared / number, "reconstruction": minimised / number}
    if perceptual is not None:
        figures["perceptual"] = perceived / len(images)
    for level, count in enumerate(counts):
        figures |= {f"perplexity_{level}": perplexity(count), f"usage_{level}": usage(count)}
    return figures
