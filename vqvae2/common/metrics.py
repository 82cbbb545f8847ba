"""The figures of a run: metrics.jsonl, curves.png, and the tracker."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor

from vqvae2.common.accelerate import on_main_process
from vqvae2.common.config import TrainingConfig, from_dict, read_yaml
from vqvae2.common.errors import UserError
from vqvae2.common.files import append_text, write_text
from vqvae2.common.pictures import font_for, save_picture, sheet
from vqvae2.common.vocabulary import TRAINING_RECORD

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
RECOGNISABLE = 18  # dB of PSNR, below which pictures are blurred beyond recognition
Describe = Callable[[int, Mapping[str, Tensor], int], dict[str, float]]
Points = Sequence[tuple[float, float]]
PANEL, FRAME = (340, 240), (48, 34, 328, 216)  # width, height; left, top, right, bottom
NO_CURVES = ("step", "images", "learning_rate", "images_per_second", "data_wait_share")
FEW_STEPS = 200  # of a training, after which little can be said
COLOURS = ("#4477aa", "#cc5522", "#228833", "#aa3377", "#777777")


def scalar_means(step: int, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """The means of the scalars among the figures."""
    return {name: total.item() / count for name, total in sums.items() if total.ndim == 0}


class Metrics:
    """The figures since the last line of metrics.jsonl, summed over steps and processes.

    `describe(step, sums, count)` turns their sums over `count` batches into the line's numbers.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, config: TrainingConfig, describe: Describe
    ) -> None:
        self.path, self.accelerator = folder / METRICS_NAME, accelerator
        self.config, self.describe = config, describe
        self.sums: dict[str, Tensor] = {}
        self.count = 0  # batches in the sums

    def _start_clock(self) -> None:
        self.started, self.timed = time.perf_counter(), 0  # batches since then
        self.waited = 0.0  # seconds since then in which the loop had no batch

    def begin(self, step: int) -> None:
        """Start the tracker and the clock, and drop the lines of steps that will be repeated: a
        killed run wrote them after its last checkpoint."""
        self.accelerator.init_trackers(self.path.parent.name)
        on_main_process(self.accelerator, partial(self._drop_later, step))
        self._start_clock()

    def _drop_later(self, step: int) -> None:
        if self.path.exists():
            lines = [line for line in read_metrics(self.path.parent) if line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add the figures of one batch, without waiting for the device."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1
        self.timed += 1

    def check_finite(self, step: int) -> None:
        """Raise a `UserError` on every process if the loss was not finite at any step.

        Afterwards every process has the mean of all processes' sums: the state that is saved is the
        main process's.
        """
        if self.sums and self.accelerator.num_processes > 1:
            self.sums = self.accelerator.reduce(self.sums, reduction="mean")
        if self.sums and not math.isfinite(loss := self.sums["loss"].item()):
            raise UserError(
                f"{self.path.parent}: the loss is {loss} at step {step}; try a lower learning_rate "
                f"or --mixed-precision no in a new --output-dir (what is saved here is intact)."
            )

    def write_means(self, step: int, rate: float) -> dict[str, float]:
        """Write a line with the means since the last one, and start the next."""
        batch_size, elapsed = self.config.batch_size, time.perf_counter() - self.started
        sums = {}
        for name, total in self.sums.items():  # means of the processes; counts are to be sums
            is_count = name.startswith("assignments_")
            sums[name] = total.cpu() * (self.accelerator.num_processes if is_count else 1)
        means = self.describe(step, sums, self.count)
        steps = self.timed / self.config.gradient_accumulation_steps
        means["images_per_second"] = steps * batch_size / elapsed
        means["data_wait_share"] = self.waited / elapsed
        self.write(step, {"images": step * batch_size, "learning_rate": rate, **means})
        self.sums, self.count = {}, 0
        self._start_clock()
        return means

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, and log it to the tracker."""
        line = json.dumps({"step": step, **figures}) + "\n"
        on_main_process(self.accelerator, partial(append_text, self.path, line))
        self.accelerator.log(dict(figures), step=step)

    def write_picture(self, step: int, picture: Image.Image) -> None:
        """Log a picture to the trackers that take one."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"picture": np.asarray(picture)[None]}, step=step, **layout)

    def close(self) -> None:
        """Let the tracker finish; `accelerator.end_training` would end the process group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, but for a last one that a killed run left unfinished;
    none without the file.

    Raises UserError: another line holds no figures of a step."""
    path = run / METRICS_NAME
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    figures = []
    for number, line in enumerate(lines, start=1):
        try:
            figures.append(json.loads(line))
            int(figures[-1]["step"])
        except (ValueError, TypeError, LookupError, RecursionError):
            problem = f"line {number} of {path} is no line of figures"
            raise UserError(f"{problem}: remove that line, or restore the file.") from None
    return figures


def training_seconds(run: Path) -> float:
    """How long the steps of a run took, without validations and pauses."""
    seconds, images = 0.0, 0
    for line in read_metrics(run):
        if "images_per_second" in line:
            seconds += (line["images"] - images) / line["images_per_second"]
            images = line["images"]
    return seconds


def validations(run: Path) -> list[dict[str, float]]:
    """The held-out figures of a run, in order: step, and "loss" if the best weights are kept."""
    found = []
    for line in read_metrics(run):
        if any(name.startswith("validation/") for name in line):
            found.append({name.removeprefix("validation/"): x for name, x in line.items()})
    return found


def best_validation(run: Path) -> dict[str, float]:
    """The figures of the weights that are kept: those of the lowest loss, or without any loss the
    last; empty if there are none."""
    found = validations(run)
    with_loss = [line for line in found if "loss" in line]
    return min(with_loss or found[-1:], key=lambda line: line.get("loss", 0.0), default={})


def stopped_early(run: Path, patience: int) -> bool:
    """Whether the held-out loss has not fallen for `patience` validations (0: never so)."""
    if not patience:
        return False
    losses = [line["loss"] for line in validations(run) if "loss" in line]
    return bool(losses) and patience < len(losses) - losses.index(min(losses))


def recorded_config(run: Path) -> TrainingConfig:
    """How a run is trained, by its record."""
    path = run / TRAINING_RECORD
    record, known = read_yaml(path), {}
    for field in fields(TrainingConfig):
        if field.name in record:
            known[field.name] = record[field.name]
    return from_dict(TrainingConfig, known, str(path))


def warn_if_unfinished(run: Path) -> None:
    """Warn that a model's training goes on, if its folder says so."""
    lines = read_metrics(run)
    if not lines or not (run / TRAINING_RECORD).exists():
        return
    config, step = recorded_config(run), lines[-1]["step"]
    if step < config.num_steps and not stopped_early(run, config.patience):
        made = f"step {step:,} of {config.num_steps:,}"
        logger.warning("%s: its training is not finished (%s); its weights may change.", run, made)


def conclusion(run: Path, config: TrainingConfig) -> str:
    """Why a run ended, which weights it keeps, and whether more steps would have done it good."""
    # Why.
    found = [line for line in validations(run) if "loss" in line]
    end = f"all {config.num_steps:,} steps are done"
    if not found:
        return f"{end}; the last weights are kept, as none are chosen by a held-out loss"
    best, last = best_validation(run), found[-1]
    if last["step"] > config.num_steps:  # a finished run is asked for fewer
        end = f"all {last['step']:,} steps are done"
    if is_early := last["step"] < config.num_steps:
        since = f"the held-out loss had not fallen for {config.patience} validations"
        end = f"stopped early at step {last['step']:,}, as {since} (raise patience to go on)"

    # Which, and what would help.
    kept = f"{end}; the weights of step {best['step']:,} are kept: held-out loss {best['loss']:.4g}"
    if last["loss"] > 1.02 * best["loss"]:
        advice = "more images, random changes of them, or a smaller network (of a prior: more"
        advice += " dropout) would help, more steps would not"
        return f"{kept}; since then it has over-fitted ({last['loss']:.4g} at the end): {advice}"
    if len(found) < 3:
        return f"{kept}; with a smaller validate_every you would see whether more steps help"
    earlier = found[2 * len(found) // 3 - 1]
    if best["loss"] < 0.98 * earlier["loss"] and not is_early:
        return f"{kept}; it was still falling: a larger num_steps would help"
    # The learning rate falls to 0, so the loss of a short run flattens, too.
    is_short = config.init_from is None and config.num_steps < FEW_STEPS
    knows_nothing = best.get("bits_per_code", 0) > best.get("unigram_bits", math.inf)
    if (is_short or knows_nothing) and not is_early:
        return f"{kept}; it has hardly begun to learn: a larger num_steps would help"
    return f"{kept}; at the end it hardly fell any more: more images or a larger network may help"


def quality(mse: float) -> str:
    """An error of images in [-1, 1] as a PSNR, and what it looks like."""
    psnr, looks = psnr_of(mse), "close to the originals"
    if psnr < RECOGNISABLE:
        looks = "blurred beyond recognition"
    elif psnr < 25:
        looks = "recognisable, without fine detail"
    return f"PSNR {psnr:.1f} dB ({looks})"


def psnr_of(mse: float) -> float:
    """The PSNR in dB of an error of images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-10))


def save_curves(run: Path) -> None:
    """Write a run's curves.png: a panel for each figure of both training and held-out data; where
    there is no held-out figure, for each of training."""
    lines = read_metrics(run)
    points: dict[str, Any] = {}  # name -> (step, value) of each line
    for line in lines:
        for name, value in line.items():
            if math.isfinite(value):
                points.setdefault(name, []).append((line["step"], value))

    # The held-out loss lacks what only training pays, so its components are shown instead.
    held_out = [name.removeprefix("validation/") for name in points if "validation/" in name]
    names, panels = [name for name in held_out or points if name not in NO_CURVES], []
    for name in names:
        curves = {"training": points.get(name, []), "held out": points.get(f"validation/{name}")}
        drawn = {place: curve for place, curve in curves.items() if curve}
        if "training" in drawn and (name != "loss" or len(names) == 1):
            panels.append(draw_panel(name, drawn))
    rows = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    if rows:
        save_picture(sheet(rows), run / "curves.png")


def draw_panel(title: str, curves: dict[str, Points], *, x_name: str = "step") -> Image.Image:
    """Curves of points (x, y) in one frame, whose height the first twentieth does not set."""
    # The frame and the ranges of both axes.
    panel = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(panel), font_for([title, x_name, *curves], 11)
    draw.rectangle(FRAME, outline="#bbbbbb")
    left, top, right, bottom = FRAME
    first, last = _range(x for points in curves.values() for x, _ in points)
    low, high = _range(y for points in curves.values() for _, y in points[len(points) // 20 :])

    # The curves, and their names in the same colours.
    at = float(left)
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        x, y = np.array(points, dtype=float).T
        across = left + (right - left) * ((x - first) / (last - first))
        down = bottom - (bottom - top) * ((y.clip(low, high) - low) / (high - low))
        pixels = np.stack([across, down], axis=1).ravel().tolist()  # x, y, x, y, ...
        draw.line(pixels, fill=colour, width=2, joint="curve")
        for end in range(2, len(pixels) + 1, 2) if len(points) < 20 else [len(pixels)]:
            draw.circle(pixels[end - 2 : end], 2, fill=colour)
        draw.text((at, 18), name, fill=colour, font=font)
        at += draw.textlength(name, font) + 8

    # The title and the ends of both axes.
    draw.text((left, 4), title, "black", font)
    draw.text((2, top), f"{high:.3g}", "black", font)
    draw.text((2, bottom - 12), f"{low:.3g}", "black", font)
    draw.text((left, bottom + 4), f"{x_name} {first:.3g}", "black", font)
    draw.text((right, bottom + 4), f"{last:.6g}", "black", font, anchor="ra")
    return panel


def _range(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    return (low, high) if high > low else (low - 0.5, high + 0.5)
