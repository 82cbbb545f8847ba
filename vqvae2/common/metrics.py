"""The figures of a run: metrics.jsonl, curves.png, and the tracker."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_text
from vqvae2.common.pictures import save_picture

Describe = Callable[[int, Mapping[str, Tensor], int], dict[str, float]]
Points = Sequence[tuple[float, float]]
PANEL, MARGIN = (340, 240), 34
COLOURS = ("#4477aa", "#cc5522", "#228833", "#aa3377", "#777777")


class Metrics:
    """metrics.jsonl and the tracker, written by the main process; means over all steps and processes since the last line."""

    def __init__(
        self, output_dir: Path, accelerator: Accelerator, config: TrainingConfig, describe: Describe
    ) -> None:
        self.path, self.accelerator, self.config, self.describe = (
            output_dir / "metrics.jsonl",
            accelerator,
            config,
            describe,
        )
        self.name = output_dir.name
        self.sums: dict[str, Tensor] = {}
        self.count = 0  # of updates' parts in the sums
        self.timed = 0  # of those, the ones that this process's clock has seen
        self.waited = 0.0  # seconds that the loop stood still for the next batch

    def begin(self, step: int) -> None:
        """Start the clock and the tracker; drop lines of steps that a killed run made after its last checkpoint, to be made again."""
        if self.config.tracker:
            self.accelerator.init_trackers(self.name)
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            write_text(
                self.path,
                "".join(
                    line
                    for line in lines
                    if line.endswith("\n") and json.loads(line)["step"] <= step
                ),
            )
        self.started = time.perf_counter()

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1
        self.timed += 1

    def share(self) -> None:
        """Give every process the mean of the sums: the state that is saved is the main process's."""
        if self.sums and self.accelerator.num_processes > 1:
            self.sums = self.accelerator.reduce(self.sums, reduction="mean")

    def check_finite(self, step: int) -> None:
        """Stop before weights that are lost are validated or saved: a loss that was not finite at any step stays so in the sum.

        Raises:
            UserError: on every process alike.
        """
        self.share()
        if self.sums and not math.isfinite(loss := self.sums["loss"].item()):
            raise UserError(
                f"{self.path.parent}: the loss is {loss} at step {step}. The last checkpoint and the best model are intact; "
                f"try a lower learning_rate or --mixed-precision no, in a new --output-dir."
            )

    def write_means(self, step: int, rate: float) -> dict[str, float]:
        means = self.describe(step, self.sums, self.count)
        steps = self.timed / self.config.gradient_accumulation_steps
        elapsed = time.perf_counter() - self.started
        means |= {
            "images_per_second": steps * self.config.batch_size / elapsed,
            "data_wait_share": self.waited / elapsed,
        }
        self.write(step, {"images": step * self.config.batch_size, "learning_rate": rate, **means})
        self.sums, self.count, self.timed, self.waited, self.started = (
            {},
            0,
            0,
            0.0,
            time.perf_counter(),
        )
        return means

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.config.tracker:
            self.accelerator.log(dict(figures), step=step)

    def draw_curves(self) -> None:
        """curves.png: training and held-out figures over the steps."""
        picture = run_curves(self.path)
        if picture is not None:
            save_picture(picture, self.path.parent / "curves.png")

    def write_picture(self, step: int, picture: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"picture": np.asarray(picture)[None]}, step=step, **layout)

    def close(self) -> None:
        if self.config.tracker:
            self.accelerator.end_training()


def run_curves(metrics: Path) -> Image.Image | None:
    """A panel for each figure that metrics.jsonl holds both of training and of held-out data; None if there is none yet."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [
        name.removeprefix("validation/")
        for name in dict.fromkeys(name for line in lines for name in line)
        if name.startswith("validation/")
    ]
    panels = []
    for name in names:
        if (
            name == "loss" and len(names) > 1
        ):  # held out it lacks what only training pays; the figures that it is made of are all there
            continue
        curves = {
            "training": _points(lines, name),
            "held out": _points(lines, f"validation/{name}"),
        }
        if min(map(len, curves.values())) >= 2:
            panels.append(draw_panel(name, curves))
    if not panels:
        return None
    page = Image.new(
        "RGB", (PANEL[0] * min(3, len(panels)), PANEL[1] * math.ceil(len(panels) / 3)), "white"
    )
    for i, panel in enumerate(panels):
        page.paste(panel, (i % 3 * PANEL[0], i // 3 * PANEL[1]))
    return page


def draw_panel(title: str, curves: dict[str, Points], *, x_name: str = "step") -> Image.Image:
    """Curves in one frame; the first twentieth of the points does not set its height, so that the rest can be seen."""
    width, height = PANEL
    panel = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(11)
    first, last = _range(x for points in curves.values() for x, _ in points)
    low, high = _range(y for points in curves.values() for _, y in points[len(points) // 20 :])
    left, top, right, bottom = MARGIN + 14, MARGIN, width - 12, height - 24
    draw.rectangle((left, top, right, bottom), outline="#bbbbbb")
    for points, colour in zip(curves.values(), COLOURS, strict=False):
        across = [left + (right - left) * (x - first) / (last - first) for x, _ in points]
        up = [
            bottom - (bottom - top) * (min(max(y, low), high) - low) / (high - low)
            for _, y in points
        ]
        draw.line(list(zip(across, up, strict=True)), fill=colour, width=2, joint="curve")
    draw.text((left, 4), title, fill="black", font=font)
    for i, (name, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        draw.text((left + 70 * i, 18), name, fill=colour, font=font)
    for value, y in ((high, top), (low, bottom - 12)):
        draw.text((2, y), f"{value:.3g}", fill="black", font=font)
    draw.text((left, bottom + 4), f"{x_name} {first:.3g}", fill="black", font=font)
    draw.text((right, bottom + 4), f"{last:.6g}", fill="black", font=font, anchor="ra")
    return panel


def _points(lines: Iterable[dict[str, float]], name: str) -> Points:
    return [
        (line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])
    ]


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
