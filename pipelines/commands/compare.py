"""`vqvae2 compare`: do several levels serve a user's own images better than one?"""

import html
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from pipelines.cli import load_recipe
from pipelines.commands.run import (
    RECIPE,
    choose_for,
    finished,
    recipe_facts,
    run_stages,
    settings_of,
    start_stage,
    threads_for,
    with_given,
)
from pipelines.config import CompareConfig
from pipelines.evaluation import report
from pipelines.evaluation.figures import Figures, refuse_too_few
from pipelines.pictures import embedded
from pipelines.plan.command import step_seconds
from prior.manifest import read_manifest
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.config import check, merged, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json, write_text
from vqvae2.common.loading import some_rows
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.metrics import (
    RECOGNISABLE,
    best_validation,
    psnr_of,
    quality,
    training_seconds,
)
from vqvae2.common.pictures import sheet, to_pil
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.vocabulary import INDEX_NAME, describe_grids
from vqvae2.config import VQVAE2Config
from vqvae2.data import load_images, to_images
from vqvae2.model import VQVAE2

logger = logging.getLogger(__name__)
STRIDES = {"one level": (4,), "two levels": (2, 4), "three levels": (2, 2, 4)}
ONE, *SEVERAL = STRIDES
MULTIPLE = 16  # of a side in pixels: the product of three levels' strides
CHANCE = {"MSE": 0.03, "distance of samples": 0.1}  # shares by which other seeds differ too
PURPOSES = {  # figure -> what, better than one level, worse, or alike
    "MSE": (
        "pictures come back",
        "with {:.0%} less error",
        "with at least {:.0%} more error",
        "about as exactly",
    ),
    "distance of samples": (
        "new pictures are",
        "{:.0%} closer to real ones",
        "at least {:.0%} farther from real ones",
        "about as close to real ones",
    ),
}
SMALL = {"width": 128, "num_layers": 3, "num_heads": 2}  # priors
ROUNDS = 3  # in which steps are timed
SHOWN = 12  # held-out images
REPORT = Path("evaluation", "report", "figures.json")
MEANINGS = {
    "codes": "the grids, and the codebook size of each",
    "bits per image": "what an image takes; equal, to be fair",
    "codes in use": "those that occur in held-out images",
    "MSE, PSNR": "how exactly held-out images come back: low error, high decibels",
    "with the priors": "what an image still takes if one knows what is usual",
    "distance": "how far images as a set are from real ones, 0 at best: reconstructions show what "
    "the autoencoder loses, samples also what the priors lose, real images what chance does",
}


@writes_output
def compare(config: CompareConfig) -> None:
    """Choose, train and evaluate models of one, two and three levels, and show them side by side.
    Raises `Stopped` at SIGTERM or Ctrl-C; running it again continues."""
    # The first process chooses for all.
    root, state = Path(config.output_dir), processes()
    record = RunRecord("compare", config, "compare_config.yaml", facts=recipe_facts(config))
    record.check(root)
    state.wait_for_everyone()
    on_main_process(state, partial(write_recipes, config, record))

    # All stages of each, and how good they are.
    for number, name in enumerate(STRIDES, 1):
        folder, data = folder_of(root, name), to_dict(config.data)
        logger.info(f"\nModel {number} of {len(STRIDES)}: {name} -> {folder}")
        recipe = load_recipe(str(folder / RECIPE))
        run_stages(recipe, folder, data)
        on_main_process(state, partial(remove_outdated, folder))
        if not (folder / REPORT).exists():
            start_stage(
                recipe,
                "evaluate",
                f"{folder}/evaluation",
                pipeline=f"{folder}/pipeline",
                data=data,
            )

    # Side by side.
    if state.is_main_process:
        logger.info("\n%s\n\n%s shows all of it.", write_page(config), root / "index.html")


def folder_of(root: Path, name: str) -> Path:
    """Where the model of this name is."""
    return root / f"levels_{len(STRIDES[name])}"


# Before


