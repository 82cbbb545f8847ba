"""`vqvae2 inspect`: what an autoencoder has learned, as a page and as figures on the terminal."""

import dataclasses
import html
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from pipelines.config import InspectConfig
from pipelines.pictures import embedded
from vqvae2.codebook_stats import level_name
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_json, write_text
from vqvae2.common.loading import some_rows
from vqvae2.common.lock import writes_output
from vqvae2.common.pictures import save_picture, sheet, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.data import ImageDataset, load_images, to_images
from vqvae2.inspection import (
    Figures,
    Inspection,
    code_patches,
    decode_level,
    inspect,
    make_figures,
    make_verdicts,
)
from vqvae2.model import VQVAE2
from vqvae2.training_record import find_held_out

SHOWN_IMAGES, SHOWN_CODES, SHOWN_PATCHES = 8, 8, 8
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2rem auto;max-width:62rem}}
pre{{white-space:pre-wrap}}</style><pre>{text}</pre>
"""
logger = logging.getLogger(__name__)


def inspect_command(config: InspectConfig) -> None:
    """Inspect a trained autoencoder as the configuration says; print the figures."""
    home = Path(config.vqvae).expanduser()
    beside = home / "report" if home.is_dir() else Path(f"{home.name}_report")  # of a Hub id
    output_dir = Path(config.output_dir or beside)
    _inspect(dataclasses.replace(config, output_dir=str(output_dir)), config.output_dir is not None)


@writes_output
def _inspect(config: InspectConfig, has_own_folder: bool) -> None:
    # The model, and the folder of its report.
    state, output_dir = processes(), Path(config.output_dir or "")
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    facts = {"encoder_hash": model.content_hash()}
    run = RunRecord("inspect", config, "inspect_config.yaml", facts=facts)
    if has_own_folder:
        run.check(output_dir)

    # The held-out images, or all where there are not enough.
    data, settings = config.data, model.config.image
    images, own = find_held_out(config.vqvae, data, settings)
    split = "held-out" if own else "other"
    if len(images) < 2 and not data.streaming:
        images = load_images(data, settings).train
        split = "training" if own else "other"
    if len(images) < 2:
        what = f"{data.path} has {len(images)} images to look at, and codes are swapped"
        raise UserError(f"{what} between images: give two or more.")

    # One process does it all.
    def write() -> None:
        run.write(output_dir)
        print(write_report(model, images, output_dir, config.vqvae, split))

    on_main_process(state, write)
    logger.info("%s shows the pictures.", output_dir / "index.html")


def write_report(
    model: VQVAE2, images: ImageDataset, output_dir: Path, title: str, split: str = "held-out"
) -> str:
    """Inspect a model, write index.html, its pictures and figures.json, and return the figures as
    text. `title` names the model, and `split` the images: held-out, training or other ones."""
    # Figures, and what they mean.
    found = inspect(model, images, model.last_layer.device)
    names = [level_name(level, model.config.num_levels) for level in range(model.config.num_levels)]
    verdicts, figures = make_verdicts(names, found), make_figures(names, found)
    text = to_text(f"{title}, {len(images)} {split} images", figures, verdicts)
    about = {"images": len(images), "split": split}
    write_json(output_dir / "figures.json", {**about, **figures, "verdicts": verdicts})

    # Pictures, as files and in the page.
    caption = "Each level alone, all levels together, and the original"
    pictures = {"levels": (caption, draw_levels(model, images, found, names))}
    for level, name in enumerate(names):
        caption = f"What codes stand for: most and least used, {name}"
        pictures[f"codes_{name.replace(' ', '_')}"] = caption, draw_codes(images, found, level)
    for file_name, (_, picture) in pictures.items():
        save_picture(picture, output_dir / f"{file_name}.png")
    write_text(output_dir / "index.html", make_page(title, text, [*pictures.values()]))
    return text


@torch.no_grad()
def draw_levels(model: VQVAE2, images: ImageDataset, found: Inspection, names: list[str]) -> Image:
    """Each level alone, all of them together, and the original (the paper's figure 3)."""
    indices = some_rows(len(images), SHOWN_IMAGES)
    codes = [level[indices].to(model.last_layer.device) for level in found.codes]
    decoded = [decode_level(model, codes, found.neutral_codes, i) for i in range(len(names))]
    decoded += [model.decode_codes(codes), to_images(images.__getitems__(indices)["images"])]
    together = "both" if len(names) == 2 else "all"
    titles = [*(f"{name} only" for name in names), together, "original"]
    return sheet([to_pil(row) for row in decoded], titles)


def draw_codes(images: ImageDataset, found: Inspection, level: int) -> Image:
    """Patches of the most and least used codes, a row per code with its number and share."""
    counts = found.counts[level]
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    chosen = order if len(order) <= 2 * SHOWN_CODES else order[:SHOWN_CODES] + order[-SHOWN_CODES:]
    rows, names = [], []
    for code in chosen:
        rows.append(to_pil(code_patches(images, found.codes[level], code, number=SHOWN_PATCHES)))
        names.append(f"code {code}: {counts[code] / counts.sum():.3%}")
    return sheet(rows, names)


def to_text(title: str, figures: Figures, verdicts: Sequence[str]) -> str:
    """The tables for a terminal."""
    lines = [title]
    for table, rows in figures.items():
        columns = next(iter(rows.values()))
        lines += ["", table, " " * 14 + "".join(f"{column:>24}" for column in columns)]
        for row, values in rows.items():
            cells = [v if isinstance(v, int) else f"{v:.4g}" for v in values.values()]
            lines.append(f"  {row:12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, "", *verdicts])


def make_page(title: str, text: str, pictures: Sequence[tuple[str, Image]]) -> str:
    """One HTML file with the text as it is, and the pictures, below their captions, in it."""
    page = PAGE.format(title=html.escape(title), text=html.escape(text))
    page += "".join(embedded(caption, picture) for caption, picture in pictures)
    return f"{page}</html>\n"
