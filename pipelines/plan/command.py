"""`vqvae2 plan`: what the trainings of a recipe need, found by running one step of each on tensors without memory (`pipelines.plan.memory`)."""

import contextlib
import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from pipelines.cli import load_recipe, recipe_section
from pipelines.config import PlanConfig
from pipelines.plan.data import plan_data
from pipelines.plan.memory import AUTOCAST_TYPES, Cost, Stage, trace
from pipelines.plan.speed import hours, matrix_product_rate, timed
from prior.config import PriorConfig, TrainPriorConfig
from prior.manifest import Manifest
from prior.registry import make_prior
from prior.training import make_loss as make_prior_loss
from prior.training import prior_config
from vqvae2.common.accelerate import native_bf16, processes, use_cpu
from vqvae2.common.config import TrainingConfig, check, from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.fit import LossFunction, update_average
from vqvae2.config import TrainVQVAEConfig
from vqvae2.discriminator import AdversarialPair
from vqvae2.losses import make_adversarial_term
from vqvae2.losses import make_loss as make_vqvae_loss
from vqvae2.model import VQVAE2

GIBIBYTE = 2**30
# What a process takes over what its tensors take, Python and libraries aside. On a CPU measured: 1.2 to 1.7 for steps of 0.4 to 1.6 GiB, most of it because
# `keep_freed_memory` lets the heap grow for speed. On a GPU assumed, not measured: libraries and gaps.
OVERHEAD = {"cpu": 1.7, "cuda": 1.1}
PATIENCE = 10.0  # seconds that a measured step of a single image may take by estimate
PER_ROW = ("activations", "working", "flops")


@dataclass(frozen=True)
class Device:
    """What is planned for."""

    kind: str
    """cpu or cuda."""
    memory: int | None
    """Bytes; None if the system does not tell."""
    present: bool
    """Whether this machine has it."""

    @property
    def torch_device(self) -> torch.device:
        """For tensors that are computed with."""
        return torch.device(self.kind)

    def precision(self, config: TrainingConfig) -> str:
        """no, bf16 or fp16, as `make_accelerator` would decide there."""
        if config.mixed_precision != "auto":
            return config.mixed_precision
        return "bf16" if native_bf16() or (self.kind == "cuda" and not self.present) else "no"


@dataclass(frozen=True)
class Estimate:
    """A stage on a device: the answers."""

    stage: Stage
    device: Device
    fixed: Cost
    """`activations`, `working` and `flops` of no rows."""
    per_row: Cost
    """`activations`, `working` and `flops` of each row."""
    rows: int
    """Rows that a device computes at once."""

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return self.memory_with(self.rows)

    def memory_with(self, rows: int) -> dict[str, int]:
        """Bytes by what they are for, with so many rows at once."""
        config, each, fixed = self.stage.config, self.per_row, self.fixed
        return {
            "weights": each.weights,
            "gradients": each.learned,
            "optimizer": 2 * each.learned,
            "averaged weights": each.weights if config.weight_ema_decay else 0,
            "activations": fixed.activations + rows * each.activations,
            "working memory": max(0, fixed.working + rows * each.working),
        }

    def fits(self, rows: int) -> bool:
        """Whether a step with so many rows at once fits the device, or nobody knows how much it has."""
        return (
            self.device.memory is None
            or sum(self.memory_with(rows).values()) * OVERHEAD[self.device.kind]
            <= self.device.memory
        )

    @property
    def flops_per_step(self) -> int:
        """Of an optimizer step, over all devices."""
        return self.per_row.flops * self.stage.config.batch_size


