"""Every CUDA path for real, one line per check: at most 8 minutes on one H100-class card.

    python -m benchmarks.gpu                       # on a GPU
    python -m benchmarks.gpu --tiny                # small models, on a CPU too: under a minute
    python -m benchmarks.gpu --only sampling plan  # checks whose name holds one of these words

PASS and FAIL: promised or not (exit code 1 if any fails). INFO: a figure. SKIP: no GPU, or no time
left. Codes and weights come from fresh models and invented pictures: nothing is downloaded.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.commands.extract import extract
from pipelines.config import ExtractConfig, PlanConfig
from pipelines.encoding import encode_lanes
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.plan.command import OVERHEAD
from pipelines.plan.stages import stages_of, trace
from prior import Prior, SamplingConfig, load_prior, make_prior
from prior import config as p
from prior.audit import audit
from prior.cuda_graphs import RecordedCalls
from prior.noise import Noise
from prior.predictive import Guesses, choose_window
from prior.probes import fresh_copy
from prior.training import train_prior
from vqvae2 import config as c
from vqvae2.common.accelerate import processes
from vqvae2.common.fit import make_optimizer
from vqvae2.common.metrics import best_validation
from vqvae2.model import VQVAE2
from vqvae2.training import train

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("--tiny", action="store_true", help="small models and few steps")
parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
parser.add_argument("--minutes", type=float, default=8.0, help="checks that take longer are left")
parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16, of the card")
OPTIONS = parser.parse_args()
TINY, STARTED = OPTIONS.tiny, time.perf_counter()
DEVICE = processes().device
ON_GPU = DEVICE.type == "cuda"
if TINY:
    torch.set_num_threads(1)  # as fast, for such small models, and not slow beside other programs
WORK = Path(tempfile.mkdtemp(prefix="vqvae2-gpu-"))
SIZE, NUMBER, STEPS = (16, 48, 6) if TINY else (64, 1024, 100)
CHECKS: list[tuple[str, float, Callable[[], None]]] = []
FAILED: list[str] = []
WARNED: list[str] = []  # where sampling could not do what was asked, and went on more slowly


def say(mark: str, name: str, text: str) -> None:
    """One line."""
    print(f"{mark:5} {time.perf_counter() - STARTED:5.0f} s  {name}: {text}", flush=True)


def judge(name: str, good: bool, text: str) -> None:
    """A line that passes or fails."""
    if not good:
        FAILED.append(name)
    say("PASS" if good else "FAIL", name, text)


def check(seconds: float) -> Callable:
    """A check, and how long it takes on an H100: it is left out where less time is left."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        CHECKS.append((run.__name__.replace("_", " "), seconds, run))
        return run

    return register


def left() -> float:
    """Seconds until the time is up."""
    return 60 * OPTIONS.minutes - (time.perf_counter() - STARTED)