def write_recipes(config: CompareConfig, record: RunRecord) -> None:
    """The recipes that are not there yet, and the record of the command."""
    root = Path(config.output_dir)
    missing = [name for name in STRIDES if not (folder_of(root, name) / RECIPE).exists()]
    if missing:
        recipes = make_recipes(config)
        record.write(root)
        for name in missing:
            write_text(folder_of(root, name) / RECIPE, recipes[name])


def make_recipes(config: CompareConfig) -> dict[str, str]:
    """The recipe of each model as YAML: as many bits of an image, and steps that take as long."""
    # Two levels as `vqvae2 run` would choose them; the others will have their bits.
    choice, given, seen = choose_for(config, MULTIPLE)
    for level in (0, 1):  # any level's are like those of the last
        choice.recipe[f"prior_{level}"]["transformer"] |= SMALL
    own = _of_levels(given, 2)
    if own.get("sample") != given.get("sample"):
        left_out = "what the recipe says of each level's sampling is left out"
        choice.reasons.append(f"{left_out}: all models are sampled alike")
    recipe, stages = with_given(choice.recipe, own, seen, settings_of(config))
    model: VQVAE2Config = stages[0].config.model  # type: ignore[attr-defined]
    if model.strides != STRIDES["two levels"] or model.quantizer.kind == "fsq":
        what = f"the recipe {config.recipe} sets model.strides, or the quantizer fsq"
        raise UserError(f"{what}, but compare chooses grids and codebooks itself: leave that out.")
    for side in model.image.height_width:
        allowed = f"divisible by {MULTIPLE}, which three levels need"
        check(side % MULTIPLE == 0, "image.size", model.image.height_width, allowed)
    held_out_share = 0 if seen.has_own_split else model.image.validation_fraction
    if not (seen.has_own_split or held_out_share):
        what = f"{config.data.path} has {seen.number} images, too few to hold some out"
        raise UserError(f"{what}, by which compare judges: give more, or --data.validation-path.")
    refuse_too_few(config.data.path, round((1 - held_out_share) * seen.number))

    # They differ in their levels alone, and in how many steps they make.
    threads, drafts = threads_for(stages[0]), {}
    for name, sizes in equal_sizes(model).items():
        levels = {"strides": [*STRIDES[name]], "codebook_sizes": [*sizes]}
        own = merged(_of_levels(given, len(STRIDES[name])), {"train": {"model": levels}})
        recipe, stages = with_given(choice.recipe, own, seen, settings_of(config))
        network: VQVAE2Config = stages[0].config.model  # type: ignore[attr-defined]
        reasons = [*choice.reasons, f"but, to compare, {name}: {network.summary()}"]
        bits = bits_of(network.grids, network.codebook_size_per_level)
        reasons.append(f"{bits:,.1f} bits of an image; small priors, of width 128")
        drafts[name] = recipe, stages, reasons

    # Steps are timed in turn, so that other programs slow down all models alike.
    stages = [stage for _, each, _ in drafts.values() for stage in each]
    seconds: dict[int, list[float]] = {}
    for stage in progress_bar(stages * ROUNDS, desc="timing steps", leave=False):
        seconds.setdefault(id(stage), []).append(step_seconds(stage))
    recipes = {}
    for name, draft in drafts.items():
        recipes[name] = finished(
            *draft,
            timed=lambda stage: median(seconds[id(stage)]),
            budget=f"{config.minutes:g}m",
            threads=threads,
            num_images=seen.number,
        )
    return recipes


def _of_levels(given: dict[str, Any], number: int) -> dict[str, Any]:
    """A recipe without its sections for the priors of levels that others of the models have, and
    without what it says of each level's sampling: all models are sampled alike."""
    others = {f"prior_{level}" for level in range(number, max(map(len, STRIDES.values())))}
    own = {name: section for name, section in given.items() if name not in others}
    if isinstance(own.get("sample"), dict):
        settings = own["sample"].items()
        own["sample"] = {key: x for key, x in settings if not isinstance(x, list) or len(x) == 1}
    return own