def plan(config: PlanConfig) -> None:
    """Print the plan of every training of a recipe."""
    device = find_device(config)
    stages = stages_of(config)
    check(
        len(config.images_per_second) in (0, 1, len(stages)),
        "images_per_second", config.images_per_second, f"one number, or one for each of the {len(stages)} trainings",
    )  # fmt: skip
    rates = config.images_per_second * (len(stages) // max(1, len(config.images_per_second)))
    memory = (
        f"{device.memory / GIBIBYTE:.1f} GiB memory"
        if device.memory
        else "unknown memory (--memory-gibibytes says how much)"
    )
    kind = (
        device.kind
        if config.num_devices == 1
        else f"{config.num_devices} devices of kind {device.kind}, each"
    )
    print(f"{config.recipe} on {kind} with {memory}")
    for i, stage in enumerate(stages):
        estimate = estimate_stage(stage, device, config.num_devices)
        print(f"\n{stage.name}: {stage.title}")
        for line in report(estimate, config, rates[i] if rates else None):
            print(f"  {line}")
    print("\ndata, between the trainings")
    autoencoder, *priors = stages
    for line in plan_data(
        autoencoder, priors, config, device.torch_device if device.present else None
    ):
        print(f"  {line}")


def find_device(config: PlanConfig) -> Device:
    """The device that is planned for.

    Raises:
        UserError: CUDA is planned for where there is none, and no memory is given or a measurement is asked for.
    """
    processes()
    kind = config.device if config.device != "auto" else "cpu" if use_cpu() else "cuda"
    present = kind == "cpu" or torch.cuda.is_available()
    if not present and config.memory_gibibytes is None:
        raise UserError(
            "device is 'cuda', but this machine has none: say how much memory it has, for example --memory-gibibytes 80."
        )
    if not present and config.measure:
        raise UserError(
            "measure is True, but this machine has no CUDA device to measure on: leave --measure out."
        )
    return Device(
        kind,
        int(config.memory_gibibytes * GIBIBYTE) if config.memory_gibibytes else _memory_of(kind),
        present,
    )


def _memory_of(kind: str) -> int | None:
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return None
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than its machine
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int(limit.read_text()))
    return found


def stages_of(config: PlanConfig) -> list[Stage]:
    """The trainings that a recipe describes: the autoencoder, and a prior for each level.

    Raises:
        UserError: no such recipe, an impossible setting, or priors of levels that the autoencoder does not have.
    """
    recipe, where = load_recipe(config.recipe), f"recipe {config.recipe}"
    train = from_dict(
        TrainVQVAEConfig, recipe_section(recipe, "train"), where, missing=tyro.MISSING
    )
    num_levels = train.model.num_levels
    for name in recipe:
        if name.startswith("prior_") and int(name.removeprefix("prior_")) >= num_levels:
            raise UserError(
                f"{where}: there is a section {name}, but the autoencoder has {num_levels} levels: its last one is prior_{num_levels - 1}."
            )
    priors = [
        from_dict(
            TrainPriorConfig,
            {**recipe_section(recipe, "train-prior", str(level)), "level": str(level)},
            where,
            missing=tyro.MISSING,
        )
        for level in range(num_levels)
    ]
    return [_autoencoder(train), *(_prior(prior, train, config.num_classes) for prior in priors)]


def _autoencoder(config: TrainVQVAEConfig) -> Stage:
    image = config.model.image
    height, width = image.height_width

    def make_model() -> nn.Module:
        model = VQVAE2(config.model)
        return (
            AdversarialPair(model, config.discriminator) if config.discriminator.weight else model
        )

    def make_loss(model: Any) -> LossFunction:
        term = (
            make_adversarial_term(config.discriminator, model.autoencoder.last_layer, start=0)
            if config.discriminator.weight
            else None
        )
        return make_vqvae_loss(
            config.reconstruction_loss, config.model.codebook_size_per_level, adversarial=term
        )

    def batch(rows: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "images": torch.randint(
                256, (rows, image.channels, height, width), dtype=torch.uint8, device=device
            )
        }

    grids = ", ".join(f"{h} x {w}" for h, w in config.model.grids)
    title = f"autoencoder of images of {height} x {width} pixels and {image.channels} channels, code grids {grids}"
    notes = ("not counted: the network of the perceptual loss",) if config.perceptual.weight else ()
    return Stage("train", title, config, make_model, make_loss, batch, notes)


