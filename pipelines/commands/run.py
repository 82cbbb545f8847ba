"""`vqvae2 run`: all stages, from a folder of images to samples and a page that shows them."""

import filecmp
import html
import json
import logging
import math
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipelines.choices import MULTIPLE, Choice, Look, choose, flipped, look
from pipelines.cli import COMMANDS, function_of, load_recipe, recipe_section
from pipelines.config import ChosenConfig, PlanConfig, RunConfig
from pipelines.later_stages import check_later_stages
from pipelines.next_steps import flags
from pipelines.plan.command import show_needs, step_seconds
from pipelines.plan.stages import Stage, trainings_of
from prior.audit import check_beats_frequencies
from prior.manifest import read_manifest
from vqvae2.codebook_stats import level_name
from vqvae2.common.accelerate import (
    on_main_process,
    processes,
    refuse_several_processes,
    use_cpu,
)
from vqvae2.common.artifact import WEIGHTS_NAME, content_hash
from vqvae2.common.config import from_dict, merged, shown, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_text
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import best_validation, conclusion, quality, recorded_config
from vqvae2.common.runs import RunRecord
from vqvae2.common.threads import fastest_number
from vqvae2.common.vocabulary import INDEX_NAME
from vqvae2.config import ImagesConfig

logger = logging.getLogger(__name__)
RECIPE = "recipe.yaml"
AUTOENCODER, PRIORS = 0.4, 0.5  # their shares of the budget; the rest is for all else
MOST_EPOCHS = 400  # more than these teach nothing
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2rem auto;max-width:62rem;line-height:1.4}}
img{{max-width:100%}} pre{{white-space:pre-wrap}}</style><h1>{title}</h1>
{body}
"""


def run(config: RunConfig) -> None:
    """Choose what was not set, then train, extract, train the priors, assemble, reconstruct and
    sample; or, of a dry run, show what was chosen. Raises `Stopped` at SIGTERM or Ctrl-C; running
    it again continues."""
    (show_plan if config.dry_run else _run)(config)


@writes_output
def _run(config: RunConfig) -> None:
    # The first process chooses for all.
    root, state = Path(config.output_dir), processes()
    record = RunRecord("run", config, "run_config.yaml", facts=recipe_facts(config))
    recipe_file = root / RECIPE
    record.check(root)
    state.wait_for_everyone()

    def choose_once() -> None:
        text, _ = make_recipe(config)
        record.write(root)
        write_text(recipe_file, text)
        reasons = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
        logger.info("\n  ".join(reasons))

    on_main_process(state, lambda: None if recipe_file.exists() else choose_once())
    logger.info("%s holds the settings, and why.", recipe_file)

    # The stages, and what came out.
    run_stages(load_recipe(str(recipe_file)), root, to_dict(config.data))

    def show_all() -> None:
        text = summary(root, config.data)
        write_page(root, config.data.path, text)
        logger.info("\n%s\n\n%s shows all of it.", text, root / "index.html")

    on_main_process(state, show_all)


# Choices


def show_plan(config: RunConfig) -> None:
    """Print what would be chosen, and what it needs."""
    refuse_several_processes()
    text, seen = make_recipe(config)
    print(text)
    recipe = yaml.safe_load(text)
    image = recipe["train"]["model"]["image"]
    share = 0 if seen.has_own_split else image.get("validation_fraction", 0.05)
    num_images, num_vectors = round((1 - share) * seen.number), int(seen.has_conditions)
    known = settings_of(config), num_images, seen.class_names, num_vectors
    stages = trainings_of(recipe, *known)
    show_needs(PlanConfig(planned=None), stages)


def make_recipe(config: RunConfig) -> tuple[str, Look]:
    """The recipe for these images and this machine as YAML, its reasons as comments."""
    parse_time(config.budget)  # before anything is read
    choice, given, seen = choose_for(config)
    recipe, stages = with_given(choice.recipe, given, seen, settings_of(config))
    threads = threads_for(stages[0])
    spend = partial(finished, budget=config.budget, threads=threads, num_images=seen.number)
    return spend(recipe, stages, choice.reasons, timed=step_seconds), seen


def choose_for(
    config: ChosenConfig, multiple: int = MULTIPLE
) -> tuple[Choice, dict[str, Any], Look]:
    """What suits the images, what a recipe of the user's own says, and what was seen of them; see
    `choose` for `multiple`."""
    image, recipe = config.image, load_recipe(config.recipe) if config.recipe else {}
    asked: dict[str, Any] = {}
    for field in fields(config.image):
        value = getattr(config.image, field.name)
        if value is not None and value != ():
            asked[field.name] = value

    # Flags come before the recipe, and the recipe before what is chosen.
    if asked:
        recipe = merged(recipe, {"train": {"model": {"image": asked}}})
    if config.flips != "auto":
        recipe = merged(recipe, flipped(config.flips == "yes"))

    # What is known before the images are seen; what is wrong with it is said later.
    model = (recipe.get("train") or {}).get("model") or {}
    value_range: Any = None
    with suppress(AttributeError, TypeError):
        multiple = max(multiple, math.prod(model.get("strides") or ()))
        value_range = tuple((model.get("image") or {}).get("value_range") or ())
    if value_range is not None and len(value_range) != 2:
        value_range = None
    seen = look(config.data, image.background or "white", image.channels, value_range)
    choice = choose(seen, on_gpu=not use_cpu(), given=asked, flips=config.flips, multiple=multiple)
    drawing: Any = recipe.get("sample")
    guided = isinstance(drawing, dict) and "guidance_scale" in drawing
    if guided and not (seen.class_names or seen.has_conditions):
        recipe = {**recipe, "sample": {**drawing}}
        del recipe["sample"]["guidance_scale"]
        choice.reasons.append("no guidance: the images have no classes")
    if config.recipe:
        choice.reasons.insert(0, f"where the recipe {config.recipe} says otherwise, it counts")
    return choice, recipe, seen


def settings_of(config: ChosenConfig) -> str:
    """What the settings are called in a message."""
    return f"recipe {config.recipe}" if config.recipe else "the settings"


def recipe_facts(config: ChosenConfig) -> dict[str, str]:
    """A hash of the user's own recipe, if there is one, for a run's record."""
    if not config.recipe:
        return {}
    said = repr(load_recipe(config.recipe))  # YAML holds values that JSON does not
    return {"recipe_hash": content_hash(said, ())}


def threads_for(stage: Stage) -> int:
    """The number of threads that is set: 0 for all, 1 where other programs keep the CPUs busy."""
    return 0 if not use_cpu() else fastest_number(lambda: step_seconds(stage))


def finished(
    recipe: dict[str, Any],
    stages: Sequence[Stage],
    reasons: Sequence[str],
    *,
    timed: Callable[[Stage], float],
    budget: str,
    threads: int,
    num_images: int,
) -> str:
    """A recipe as YAML, its reasons as comments, with this number of threads (0: as it is) and as
    many steps as the budget allows; `timed` gives the seconds of a stage's step."""
    reasons, seconds = [*reasons], parse_time(budget)
    if threads:
        names = ("train", "extract", *(stage.name for stage in stages[1:]), "sample", "evaluate")
        for name in names:
            recipe[name] = {"num_threads": threads, **(recipe.get(name) or {})}
        reasons.append("one thread: with other programs running, more are slower now")

    # Steps: as many as the budget allows at this machine's speed; finer priors need more.
    weights = [2**level for level in range(len(stages) - 1)]
    shares = [AUTOENCODER, *(PRIORS * weight / sum(weights) for weight in weights)]
    for stage, share in zip(stages, shares, strict=True):
        name, section = stage.name, recipe[stage.name]
        if "num_steps" in section:
            continue
        per_step = timed(stage)
        most = MOST_EPOCHS * num_images // stage.config.batch_size
        steps = max(20, min(most, round(share * seconds / per_step)))
        set_steps(section, steps)
        enough = f"{MOST_EPOCHS} passes over the images are enough"
        why = enough if steps == most else f"its share of {budget}"
        reasons.append(f"{name}: {steps:,} steps of {per_step:.3g} s ({why})")
    lines = [f"# {reason}" for reason in reasons]
    plain = json.loads(json.dumps(recipe))  # what two sections share would become an alias
    body = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
    return "\n".join(["# What was chosen, and why:", *lines, body])


