"""`vqvae2 plan`: what a command or a recipe needs, before it starts, and whether to start it."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from pipelines.config import PlanConfig
from pipelines.plan.stages import PRECISIONS, Stage, stages_of, trace
from vqvae2.common.accelerate import (
    chosen_precision,
    processes,
    refuse_several_processes,
    use_cpu,
)
from vqvae2.common.artifact import machine_memory
from vqvae2.common.config import check
from vqvae2.common.fit import make_optimizer
from vqvae2.common.messages import progress_bar
from vqvae2.common.threads import OwnCpus
from vqvae2.distributed import alone

# What a process takes beside its tensors, in GiB, and what for each byte of them. CPU: measured,
# 1.2 to 1.5. GPU: assumed, not measured.
PROCESS, OVERHEAD = 0.45, {"cpu": 1.5, "cuda": 1.1}
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB
DAY = 86400
UNITS = {"years": 365 * DAY, "days": DAY, "hours": 3600, "minutes": 60, "seconds": 1}


def plan(config: PlanConfig) -> None:
    """Print what each stage needs, and a verdict; a `UserError` names an impossible setting."""
    refuse_several_processes()
    show_needs(config, stages_of(config))


def show_needs(config: PlanConfig, stages: list[Stage]) -> None:
    """Print what each of these stages needs where the command is to run, and a verdict."""
    # What is planned for.
    kind = config.device.replace("auto", "cpu" if use_cpu() else "cuda")
    here, memory = kind == "cpu" or torch.cuda.is_available(), config.memory_gibibytes
    allowed = "on this machine, unless --memory-gibibytes is given"
    check(here or memory is not None, "device", kind, allowed)
    if memory is None:
        on_gpu = kind == "cuda" and torch.cuda.get_device_properties(0).total_memory
        memory = (on_gpu or machine_memory()) / 2**30
    needs, speed = [], 0.0
    lines = [f"On {config.num_devices} x {kind} with {memory:,.1f} GiB:"]
    bar = progress_bar(total=2 * len(stages), leave=False)

    for stage in stages:
        # Each device computes this many rows at once, in the precision that a training chooses.
        bar.set_description(f"planning {stage.name}")
        batch_size, steps = stage.config.batch_size, stage.config.num_steps
        parts = config.num_devices * stage.config.gradient_accumulation_steps
        allowed = f"divisible by {config.num_devices} devices x accumulation steps = {parts}"
        check(batch_size % parts == 0, f"{stage.name}: batch_size", batch_size, allowed)
        asked, rows = str(stage.config.mixed_precision), batch_size // parts
        precision = chosen_precision(asked, kind) if here else asked.replace("auto", "bf16")
        num_parameters, flops, sizes = trace(stage, rows, precision, kind)
        size = sum(sizes.values())
        advice, most_rows = advise(stage, rows, sizes, (memory - PROCESS) / OVERHEAD[kind])
        bar.update()

        # Seconds of a step, from a part of it. What would take long to time or does not fit is
        # estimated from the operations, at the speed of a matrix product or an earlier stage.
        seconds, time = 0.0, "unknown"
        if here:
            speed = speed or matrix_speed(kind, precision)
            seconds = flops * stage.config.gradient_accumulation_steps / speed
            how = "estimated"
            if most_rows and flops / rows < 3 * speed:
                timed_rows = min(rows, most_rows, 1 + int(speed / 2 / flops * rows))
                passes, update = time_step(stage, timed_rows, kind, precision)
                seconds = passes * batch_size / timed_rows / config.num_devices + update
                speed, how = flops / rows * timed_rows / passes, "measured"
            time = f"{in_words(seconds * steps)}: {steps:,} steps of {seconds:,.3f} s ({how})"
        if stage.num_rows:
            epochs = steps * batch_size / stage.num_rows
            time += f", {epochs:,.1f} epochs of {stage.num_rows:,} rows"
        needs.append((stage, size, advice, seconds * steps))
        lines += [
            f"\n{stage.name}: {num_parameters:,} parameters",
            f"  batch    {batch_size} images, {rows} at once, mixed precision {precision}",
            f"  memory   {PROCESS + OVERHEAD[kind] * size:,.2f} GiB: {advice}",
            "  tensors  " + ", ".join(f"{name} {part:,.3f}" for name, part in sizes.items()),
            f"  compute  {flops * parts / 1e12:,.3g} TFLOP per step",
            f"  time     {time}",
        ]
        bar.update()
    bar.close()
    more = "a GPU" if kind == "cpu" else "more GPUs"
    print("\n".join(lines), f"\nVerdict: {verdict(needs, memory, more)}", sep="\n")


def verdict(needs: list[tuple[Stage, float, str, float]], memory: float, more: str) -> str:
    """Whether it fits and which GPU would do, and whether anybody would wait for it, in words.

    Args:
        needs: of each stage the GiB of its tensors, `advise`'s advice, and seconds (0: unknown).
        more: what would be faster, such as a GPU.
    """
    needed = PROCESS + OVERHEAD["cuda"] * max(size for _, size, *_ in needs)
    gpu = next((f"a GPU of {size} GiB" for size in GPUS if needed < size), "no single GPU")
    faults = [f"{stage.name} {advice}" for stage, _, advice, _ in needs if advice != "fits"]
    text = f"{'; '.join(faults) or f'fits into {memory:,.1f} GiB'}; as it is, {gpu} would do"
    slowest, total = max(needs, key=lambda need: need[3])[0], sum(need[3] for need in needs)
    if not total:
        return f"{text}; how long it takes can be said on such a device alone."
    text += f"; it takes {in_words(total)} on this machine, as busy as it is"
    if total <= 7 * DAY:
        return f"{text}; {more} would be faster." if total > DAY else f"{text}."
    return f"{text}, WHICH IS NOT PRACTICAL: use {more}, or {slowest.quicker} ({slowest.name})."


def in_words(seconds: float) -> str:
    """About how long that is, in a unit of which there are at least two."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= 2 * size), "seconds")
    return f"about {max(1, round(seconds / UNITS[unit])):,} {unit}"


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
    learns = any(parameter.requires_grad for parameter in model.parameters())

    def passes() -> None:
        loss = stage.loss(model, batch, precision)
        if learns:
            loss.backward()

    if not learns:  # an extraction
        return time_work(passes), 0.0
    return time_work(passes), time_work(make_optimizer(model, stage.config).step)


def step_seconds(stage: Stage) -> float:
    """Seconds of a real step of a training, measured here: of this process's rows, as many at once
    as the training takes."""
    kind, precision = processes().device.type, chosen_precision(stage.config.mixed_precision)
    parts = stage.config.gradient_accumulation_steps
    rows = max(1, stage.config.batch_size // parts // processes().num_processes)
    with alone():  # the other processes, if there are any, wait for what is chosen
        passes, update = time_step(stage, rows, kind, precision)
    return parts * passes + update


def matrix_speed(kind: str, precision: str) -> float:
    """FLOP/s of a matrix product here and now."""
    matrix = torch.ones(1024, 1024, dtype=PRECISIONS[precision], device=kind)
    return 2 * 1024**3 / time_work(lambda: matrix @ matrix)


def time_work(work: Callable[[], object]) -> float:
    """Median seconds."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    with OwnCpus(bind=use_cpu()):
        return timer.blocked_autorange(min_run_time=0.3).median