def _prior(config: TrainPriorConfig, train: TrainVQVAEConfig, num_classes: int) -> Stage:
    sizes = train.model.codebook_size_per_level
    manifest = Manifest(
        encoder_hash="", grids=train.model.grids, codebook_sizes=sizes, class_names=tuple(map(str, range(num_classes))),
        rows_hash="", preprocessing=None,
    )  # fmt: skip
    facts: PriorConfig = prior_config(config, manifest)

    def make_loss(model: Any) -> LossFunction:
        return make_prior_loss(facts, token_corruption=config.token_corruption)

    def batch(rows: int, device: torch.device) -> dict[str, Any]:
        grids = zip(facts.grids, facts.codebook_sizes, strict=True)
        drawn: dict[str, Any] = {
            "codes": [torch.randint(size, (rows, *grid), device=device) for grid, size in grids]
        }
        return (
            drawn | {"labels": torch.randint(num_classes, (rows,), device=device)}
            if facts.num_classes
            else drawn
        )

    height, width = facts.grids[-1]
    classes = f"{facts.num_classes or 'no'} classes"
    title = f"{config.family} prior of level {facts.level} (0 is the top), {height} x {width} codes of {facts.codebook_sizes[-1]}, {classes}"
    return Stage(f"prior_{facts.level}", title, config, lambda: make_prior(facts), make_loss, batch)