def equal_sizes(model: VQVAE2Config) -> dict[str, tuple[int, ...]]:
    """Of each model the codebook sizes with which an image has as many bits as in this one of two
    levels, to the nearest whole number of codes."""
    bits, sizes = bits_of(model.grids, model.codebook_size_per_level), {}
    for name, strides in STRIDES.items():
        grids = replace(model, strides=strides, codebook_sizes=(2,), code_dims=(1,)).grids
        size = max(2, round(2 ** (bits / sum(map(math.prod, grids)))))
        sizes[name] = model.codebook_sizes if strides == model.strides else (size,)
    return sizes


def bits_of(grids: Sequence[Sequence[int]], sizes: Sequence[int]) -> float:
    """Bits of an image whose codes are all equally likely."""
    return sum(math.prod(grid) * math.log2(size) for grid, size in zip(grids, sizes, strict=True))


# After


def remove_outdated(folder: Path) -> None:
    """Remove the evaluation of models that have been trained further since."""
    record = folder / "evaluation" / "evaluate_config.yaml"
    seen = read_record(record) if record.exists() else {}
    index = read_json(folder / "pipeline" / INDEX_NAME)
    hashes = [name for name in seen if name.endswith("_hash") and name in index]
    if any(index[name] != seen[name] for name in hashes):
        shutil.rmtree(folder / "evaluation")


def write_page(config: CompareConfig) -> str:
    """Write compare.json and index.html; returns the answer and the table as text."""
    # Figures by model, which the same eyes have seen, and by row of the table.
    root, found, models = Path(config.output_dir), {}, {}
    for name in STRIDES:
        folder = folder_of(root, name)
        found[name] = read_json(folder / REPORT)
        models[name] = figures_of(folder, found[name])
    report.refuse_other_eyes(found)
    extractor = found[ONE]["extractor"]
    rows = {figure: {name: models[name][figure] for name in STRIDES} for figure in models[ONE]}
    lines = summary(rows, extractor["distance_name"])
    write_json(root / "compare.json", {"summary": lines, "models": models, "extractor": extractor})

    # In words, and as a table.
    table: Any = report.named({"": rows}, extractor)[""]
    answer, *others = map(html.escape, lines)
    body = [f"<p><b>{answer}</b></p><ul>", *(f"<li>{line}" for line in others), "</ul>"]
    body.append(report.html_table(table))
    meanings = report.named({"": MEANINGS}, extractor)[""].items()
    explained = "; ".join(f"<b>{key}</b>: {text}" for key, text in meanings)
    body.append(f"<p><small>{explained}.</small></p>")

    # Pictures, and where there is more.
    body.append(embedded("Held-out images, and what each makes of them", reconstructions(config)))
    body.append('<div style="display:flex;gap:1rem">')
    for name in STRIDES:
        with Image.open(folder_of(root, name) / "samples" / "samples.png") as picture:
            shown = embedded(f"Samples of {name}", picture)
        page = (folder_of(root, name) / REPORT).with_name("index.html").relative_to(root)
        body.append(f'<div style="flex:1">{shown}<a href="{page}">All about it</a></div>')
    body.append("</div>")
    title = html.escape(f"Does hierarchy help? {Path(config.data.path).name}")
    write_text(root / "index.html", report.PAGE.format(title=title, body="\n".join(body)))
    return "\n".join([*lines, "", report.as_text(table)])


def figures_of(folder: Path, found: Figures) -> Figures:
    """A model's column of the table, from its folder and its evaluation."""
    # What it spends.
    manifest = read_manifest(folder / "codes")
    grids, sizes = manifest.grids, manifest.codebook_sizes
    positions = [math.prod(grid) for grid in grids]
    priors = [folder / f"prior_{level}" for level in range(len(grids))]
    own_bits = [best_validation(prior)["bits_per_code"] for prior in priors]
    total = sum(number * bits for number, bits in zip(positions, own_bits, strict=True))
    used = [each["used"] for each in found["stage 1"]["Codebooks"].values()]

    # What it gives.
    made = found["stage 1"]["Reconstruction"]["all levels"]
    beside = report.reference(found)
    return {
        "codes": " + ".join(describe_grids(grids, sizes)),
        "bits per image": bits_of(grids, sizes),
        "codes in use": " + ".join(map(str, used)),
        "MSE": made["MSE"],
        "PSNR (dB)": made["PSNR (dB)"],
        "bits per code, with the priors": total / sum(positions),
        "... of each level": " + ".join(f"{bits:.2f}" for bits in own_bits),
        "bits per image, with the priors": total,
        "distance of reconstructions": beside["reconstructions"]["distance"],
        "distance of samples": beside["samples"]["distance"],
        "distance of real images": beside["real"]["distance"],
        "images in each distance": beside["samples"]["count"],
        "minutes, autoencoder": training_seconds(folder / "vqvae") / 60,
        "minutes, priors": sum(map(training_seconds, priors)) / 60,
    }