def parse_time(text: str) -> float:
    """Seconds of "90s", "30m", "2h" or "1d". Raises a `UserError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = float(match[1]) * SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < 1e10:
        raise UserError(f"budget is {shown(text)}: give a time such as 30m or 2h.")
    return seconds


def with_given(
    chosen: dict[str, Any], given: dict[str, Any], seen: Look, where: str
) -> tuple[dict[str, Any], list[Stage]]:
    """The chosen recipe in which what a recipe of the user's own says comes first, with a section
    for each level that there will be; and its trainings. `where` begins a message about them."""
    # The prior that was chosen may be any level's; what is given for train-prior holds for all.
    chosen, given = {**chosen}, {**given}
    prior, for_all = chosen.pop("prior_1"), given.pop("train-prior", None) or {}
    recipe = merged(chosen, {name: section or {} for name, section in given.items()})
    for stage in trainings_of(recipe, where)[1:]:
        own = merged(for_all, given.get(stage.name) or {})
        recipe[stage.name] = merged(prior, own)
    num_vectors = int(seen.has_conditions)
    stages = trainings_of(recipe, where, class_names=seen.class_names, vector_size=num_vectors)
    check_later_stages(recipe, stages, seen, where)
    return recipe, stages


def set_steps(section: dict[str, Any], steps: int) -> None:
    """A number of steps, and the intervals that suit it where they are not set."""
    tenth = max(1, steps // 10)
    section["num_steps"] = steps
    section.setdefault("warmup_steps", min(100, tenth))
    section.setdefault("validate_every", tenth)
    section.setdefault("checkpoint_every", tenth)
    section.setdefault("picture_every", max(1, steps // 4))
    section.setdefault("weight_ema_decay", 0.99 if steps < 5000 else 0.999)


# Stages


def run_stages(recipe: dict[str, Any], root: Path, data: dict[str, Any]) -> None:
    """Every command that is not finished, with the recipe's settings."""
    vqvae, codes, pipeline = f"{root}/vqvae", f"{root}/codes", f"{root}/pipeline"
    start = partial(start_stage, recipe)
    start("train", vqvae, data=data)
    start("extract", codes, vqvae=vqvae, data=data)
    manifest = read_manifest(Path(codes))
    priors = [f"{root}/prior_{level}" for level in range(manifest.num_levels)]
    for level, folder in enumerate(priors):
        start("train-prior", folder, str(level), vqvae=vqvae, codes=codes)

    on_main_process(processes(), partial(remove_outdated, root, (vqvae, *priors)))
    start("assemble", pipeline, vqvae=vqvae, priors=priors)
    held_out = manifest.num_validation > 0
    start("reconstruct", f"{root}/reconstructions", vqvae=vqvae, data=data, held_out=held_out)
    start("sample", f"{root}/samples", pipeline=pipeline)