def estimate_stage(stage: Stage, device: Device, num_devices: int = 1) -> Estimate:
    """Run a stage's step twice without memory, with two and three rows: everything is linear in the rows.

    Raises:
        UserError: the batch cannot be shared out.
    """
    config = stage.config
    parts = num_devices * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"{stage.name}: batch_size is {config.batch_size}, but must be divisible by {num_devices} devices x "
            f"{config.gradient_accumulation_steps} accumulation steps = {parts}: choose a multiple."
        )
    precision = device.precision(config)
    two, three = (trace(stage, rows, precision) for rows in (2, 3))
    per_row = replace(two, **{name: getattr(three, name) - getattr(two, name) for name in PER_ROW})
    fixed = replace(
        two, **{name: getattr(two, name) - 2 * getattr(per_row, name) for name in PER_ROW}
    )
    return Estimate(stage, device, fixed, per_row, config.batch_size // parts)


def report(estimate: Estimate, config: PlanConfig, images_per_second: float | None) -> list[str]:
    """What is said about a stage."""
    stage, device = estimate.stage, estimate.device
    precision = device.precision(stage.config)
    accumulation = stage.config.gradient_accumulation_steps
    parts = "" if estimate.rows == stage.config.batch_size else f", {estimate.rows} at once"
    total = sum(estimate.memory.values())
    lines = [
        f"parameters  {estimate.per_row.num_parameters / 1e6:,.2f} M",
        f"batch       {stage.config.batch_size} images per step{parts}, {'fp32' if precision == 'no' else precision} "
        f"({'--mixed-precision bf16 would about halve the activations' if precision == 'no' else 'weights in fp32'})",
        f"memory      {_bytes(total)} = "
        + " + ".join(f"{name} {_bytes(size)}" for name, size in estimate.memory.items() if size),
        f"            {advice(estimate, accumulation)}",
        f"compute     {estimate.flops_per_step / 1e12:,.3g} TFLOP per step, forward and backward",
    ]
    return [
        *lines,
        *(f"time        {line}" for line in _time(estimate, config, images_per_second)),
        *(f"note        {note}" for note in stage.notes),
    ]


def advice(estimate: Estimate, accumulation: int) -> str:
    """Whether it fits, and what to change if it does not."""
    available, margin = (
        estimate.device.memory,
        f"with a margin of {OVERHEAD[estimate.device.kind] - 1:.0%} for what lies between tensors",
    )
    if available is None:
        return "nobody knows whether it fits: give --memory-gibibytes."
    if estimate.fits(estimate.rows):
        return f"fits the {_bytes(available)} of the device, {margin}."
    for parts in range(2, estimate.rows + 1):
        if estimate.rows % parts == 0 and estimate.fits(estimate.rows // parts):
            needed = sum(estimate.memory_with(estimate.rows // parts).values())
            return (
                f"DOES NOT FIT the {_bytes(available)} of the device, {margin}; but with --gradient-accumulation-steps {accumulation * parts} it does "
                f"({estimate.rows // parts} images at once, {_bytes(needed)}), as it does shared out over {parts} devices."
            )
    needed = sum(estimate.memory_with(1).values())
    refusal = f"DOES NOT FIT the {_bytes(available)} of the device, {margin}"
    return f"{refusal}: even a single image at once needs {_bytes(needed)}. Take a smaller network or more memory."


def _time(estimate: Estimate, config: PlanConfig, images_per_second: float | None) -> list[str]:
    batch_size, num_steps = estimate.stage.config.batch_size, estimate.stage.config.num_steps
    if images_per_second is not None:
        seconds, source = (
            batch_size / images_per_second,
            f"at the given {images_per_second:g} images/s",
        )
    elif not estimate.device.present:
        return [
            "unknown: this machine has no such device; --images-per-second makes hours of a rate that you know."
        ]
    else:
        seconds, source = step_seconds(estimate, measure=config.measure)
        seconds /= config.num_devices
        source += f", times {config.num_devices} devices" * (config.num_devices > 1)
    images = config.num_images or 1_000_000
    if config.num_images:
        epoch, all_steps = (
            f"an epoch of {images:,} images",
            f"all {num_steps:,} steps, {num_steps * batch_size / images:,.3g} epochs",
        )
    else:
        epoch, all_steps = "1,000,000 images", f"all {num_steps:,} steps"
    return [
        f"{hours(seconds * images / batch_size)} for {epoch}; {hours(seconds * num_steps)} for {all_steps}",
        f"{source}: {seconds:,.3g} s per step, {batch_size / seconds:,.3g} images/s",
    ]


def step_seconds(estimate: Estimate, *, measure: bool) -> tuple[float, str]:
    """How long one device would take for a whole step, and how that is known."""
    device, stage = estimate.device, estimate.stage
    precision = device.precision(stage.config)
    rate = matrix_product_rate(device.torch_device, AUTOCAST_TYPES[precision])
    bound = (
        estimate.flops_per_step / rate,
        f"at least, at the speed of a matrix product measured here, {rate / 1e12:,.3g} TFLOP/s",
    )
    if not measure:
        return bound
    one = estimate.per_row.flops / rate
    if one > PATIENCE or not estimate.fits(1):
        return (
            bound[0],
            f"{bound[1]} (a real step of a single image would take too long or does not fit, so none was timed)",
        )
    rows = min(estimate.rows, max(1, int(1.0 / one)))
    while rows > 1 and not estimate.fits(
        2 * rows
    ):  # twice: a measurement is no reason to fill the machine
        rows //= 2
    forward_and_backward, update = time_step(stage, rows, device.torch_device, precision)
    seconds = forward_and_backward * stage.config.batch_size / rows + update
    extrapolated = (
        ""
        if rows == stage.config.batch_size
        else f" with {rows} images, extrapolated to {stage.config.batch_size}"
    )
    return seconds, f"at the rate of a real step timed here{extrapolated}"


def time_step(stage: Stage, rows: int, device: torch.device, precision: str) -> tuple[float, float]:
    """Seconds of forward and backward with so many rows, and of the update that follows: medians of three or more, the first not counted."""
    model = stage.make_model().to(device).train()
    loss_fn = stage.make_loss(model)
    averaged = stage.make_model().to(device) if stage.config.weight_ema_decay else None
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = stage.batch(rows, device)

    def forward_and_backward() -> None:
        with torch.autocast(device.type, AUTOCAST_TYPES[precision], enabled=precision != "no"):
            loss, _ = loss_fn(model, batch)
        loss.backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            update_average(averaged, model, 1, stage.config.weight_ema_decay)

    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(times) < 4 or (len(times) < 50 and time.perf_counter() - started < 1):
        times.append((timed(forward_and_backward, device), timed(update, device)))
    return statistics.median(a for a, _ in times[1:]), statistics.median(b for _, b in times[1:])


def _bytes(number: float) -> str:
    return f"{number / GIBIBYTE:,.1f} GiB" if number >= GIBIBYTE else f"{number / 2**20:,.1f} MiB"
