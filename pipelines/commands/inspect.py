"""`vqvae2 inspect`: what an autoencoder has learned, as a page for people and the same figures on the terminal."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pipelines.config import InspectConfig
from vqvae2.codebook_stats import carriers, level_name, perplexity, usage, verdict
from vqvae2.common.accelerate import processes
from vqvae2.common.files import write_json, write_text
from vqvae2.common.pictures import save_picture, sheet, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.data import ImageDataset, held_out_images, load_images, to_images
from vqvae2.inspection import Inspection, code_patches, decode_level, inspect
from vqvae2.model import VQVAE2
from vqvae2.training import trained_with

SHOWN_IMAGES, SHOWN_CODES, SHOWN_PATCHES = 8, 8, 10


def inspect_command(config: InspectConfig) -> None:
    """Write report/index.html, its pictures and figures.json, and print the figures.

    Raises:
        UserError: no such model, or bad images.
    """
    state = processes()
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    output_dir = Path(config.output_dir or Path(config.vqvae) / "report")
    run = RunRecord(
        "inspect", config, "inspect_config.yaml", facts={"encoder_hash": model.content_hash()}
    )
    if config.output_dir is not None:
        run.check(output_dir)
    _, validation_path = trained_with(config.vqvae, config.data.path)
    data = replace(config.data, validation_path=config.data.validation_path or validation_path)
    if data.streaming:
        images, which = held_out_images(data, model.config.image), "held-out"
    else:
        splits = load_images(data, model.config.image, show_progress=state.is_main_process)
        images, which = (
            (splits.validation, "held-out")
            if len(splits.validation) > 1
            else (splits.train, "training")
        )
    found = inspect(model, images, state.device, show_progress=state.is_main_process)
    if not state.is_main_process:
        return
    names = [level_name(level, model.config.num_levels) for level in range(model.config.num_levels)]
    verdicts = make_verdicts(names, found)
    figures = make_figures(names, found)
    pictures = {"levels.png": draw_levels(model, images, found, names, state.device)}
    for level, name in enumerate(names):
        pictures[f"codes_{name.replace(' ', '_')}.png"] = draw_codes(images, found, level)
    run.write(output_dir)
    for file_name, picture in pictures.items():
        save_picture(picture, output_dir / file_name)
    write_json(
        output_dir / "figures.json",
        {"images": len(images), "split": which, **figures, "verdicts": verdicts},
    )
    write_text(
        output_dir / "index.html",
        make_page(config.vqvae, f"{len(images)} {which} images", figures, verdicts, pictures),
    )
    print(to_text(f"{config.vqvae}, {len(images)} {which} images", figures, verdicts))
    print(f"\n{output_dir / 'index.html'} shows the pictures.")


Figures = dict[str, dict[str, dict[str, float]]]


def make_figures(names: Sequence[str], found: Inspection) -> Figures:
    """Tables of numbers: title -> row -> column -> value."""
    split = found.split
    return {
        "Reconstruction": {
            "all levels": {"MSE": split.kept, "PSNR (dB)": found.psnr, "SSIM": found.ssim}
        },
        "Codebooks": {
            name: {
                "codes": len(counts),
                "used": round(usage(counts) * len(counts)),
                "perplexity": perplexity(counts),
                "codes that carry 95 %": carriers(counts),
            }
            for name, counts in zip(names, found.counts, strict=True)
        },
        "Information split: MSE with a level's codes ...": {
            name: {
                "kept": split.kept,
                "shuffled": split.shuffled[level],
                "most frequent": split.neutral[level],
                "alone kept": split.alone[level],
            }
            for level, name in enumerate(names)
        },
    }


def make_verdicts(names: Sequence[str], found: Inspection) -> list[str]:
    """What the figures mean, and which setting to change where something is wrong."""
    said = [verdict(name, counts)[1] for name, counts in zip(names, found.counts, strict=True)]
    for level, name in enumerate(names):
        ratio = found.split.shuffled[level] / max(found.split.kept, 1e-12)
        if ratio < 1.05:
            said.append(
                f"{name}: carries almost nothing: another image's codes there change the error by {ratio - 1:.1%}; make the other levels' grids coarser "
                f"(model.strides) or their codebook_sizes smaller, so that this level is needed."
            )
        else:
            said.append(
                f"{name}: is needed: another image's codes there multiply the error by {ratio:.1f}."
            )
    return said


@torch.no_grad()
def draw_levels(
    model: VQVAE2,
    images: ImageDataset,
    found: Inspection,
    names: Sequence[str],
    device: torch.device,
) -> Image.Image:
    """What each level says alone, all of them together, and the original (the paper's figure 3)."""
    number = min(SHOWN_IMAGES, len(images))
    indices = [i * len(images) // number for i in range(number)]
    codes = [level[indices].to(device) for level in found.codes]
    levels = range(len(names))
    rows = []
    for level in levels:
        rows.append(to_pil(decode_level(model, codes, found.neutral_codes, level)))
    rows += [
        to_pil(model.decode_codes(codes)),
        to_pil(to_images(images.__getitems__(indices)["images"])),
    ]
    return sheet(
        rows,
        [*(f"{name} only" for name in names), "both" if len(names) == 2 else "all", "original"],
    )


def draw_codes(images: ImageDataset, found: Inspection, level: int) -> Image.Image:
    """Patches that the most and the least used codes stand for, a row per code with its number and share."""
    counts = found.counts[level]
    order = [int(code) for code in counts.argsort(descending=True, stable=True) if counts[code] > 0]
    chosen = (
        order if len(order) <= 2 * SHOWN_CODES else [*order[:SHOWN_CODES], *order[-SHOWN_CODES:]]
    )
    rows = [
        to_pil(code_patches(images, found.codes[level], code, number=SHOWN_PATCHES))
        for code in chosen
    ]
    return sheet(rows, [f"code {code}: {counts[code] / counts.sum():.3%}" for code in chosen])


def to_text(title: str, figures: Figures, verdicts: Sequence[str]) -> str:
    """The tables for a terminal."""
    lines = [title]
    for table, rows in figures.items():
        lines += [
            "",
            table,
            f"  {'':12}" + "".join(f"{column:>24}" for column in next(iter(rows.values()))),
        ]
        lines += [
            f"  {row:12}" + "".join(f"{_number(value):>24}" for value in values.values())
            for row, values in rows.items()
        ]
    return "\n".join([*lines, "", *verdicts])


def make_page(
    title: str,
    subtitle: str,
    figures: Figures,
    verdicts: Sequence[str],
    pictures: dict[str, Image.Image],
) -> str:
    """One HTML file with the pictures in it."""
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}; errors are over pixels in [-1, 1]</p>"
    ]
    parts.append(
        "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdicts) + "</ul>"
    )
    for table, rows in figures.items():
        head = "".join(f"<th>{html.escape(column)}</th>" for column in next(iter(rows.values())))
        body = "".join(
            f"<tr><th>{html.escape(row)}</th>"
            + "".join(f"<td>{_number(value)}</td>" for value in values.values())
            + "</tr>"
            for row, values in rows.items()
        )
        parts.append(f"<h2>{html.escape(table)}</h2><table><tr><th></th>{head}</tr>{body}</table>")
    of_codes = "What codes stand for: most and least used, {}"
    captions = {
        name: of_codes.format(name.removeprefix("codes_").removesuffix(".png").replace("_", " "))
        for name in pictures
    }
    captions["levels.png"] = (
        "What each level says alone (coarser levels at their most frequent codes, finer ones left out), all together, and the original"
    )
    for name, picture in pictures.items():
        file = io.BytesIO()
        picture.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(
            f'<h2>{html.escape(captions[name])}</h2><img alt="{html.escape(captions[name])}" src="data:image/png;base64,{data}">'
        )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