def start_stage(
    recipe: dict[str, Any], command: str, output_dir: str, level: str = "", **settings: Any
) -> None:
    """A command with the recipe's settings, and these."""
    section = recipe_section(recipe, command, level)
    settings |= {"level": level} if level else {}
    settings = merged(section, {"output_dir": output_dir, **settings})
    logger.info(f"\nvqvae2 {command} -> {output_dir}")
    where = f"recipe {Path(output_dir).parent}/{RECIPE}"
    function_of(command)(from_dict(COMMANDS[command][0], settings, where))


def remove_outdated(root: Path, parts: Sequence[str]) -> None:
    """Remove what was made of models that have been trained further since."""
    pipeline = root / "pipeline"
    if not (pipeline / INDEX_NAME).exists():
        return
    for part in map(Path, parts):
        copy = pipeline / part.name / WEIGHTS_NAME
        if copy.exists() and not filecmp.cmp(part / WEIGHTS_NAME, copy, shallow=False):
            logger.info("%s was trained further: what was made of it is made anew.", part)
            for folder in ("samples", "reconstructions", "pipeline"):  # its index shows all that
                shutil.rmtree(root / folder, ignore_errors=True)
            return


# The end


def summary(root: Path, images: ImagesConfig) -> str:
    """How good it is, in words, and what to do next."""
    # The autoencoder, and each prior.
    manifest, stage_1 = read_manifest(root / "codes"), best_validation(root / "vqvae")
    lines = ["No image was held out, as there are too few: only you can see how good it is."]
    if stage_1:
        lines = [f"Reconstructions of held-out images: {quality(stage_1['mse'])}."]
    for level, size in enumerate(manifest.codebook_sizes):
        if prior := best_validation(root / f"prior_{level}"):
            bits, alone = prior["bits_per_code"], prior["unigram_bits"]
            gain = f"{1 - bits / alone:.0%} fewer than by frequency alone ({alone:.2f})"
            if not check_beats_frequencies(bits, alone).passed:
                than = "no fewer" if bits >= alone else "hardly fewer"
                gain = f"{than} than by frequency alone ({alone:.2f}): samples are noise"
            name = level_name(level, manifest.num_levels).capitalize()
            lines.append(f"{name}, {size} codes: {bits:.2f} bits per code, {gain}.")

    # How each training ended, and what may come next.
    for name in ("vqvae", *(f"prior_{level}" for level in range(manifest.num_levels))):
        lines.append(f"{name}: {conclusion(root / name, recorded_config(root / name))}.")
    folder, data = shlex.quote(str(root)), shlex.join(flags(images, "data.", ImagesConfig))
    lines += [
        "",
        "Next:",
        f"  vqvae2 sample --pipeline {folder}/pipeline --seed 1 --output-dir {folder}/more",
        f"  vqvae2 evaluate --pipeline {folder}/pipeline {data} \\",
        f"    --output-dir {folder}/evaluation",
        f"  vqvae2 inspect --vqvae {folder}/vqvae {data}",
        f"  for better images, raise num_steps in a copy of {folder}/{RECIPE}, and give it as",
        "  --config (with another --output-dir); where your recipe does not set it, a longer",
        f"  --budget raises it, to {MOST_EPOCHS} passes at most",
    ]
    return "\n".join(lines)


def write_page(root: Path, title: str, text: str) -> None:
    """index.html: pictures with captions, and the summary."""
    captions = {
        "reconstructions/reconstructions.png": "Originals, and their reconstructions below",
        "samples/samples.png": "New images",
        "vqvae/curves.png": "The autoencoder's training",
    }
    for curves in sorted(root.glob("prior_*/curves.png")):
        captions[str(curves.relative_to(root))] = f"The training of {curves.parent.name}"
    body = [f"<pre>{html.escape(text)}</pre>"]
    for path, caption in captions.items():
        if (root / path).exists():
            body.append(f'<h2>{caption}</h2><img src="{path}" alt="{caption}">')
    page = PAGE.format(title=html.escape(f"vqvae2: {title}"), body="\n".join(body))
    write_text(root / "index.html", page)