def summary(rows: Mapping[str, Mapping[str, Any]], distance_name: str) -> list[str]:
    """The answer in a sentence for a person who knows no metric, and what it rests on, from figures
    by name and by model."""
    # For each purpose: do several levels, at their best, gain more than chance on one?
    said, gains, take = [], [], []
    for figure, (what, better, worse, same) in PURPOSES.items():
        values = rows[figure]
        best = min(SEVERAL, key=lambda name: values[name])
        gain = 1 - values[best] / values[ONE]
        if abs(gain) <= CHANCE[figure]:
            gain, change = 0.0, f"{same} from several levels as from one"
        elif gain > 0:
            change = f"{better.format(gain)} from {best} than from one"
        else:
            change = f"{worse.format(-gain)} from several levels than from one"
        said.append(f"{what} {change}")
        gains.append(gain)
        enough = min(values.values()) * (1 + CHANCE[figure])
        take.append(next(name for name in STRIDES if values[name] <= enough))
    answer = "In part" if min(gains) < 0 else "Yes"
    answer = answer if max(gains) > 0 else "No"
    least = min(rows["MSE"].values())
    exactness = quality(least)
    if psnr_of(least) < RECOGNISABLE:
        answer = "Too early to say (no model has learned enough: give more --minutes). So far"
    lines = [f"Does hierarchy help these images? {answer}: {', and '.join(said)}."]

    # What to do, at which cost it was found, and what may be chance.
    exact, new = (f"{name} (--model.strides {' '.join(map(str, STRIDES[name]))})" for name in take)
    whom = (
        f"{exact} for both" if exact == new else f"{exact} for exact pictures, {new} for new ones"
    )
    lines.append(f"Take {whom}: the fewest levels that are about as good as the best.")
    learned = rows["bits per image, with the priors"].items()
    costs = ", ".join(f"{bits:,.0f} with {name}" for name, bits in learned)
    lines.append(f"The most exact ones: {exactness}.")
    spent = f"All spend about {rows['bits per image'][ONE]:,.0f} bits on an image"
    usual = f"with priors that have learned what is usual, fewer suffice: {costs}"
    lines.append(f"{spent}; {usual}. The fewer, the more they have learned.")
    minutes = [rows["minutes, autoencoder"][n] + rows["minutes, priors"][n] for n in STRIDES]
    unequal = max(minutes) > 1.25 * min(minutes)
    reason = " (not alike: some stopped early, or other programs were busy)" * unequal
    lines.append(f"Each trained {min(minutes):.3g} to {max(minutes):.3g} minutes{reason}.")
    error, distance = (f"{share:.0%}" for share in CHANCE.values())
    taken = f"{error} of the error and {distance} of {distance_name} are taken for chance"
    lines.append(f"Each was trained once: {taken}.")
    return lines


@torch.no_grad()
def reconstructions(config: CompareConfig) -> Image.Image:
    """Held-out images, and a row of what each model makes of them."""
    rows: dict[str, list[Image.Image]] = {}
    for name in STRIDES:
        model = VQVAE2.from_pretrained(folder_of(Path(config.output_dir), name) / "vqvae")
        images = load_images(config.data, model.config.image).validation
        shown = some_rows(len(images), SHOWN)
        originals = to_images(images.__getitems__(shown)["images"])
        rows.setdefault("original", to_pil(originals))
        rows[name] = to_pil(model.eval()(originals).reconstruction)
    return sheet([*rows.values()], [*rows])