def clock() -> float:
    """Seconds, when all that was launched is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def start_memory() -> None:
    """Forget the peak of what came before."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """GiB, since `start_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0


# Small trainings: precisions, compilation, resuming, determinism.


def pictures() -> dict[str, Any]:
    """Smooth coloured pictures `(N, H, W, 3)` with a class that shows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(NUMBER) % 4
    colours = 0.4 * F.one_hot(labels, 4)[:, :3, None, None]
    coarse = torch.rand(NUMBER, 3, 5, 5, generator=generator) * 0.6 + colours
    fine = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1) * 255
    return {"images": fine.byte().permute(0, 2, 3, 1).numpy(), "labels": labels.numpy()}


def read_losses(name: str) -> list[dict]:
    """The lines of a training that report its loss."""
    lines = [json.loads(line) for line in (WORK / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def settings(steps: int) -> dict[str, Any]:
    """What all small trainings have in common."""
    every = {"validate_every": steps, "checkpoint_every": steps, "picture_every": 0, "log_every": 2}
    return {"num_steps": steps, "warmup_steps": 2, "batch_size": 16 if TINY else 64, **every}


def train_stage_1(name: str, steps: int = STEPS, kind: str = "gradient", **more: Any) -> float:
    """Train an autoencoder in the folder of that name; the last loss over the first."""
    sizes: Any = {"hidden_channels": 128, "residual_channels": 128, "codebook_sizes": (256,)}
    if TINY:
        sizes = {"hidden_channels": 8, "residual_channels": 8, "codebook_sizes": (16,)}
    sizes |= {"codebook_sizes": (512,), "code_dims": (3,)} if kind == "fsq" else {"code_dims": (8,)}
    image, quantizer = c.PreprocessingConfig(size=(SIZE,)), c.QuantizerConfig(kind=kind)
    model = c.VQVAE2Config(image=image, quantizer=quantizer, **sizes)
    facts = {**settings(steps), "output_dir": str(WORK / name), "model": model, **more}
    train(c.TrainVQVAEConfig(data=c.DataConfig(path="memory"), **facts), images=pictures())
    lines = read_losses(name)
    return lines[-1]["loss"] / lines[0]["loss"]


def precisions(train_one: Callable[..., float], name: str) -> None:
    """Train in every precision, and compiled."""
    ways = {"fp32": "no", "bf16": "bf16"}
    if ON_GPU:
        ways |= {"fp16": "fp16", "compiled": "bf16"}
    for way, precision in ways.items():
        begun, folder = clock(), f"{name.replace(' ', '_')}_{way}"
        start_memory()
        fallen = train_one(folder, mixed_precision=precision, compile=way == "compiled")
        lines, held_out = read_losses(folder), best_validation(WORK / folder)
        error = held_out.get("loss", held_out.get("mse", math.nan))  # of few images, no loss
        good = math.isfinite(error) and (fallen < 1 or TINY)
        text = f"loss x {fallen:.3f}, held out {error:.4f}"
        text += f", {lines[-1]['images_per_second']:.0f} images/s, {clock() - begun:.0f} s in all"
        judge(f"{name}, {way}", good, f"{text}, peak {peak_memory():.2f} GiB")


@check(60)
def stage_1() -> None:
    """Every precision."""
    precisions(train_stage_1, "stage 1")


@check(25)
def quantizers_and_discriminator() -> None:
    """What the default leaves out."""
    for kind in ("cosine", "gradient", "fsq"):
        fallen = train_stage_1(f"quantizer_{kind}", STEPS // 2, kind)
        judge(f"quantizer {kind}", math.isfinite(fallen), f"loss x {fallen:.3f}")
    term = c.DiscriminatorConfig(weight=0.8, start_step=1, num_layers=1, hidden_channels=16)
    more: dict[str, Any] = {"discriminator": term, "gradient_accumulation_steps": 2}
    fallen = train_stage_1("discriminator", STEPS // 2, compile=ON_GPU, **more)
    judge("discriminator, accumulation", math.isfinite(fallen), f"loss x {fallen:.3f}")


@check(40)
def resume_and_determinism() -> None:
    """A run again, and one that is continued: the same bits if --deterministic."""
    steps, half = 4, 2
    for strict in (False, True):
        runs = [f"resume_{strict}_{i}" for i in range(3)]
        first, _, resumed = (WORK / name for name in runs)
        for name in runs:
            if name == runs[2]:
                state = Path("checkpoints") / f"step_{half:08d}"
                shutil.copytree(first / state, resumed / state)
                for file in ("train_config.yaml", "metrics.jsonl"):
                    shutil.copy(first / file, resumed / file)
            more: dict[str, Any] = {"checkpoint_every": half, "keep_checkpoints": 9}
            train_stage_1(name, steps, deterministic=strict, mixed_precision="bf16", **more)
        last = Path("checkpoints") / f"step_{steps:08d}" / "model.safetensors"
        one, again, continued = (load_file(WORK / name / last) for name in runs)
        off = [max((one[k] - w[k]).abs().max().item() for k in one) for w in (again, continued)]
        good = off == [0, 0] if strict or not ON_GPU else off[1] <= 10 * off[0] + 1e-3
        text = f"run again off by {off[0]:.2g}, continued off by {off[1]:.2g}"
        judge("determinism" if strict else "resume", good, text)


@check(25)
def extraction() -> None:
    """The codes of the CPU, but for ties."""
    model = VQVAE2.from_pretrained(WORK / "stage_1_fp32")
    pixels = torch.from_numpy(pictures()["images"][:32]).permute(0, 3, 1, 2).contiguous()
    on_cpu = encode_lanes(model, pixels)
    on_device = encode_lanes(model.to(DEVICE), pixels)
    for one, other in zip(on_cpu, on_device, strict=True):
        changed = (one.cpu() != other.cpu()).float().mean().item()
        judge("extraction as on the CPU", changed < 1e-3, f"{changed:.3%} of a level changed")
    begun, source = clock(), c.ImagesConfig(path="memory")
    folders = {"vqvae": str(WORK / "stage_1_fp32"), "output_dir": str(WORK / "codes")}
    extract(ExtractConfig(data=source, **folders), images=pictures())
    judge("extraction", (WORK / "codes/manifest.json").exists(), f"{clock() - begun:.1f} s")


def train_small_prior(name: str, family: Any, level: str, **more: Any) -> float:
    """Train a prior in the folder of that name; the last loss over the first."""
    networks = {"transformer": SMALL["transformer"], "pixelsnail": SMALL["pixelsnail"]}
    where = {"codes": str(WORK / "codes"), "output_dir": str(WORK / name)}
    facts = {**settings(STEPS), **networks, **where, **more}
    train_prior(p.TrainPriorConfig(level=level, family=family, **facts))
    lines = read_losses(name)
    return lines[-1]["loss"] / lines[0]["loss"]


@check(100)
def priors() -> None:
    """Both families, every precision."""
    for family in ("transformer", "pixelsnail"):
        precisions(partial(train_small_prior, family=family, level="bottom"), family)
    train_small_prior("top", "transformer", "top")


@check(15)
def pipeline() -> None:
    """An image is a function of its seed, whatever is drawn beside it."""
    parts = [load_prior(WORK / "top"), load_prior(WORK / "transformer_bf16")]
    whole = VQVAE2Pipeline(VQVAE2.from_pretrained(WORK / "stage_1_fp32"), parts).to(DEVICE)
    options: dict[str, Any] = {"labels": [0, 1], "seed": 1, "lanes": 4, "output_type": "pt"}
    six, later = whole(6, **options), whole(2, first_index=2, **options)
    same_codes = all(map(torch.equal, [x[2:4] for x in six.codes], later.codes))
    off = (six.images[2:4] - later.images).abs().max().item()
    text = f"in another call the same codes: {same_codes}, images off by {off:.2g}"
    judge("pipeline", same_codes and off == 0, text)


# Sampling: as it is = recorded = compiled and recorded = plain, and weights that moved.

SMALL: dict[str, Any] = {
    "transformer": p.TransformerConfig(width=64, num_layers=2, num_heads=2),
    "window": p.TransformerConfig(width=64, num_layers=2, num_heads=2, attention_rows=1),
    "pixelsnail": p.PixelSNAILConfig(width=32, residual_channels=32, num_blocks=1, num_heads=2),
}
# Name -> what `sample` calls `compiled`.
WAYS: dict[str, bool | None] = {"eager": False}
if ON_GPU:
    WAYS |= {"recorded": None, "compiled": True}


def noisy_prior(family: str) -> tuple[Prior, list[Tensor], Tensor, Tensor]:
    """A bottom prior with fresh, noisy weights; a condition, labels and codes for it."""
    grids = ((1, 2), (2, 4)) if TINY else ((4, 4), (8, 8))
    kind: Any = p.PixelSNAILPriorConfig if family == "pixelsnail" else p.TransformerPriorConfig
    facts: Any = {"class_names": ("a", "b"), "label_dropout": 0.1, "codebook_sizes": (32, 32)}
    prior = make_prior(kind(level=1, grids=grids, network=SMALL[family], **facts))
    prior = fresh_copy(prior, DEVICE, noise=True)
    generator = torch.Generator().manual_seed(0)
    top, codes = (torch.randint(32, (4, *grid), generator=generator).to(DEVICE) for grid in grids)
    return prior, [top], torch.tensor([0, 1, 0, 1], device=DEVICE), codes


def calls_of(prior: Prior, call: Callable[[int], None], way: str) -> Callable[[int], None]:
    """Calls by number, recorded as `sample` does it."""
    if way == "eager":
        return call
    return RecordedCalls(call, is_special=prior.starts_row, device=DEVICE)


def forced(
    prior: Prior, given: Any, codes: Tensor, way: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits `(B, K, T)` of steps that are given codes."""
    before = F.pad(codes.flatten(1), (1, 0), value=32)
    logits = torch.zeros(len(before), before.shape[1] - 1, 32, device=DEVICE)
    place = torch.zeros_like(before[:, 0])
    step = prior.make_stepper(len(before), *given, dtype, compiled=WAYS[way])

    def call(number: int) -> None:
        found = step(number, place, before.gather(1, place[:, None]))
        logits.index_copy_(1, place[:1], found.float())
        place.add_(1)

    do = calls_of(prior, call, way)
    for number in range(logits.shape[1]):
        do(number)
    return logits.transpose(1, 2)


@check(90)
@torch.no_grad()
def sampling() -> None:
    """The logits of all ways, on two batches, and the codes of all."""
    for family in SMALL:
        for way in WAYS:
            prior, top, labels, codes = noisy_prior(family)
            begun, errors = clock(), []
            for _ in range(2):
                expected = prior(codes, top, labels).flatten(2)
                found = forced(prior, (top, labels), codes, way)
                errors.append((found - expected).abs().max().item())
                top, codes = [top[0].flip(0)], codes.flip(0)
            scale = max(1.0, expected.abs().max().item())
            text = ", ".join(f"{error:.1g}" for error in errors) + f"; {clock() - begun:.0f} s"
            judge(f"sampling {family}, {way}", max(errors) < 1e-4 * scale, f"off by {text}")

        # The codes that are drawn.
        filters = SamplingConfig(guidance_scale=1.5, top_k=16, top_p=0.95, min_p=0.01)
        for how in (SamplingConfig(), filters):
            draw = partial(prior.sample, 4, top, labels, sampling=how, seeds=range(4))
            plain = draw(plain=True)
            others = [draw(window=w, compiled=c) for w in (1, 5) for c in (False, None, None)]
            if not how.guided:
                others.append(draw(window=5, compiled=True))
            good = all(torch.equal(plain, other) for other in others)
            shares = [f"{(plain == other).float().mean().item():.1%}" for other in others]
            judge(f"codes of {family}, guided {how.guided}", good, f"as plain: {', '.join(shares)}")

        # What runs before every training; it compiles nothing.
        begun = clock()
        failed = [f"{name}: {message}" for name, passed, message in audit(prior) if not passed]
        judge(f"audit of {family}", not failed, f"{failed or 'sound'}, {clock() - begun:.1f} s")


@check(60)
@torch.no_grad()
def moved_weights() -> None:
    """Weights that move in place, as the averaged ones do, come from elsewhere, or are copied."""
    way = "recorded" if ON_GPU else "eager"
    for family in ("transformer", "pixelsnail"):
        for dtype in (torch.float32, torch.bfloat16):
            prior, top, labels, codes = noisy_prior(family)
            old, worst = copy.deepcopy(prior.state_dict()), 0.0
            for change in ("none", "moved", "loaded", "copied"):
                if change == "loaded":
                    prior.load_state_dict(old)
                if change == "copied":
                    prior = copy.deepcopy(prior)
                if change in ("moved", "copied"):
                    for parameter in prior.parameters():
                        parameter.mul_(0.7)
                expected = forced(prior, (top, labels), codes, "eager", dtype)
                off = (forced(prior, (top, labels), codes, way, dtype) - expected).abs().max()
                worst = max(worst, float(off) / expected.std().item())
            limit = 1e-3 if dtype == torch.float32 else 0.1
            judge(f"moved weights, {family}, {dtype}", worst < limit, f"off by {worst:.1g} std")


# Large models, 256 px with grids of 32 x 32 and 64 x 64: speed, memory, seconds per image.

LARGE = stages_of(PlanConfig(recipe="tiny" if TINY else "ffhq256", planned=None))


@check(100)
def plan_and_speed() -> None:
    """Model FLOP utilisation of stage 1 and both priors, and the memory that was foreseen."""
    for stage, rows in zip(LARGE, (4, 4, 4) if TINY else (64, 32, 8), strict=True):
        _, flops, sizes = trace(stage, rows, "bf16")
        for compiled in (False, True) if ON_GPU and left() > 60 else (False,):
            start_memory()
            torch._dynamo.reset()
            with torch.device(DEVICE):
                model, batch = stage.make_model().train(), stage.make_batch(rows)
            average = [weight.detach().clone() for weight in model.parameters()]
            optimizer = make_optimizer(model, stage.config)
            if compiled:
                model.compile()
            seconds, updates = [], []
            for _ in range(3 if TINY else 8):
                begun = clock()
                stage.loss(model, batch, "bf16").backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                learned = clock()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(clock() - begun)
                updates.append(begun + seconds[-1] - learned)
            typical, planned = median(seconds[1:]), sum(sizes.values())
            share = flops / typical / OPTIONS.peak_tflops / 1e12
            name = stage.name + compiled * ", compiled"
            text = (
                f"{rows} rows, median {typical * 1e3:.1f} ms a step, {rows / typical:.0f} images/s"
                f", {median(updates[1:]) * 1e3:.1f} ms of it the optimizer"
            )
            say("INFO", f"speed of {name}", f"{text}, MFU {share:.1%}, first {seconds[0]:.0f} s")
            if ON_GPU and not compiled:
                used, kind = peak_memory(), DEVICE.type
                text = f"peak {used:.2f} GiB, plan {planned:.2f} x {OVERHEAD[kind]}"
                foreseen = planned * OVERHEAD[kind]
                judge(f"plan's memory of {name}", used <= foreseen, text)
            del model, optimizer, average


@check(40)
@torch.no_grad()
def whole_grids() -> None:
    """How many steps of a PixelSNAIL cost as much as a pass over the grid, which is what a call
    takes if it guesses (see `prior.predictive`; on a GPU, where it is asked to)."""
    grid = (4, 4) if TINY else (32, 32)
    kind: Any = p.PixelSNAILPriorConfig
    network = SMALL["pixelsnail"] if TINY else p.PixelSNAILConfig()
    config = kind(level=0, grids=(grid,), codebook_sizes=(512,), network=network)
    with torch.device(DEVICE):
        prior = make_prior(config).eval()
    for rows in (1, 4) if TINY else (1, 16, 64):
        codes = torch.zeros(rows, *grid, dtype=torch.int64, device=DEVICE)
        way = "recorded" if ON_GPU else "eager"
        step = prior.make_stepper(rows, [], None, compiled=WAYS[way])
        first, before = codes[:, 0, 0] + 1, codes[:, :1, 0]  # not the start of a row
        step(0, first - 1, before)
        take = calls_of(prior, lambda number: step(1, first, before), way)  # noqa: B023
        works = {"pass": lambda _: prior(codes), "step": take}  # noqa: B023
        times = {}
        for name, work in works.items():
            for _ in range(3):
                work(1)
            begun = clock()
            for _ in range(2 if TINY else 20):
                work(1)
            times[name] = (clock() - begun) / (2 if TINY else 20)
        ratio = times["pass"] / times["step"]
        text = f"a pass takes {1e3 * times['pass']:.1f} ms, as much as {ratio:.1f} steps"
        say("INFO", f"PixelSNAIL, {rows} rows of {grid} codes", f"{text} of {math.prod(grid)}")


# The share of the positions that take a call, by the window: of an emoji64 model after 15 minutes,
# as benchmarks/sampling.py counts them. (Fresh weights have no structure to guess.)
CALLS = {1: (1.0, 1.0), 16: (0.38, 0.15), 64: (0.36, 0.052)}


@check(150)
@torch.no_grad()
def seconds_per_image() -> None:
    """The whole pipeline at several batch sizes, from some calls of each level and a decoding."""
    vqvae, *levels = LARGE
    with torch.device(DEVICE):
        decoder, all_priors = vqvae.make_model().eval(), [x.make_model().eval() for x in levels]
    for rows in (1, 4) if TINY else (1, 16, 64):
        widest = 4 if TINY else choose_window(rows, 1024, DEVICE.type)
        for way, width in product(WAYS, (1, widest)):
            if way == "compiled" and (width == 1 or rows == 16 or left() < 60):
                continue
            start_memory()
            total, starting, condition, each = 0.0, 0.0, [], []
            for prior, share in zip(all_priors, CALLS.get(width, (0.5, 0.5)), strict=True):
                positions, begun = prior.config.num_positions, clock()
                labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
                given = condition, labels if prior.config.num_classes else None
                how: Any = {"window": width, "compiled": WAYS[way]}
                step = prior.make_stepper(rows, *given, torch.bfloat16, **how)
                noise = Noise(labels, 0, positions, prior.config.codebook_sizes[-1])
                guesses = Guesses(noise, positions, SamplingConfig(), None)
                if way == "compiled":
                    guesses.compile()
                guesses.num_right.fill_(positions // 2)

                def call(number: int) -> None:
                    first, before = guesses.window(width)  # noqa: B023
                    guesses.settle(first, step(number, first, before))  # noqa: B023

                do, seconds = calls_of(prior, call, way), []
                for number in range(6 if TINY else 40):
                    if number == 4:
                        seconds.append(clock())
                    do(number)
                seconds.append(clock())
                starting += seconds[0] - begun
                each.append((seconds[1] - seconds[0]) / (number - 3))
                total += each[-1] * positions * share
                condition = [*condition, labels[:, None, None].repeat(1, *prior.config.grids[-1])]
            begun = clock()
            decoder.decode_codes(condition)
            total, times = total + clock() - begun, " and ".join(f"{s * 1e3:.2f}" for s in each)
            text = f"{total / rows:.3f} s an image in bf16 ({times} ms a call, at the middle)"
            text += f", {starting:.0f} s to start, peak {peak_memory():.2f} GiB"
            say("INFO", f"batch {rows}, {way}, window {width}", text)


def main() -> None:
    """Run the checks that were asked for, with what they need."""
    # What there is.
    logging.getLogger("prior.training").setLevel(logging.ERROR)  # so short, all learn nothing
    fallbacks = logging.getLogger("prior.cuda_graphs")
    fallbacks.addFilter(lambda record: WARNED.append(record.getMessage()) or True)  # type: ignore
    os.environ["TQDM_DISABLE"] = "1"
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    say("INFO", "environment", f"torch {torch.__version__}, {name}, cc: {shutil.which('cc')}")

    # The checks, each with those that it reads from.
    needs = {"extraction": ["stage 1"], "priors": ["stage 1", "extraction"]}
    needs["pipeline"] = ["stage 1", "extraction", "priors"]
    wanted = {name for name, *_ in CHECKS if any(word in name for word in OPTIONS.only)}
    wanted |= {needed for name in wanted for needed in needs.get(name, [])}
    for name, seconds, run in [each for each in CHECKS if each[0] in wanted]:
        if not TINY and left() < 0.6 * seconds:
            say("SKIP", name, f"{left():.0f} s left")
            continue
        try:
            run()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1])
            judge(name, False, f"{' '.join(repr(error).split())[:300]} {where}")
    judge("recording and compiling", not WARNED, f"{WARNED or 'nothing fell back'}")
    shutil.rmtree(WORK, ignore_errors=True)
    print(f"{len(FAILED)} failed: {FAILED}; {time.perf_counter() - STARTED:.0f} s")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
