"""`vqvae2 plan`: what a command or a recipe needs, before it starts."""

import contextlib
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch.utils.benchmark import Timer

from pipelines.config import PlanConfig
from pipelines.plan.stages import Stage, stages_of, trace
from vqvae2.common.accelerate import native_bf16, use_cpu
from vqvae2.common.config import check
from vqvae2.common.messages import progress_bar

# What a process takes over its tensors. CPU: measured, 1.2 to 1.7. GPU: assumed, not measured.
OVERHEAD = {"cpu": 1.7, "cuda": 1.1}
SPEED = {"cpu": 2e11, "cuda": 2e13}  # FLOP/s, until a step has been timed
LONGEST_ROW = 5  # seconds at that speed, above which not even one row is timed
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB
DAY = 86400
UNITS = {"years": 365 * DAY, "days": DAY, "hours": 3600, "minutes": 60, "seconds": 1}


def plan(config: PlanConfig) -> None:
    """Print what each stage needs, and a verdict; a `UserError` names an impossible setting."""
    # What is planned for.
    kind = config.device.replace("auto", "cpu" if use_cpu() else "cuda")
    here, memory = kind == "cpu" or torch.cuda.is_available(), config.memory_gibibytes
    allowed = "on this machine, unless --memory-gibibytes is given"
    check(here or memory is not None, "device", kind, allowed)
    if memory is None and kind == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory is None:
        memory = psutil.virtual_memory().total / 2**30
        with contextlib.suppress(OSError, ValueError):  # a container may have less
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    needs: list[tuple[Stage, float, str, float]] = []
    lines, speed = [f"{config.num_devices} x {kind} with {memory:,.1f} GiB"], SPEED[kind]

    for stage in progress_bar(stages_of(config), "planning", leave=False):
        # Each device computes this many rows at once, in the precision that a training chooses.
        batch_size, steps = stage.config.batch_size, stage.config.num_steps
        parts = config.num_devices * stage.config.gradient_accumulation_steps
        allowed = f"divisible by {config.num_devices} devices x accumulation steps = {parts}"
        check(batch_size % parts == 0, f"{stage.name}: batch_size", batch_size, allowed)
        precision = str(stage.config.mixed_precision)
        if precision == "auto":
            precision = "bf16" if native_bf16() or not here else "no"
        rows = batch_size // parts
        num_parameters, flops, sizes = trace(stage, rows, precision)
        advice, most_rows = advise(stage, rows, sizes, memory / OVERHEAD[kind])

        # Seconds of a step, from a second of it. What takes long or does not fit is estimated at
        # the speed of the stage before.
        timed_rows, how = min(rows, most_rows, 1 + int(speed / flops * rows)), "estimated"
        seconds = flops * stage.config.gradient_accumulation_steps / speed
        if here and timed_rows and flops / rows < LONGEST_ROW * speed:
            passes, update = time_step(stage, timed_rows, kind, precision)
            seconds = passes * batch_size / timed_rows / config.num_devices + update
            speed, how = flops / rows * timed_rows / passes, "measured"
        needs.append((stage, sum(sizes.values()), advice, seconds * steps if here else 0.0))

        time = f"{in_words(seconds * steps)}, {seconds:.2g} s a step ({how})" if here else "unknown"
        of_rows = f" of {stage.num_rows:,} rows" if stage.num_rows else ""
        epochs = f", {steps * batch_size / stage.num_rows:,.3g} epochs" if stage.num_rows else ""
        lines += [
            f"\n{stage.name}: {num_parameters:,} parameters",
            f"  batch    {batch_size} images, {rows} at once, mixed precision {precision}",
            f"  memory   {needs[-1][1]:,.3f} GiB x {OVERHEAD[kind]}: {advice}",
            "           " + ", ".join(f"{name} {size:,.3f}" for name, size in sizes.items()),
            f"  compute  {flops * parts / 1e12:,.3g} TFLOP per step",
            f"  time     {time}; {steps:,} steps{epochs}{of_rows}",
        ]
    print("\n".join(lines), f"\nVerdict: {verdict(needs, memory)}", sep="\n")


def verdict(needs: list[tuple[Stage, float, str, float]], memory: float) -> str:
    """Whether it fits, which GPU would do, and whether anybody would wait for it, in words.

    Args:
        needs: of each stage the GiB of its tensors, `advise`'s advice, and seconds (0: unknown).
        memory: of this machine, in GiB.
    """
    # Memory.
    needed = max(size for _, size, _, _ in needs) * OVERHEAD["cuda"]
    gpu = next((f"a GPU of {size} GiB" for size in GPUS if needed < size), "no single GPU")
    faults = [f"{stage.name} {advice}" for stage, _, advice, _ in needs if advice != "fits"]
    text = f"fits into {memory:,.1f} GiB ({gpu} would do)"
    if faults:
        text = f"{'; '.join(faults)} ({gpu} would do as it is)"

    # Time.
    slowest, _, _, most = max(needs, key=lambda need: need[3])
    total = sum(seconds for *_, seconds in needs)
    if not total:
        return f"{text}; how long it takes can only be said where the device is."
    text += f"; it takes {in_words(total)} on this machine"
    if total > 7 * DAY:
        return f"{text}, which is NOT PRACTICAL: use a GPU, {slowest.smaller} (for {slowest.name})."
    return f"{text}: a GPU would shorten that." if total > DAY else f"{text}."


def in_words(seconds: float) -> str:
    """About how long that is: in a unit of which there are two or more."""
    unit, size = next(((u, s) for u, s in UNITS.items() if seconds >= 2 * s), ("seconds", 1))
    return f"about {max(1, round(seconds / size)):,} {unit}"


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
        model, batch = stage.make_model(), stage.make_batch(rows)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def seconds(work: object) -> float:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.3).median

    def step() -> None:
        loss = stage.loss(model, batch, precision)
        if loss.requires_grad:  # not of an extraction
            loss.backward()

    return seconds(step), seconds(optimizer.step)
