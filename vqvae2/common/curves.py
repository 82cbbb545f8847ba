"""Training and held-out figures of a run as curves, so that over-fitting and collapse are seen at a glance."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]
PANEL, MARGIN = (340, 240), 34
COLOURS = ("#4477aa", "#cc5522", "#228833", "#aa3377", "#777777")


def run_curves(metrics: Path) -> Image.Image | None:
    """A panel for each figure that metrics.jsonl holds both of training and of held-out data; None if there is none yet."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [name.removeprefix("validation/") for name in dict.fromkeys(name for line in lines for name in line) if name.startswith("validation/")]
    panels = []
    for name in names:
        if name == "loss" and len(names) > 1:  # held out it lacks what only training pays; the figures that it is made of are all there
            continue
        curves = {"training": _points(lines, name), "held out": _points(lines, f"validation/{name}")}
        if min(map(len, curves.values())) >= 2:
            panels.append(draw_panel(name, curves))
    if not panels:
        return None
    page = Image.new("RGB", (PANEL[0] * min(3, len(panels)), PANEL[1] * math.ceil(len(panels) / 3)), "white")
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
        up = [bottom - (bottom - top) * (min(max(y, low), high) - low) / (high - low) for _, y in points]
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
    return [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
