"""`vqvae2 plan`: what the trainings of a recipe need, before they start."""

import contextlib
from datetime import timedelta
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch.utils.benchmark import Timer

from pipelines.config import PlanConfig
from pipelines.plan.stages import Stage, stages_of, trace
from vqvae2.common.accelerate import native_bf16, use_cpu
from vqvae2.common.config import check

# What a process takes over its tensors. CPU: measured, 1.2 to 1.7. GPU: assumed, not measured.
OVERHEAD = {"cpu": 1.7, "cuda": 1.1}
MEASURED_FLOPS = {"cpu": 2e11, "cuda": 2e13}  # of a step that takes a second or so


def plan(config: PlanConfig) -> None:
    """Print what each training of a recipe needs; a `UserError` names an impossible setting."""
    # What is planned for, and the rates of the trainings if the user knows them.
    kind = config.device.replace("auto", "cpu" if use_cpu() else "cuda")
    here, memory = kind == "cpu" or torch.cuda.is_available(), config.memory_gibibytes
    allowed = "on this machine, unless --memory-gibibytes is given and --measure is not"
    check(here or (memory is not None and not config.measure), "device", kind, allowed)
    if memory is None and kind == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory is None:
        memory = psutil.virtual_memory().total / 2**30
        with contextlib.suppress(OSError, ValueError):  # a container may have less
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    stages, rates = stages_of(config.recipe, config.num_classes), config.images_per_second
    allowed = f"one number, or one for each of the {len(stages)} trainings"
    check(len(rates) in (0, 1, len(stages)), "images_per_second", rates, allowed)
    print(f"{config.recipe} on {config.num_devices} x {kind} with {memory:,.1f} GiB")

    for i, stage in enumerate(stages):
        # Each device computes this many rows at once, in the precision that a training chooses.
        batch_size, precision = stage.config.batch_size, str(stage.config.mixed_precision)
        parts = config.num_devices * stage.config.gradient_accumulation_steps
        allowed = f"divisible by {config.num_devices} devices x accumulation steps = {parts}"
        check(batch_size % parts == 0, f"{stage.name}: batch_size", batch_size, allowed)
        if precision == "auto":
            precision = "bf16" if native_bf16() or not here else "no"
        rows = batch_size // parts
        num_parameters, flops, sizes = trace(stage, rows, precision)
        advice, most_rows = advise(stage, rows, sizes, memory / OVERHEAD[kind])

        # All devices' images per second. A measurement takes no more rows than it needs.
        rate = rates[i % len(rates)] if rates else 0.0
        if config.measure and most_rows and not rates:
            timed_rows = min(rows, most_rows, 1 + int(MEASURED_FLOPS[kind] / flops * rows))
            passes, update = time_step(stage, timed_rows, kind, precision)
            rate = batch_size / (passes * batch_size / timed_rows / config.num_devices + update)
        images, time = config.num_images or 10**6, "unknown: --measure or --images-per-second"
        if rate:
            epoch = timedelta(seconds=round(images / rate))
            run = timedelta(seconds=round(stage.config.num_steps * batch_size / rate))
            time = f"{epoch} per epoch of {images:,} images, {run} in all ({rate:,.3g} images/s)"

        print(f"\n{stage.name}: {num_parameters:,} parameters")
        print(f"  batch    {batch_size} images, {rows} at once, mixed precision {precision}")
        print(f"  memory   {sum(sizes.values()):,.3f} GiB x {OVERHEAD[kind]}: {advice}")
        print("          ", ", ".join(f"{name} {size:,.3f}" for name, size in sizes.items()))
        print(f"  compute  {flops * parts / 1e12:,.3g} TFLOP per step")
        print(f"  time     {time}")


def advise(stage: Stage, rows: int, sizes: dict[str, float], memory: float) -> tuple[str, int]:
    """Whether a step of this many rows fits, what to change if not, and how many rows would fit."""
    *constant, activations, working = sizes.values()
    most = max(0, int((memory - sum(constant)) / (activations + working) * rows))
    if most >= rows:
        return "fits", most
    if most == 0:
        return "DOES NOT FIT, not even a single image at once: use a smaller network", most
    fewer = max(number for number in range(1, most + 1) if rows % number == 0)
    steps = stage.config.gradient_accumulation_steps * rows // fewer
    return f"DOES NOT FIT: use --gradient-accumulation-steps {steps} ({fewer} images at once)", most


def time_step(stage: Stage, rows: int, kind: str, precision: str) -> tuple[float, float]:
    """Median seconds of a forward and backward pass of this many rows here, and of an update."""
    with torch.device(kind):
        model, batch = stage.make_model().train(), stage.make_batch(rows)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def seconds(work: object) -> float:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.3).median

    passes = seconds(lambda: stage.loss(model, batch, precision).backward())
    return passes, seconds(optimizer.step)
