"""What a recipe says of the stages after the trainings, looked at before the trainings, which take
hours."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from pipelines.choices import Look
from pipelines.cli import COMMANDS, recipe_section
from pipelines.conditions import as_vectors, read_conditions
from pipelines.config import SampleConfig
from pipelines.labels import label_numbers
from pipelines.plan.stages import Stage
from pipelines.samples import samplings_of
from prior.config import PriorConfig
from vqvae2.common.config import check, from_dict
from vqvae2.common.errors import UserError
from vqvae2.data.augmentation import check_views

OTHERS = {"vqvae", "priors", "samples", "compare"}  # what evaluate may be of, beside a pipeline
LATER = ("extract", "assemble", "reconstruct", "sample", "evaluate")


def check_later_stages(
    recipe: dict[str, Any], trainings: Sequence[Stage], seen: Look, where: str
) -> None:
    """Raise a `UserError`, whose message begins with `where`, for settings that these stages would
    refuse, as far as can be told before there are models."""
    # Names and types.
    configs: dict[str, Any] = {}
    for command in LATER:
        section = recipe_section(recipe, command)
        if command == "evaluate" and not OTHERS & {*section}:
            section = {"pipeline": "pipeline", **section}  # which allows for more settings
        configs[command] = from_dict(COMMANDS[command][0], section, where, missing=tyro.MISSING)

    # What must suit the images and the priors.
    with torch.device("meta"):
        priors: list[Any] = [stage.make_model().config for stage in trainings[1:]]
    try:
        check_views(configs["extract"].views)
        _check_sampling(configs["sample"], priors, seen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_sampling(config: SampleConfig, priors: Sequence[PriorConfig], seen: Look) -> None:
    # Guidance, and labels: the hidden one, too, where all priors with classes know it.
    samplings_of(config, priors)
    class_names = max((prior.class_names for prior in priors), key=len)
    can_hide = all(prior.label_dropout > 0 for prior in priors if prior.num_classes)
    label_numbers(config.labels or None, class_names, can_hide=can_hide)

    # Files; the length of conditions is known when codes are extracted.
    can_hide = all(prior.label_dropout > 0 for prior in priors)
    given = read_conditions(config.conditions, config.attributes)
    if given is None or not seen.has_conditions:
        as_vectors(given, int(seen.has_conditions), (), can_hide=can_hide)
    for name in ("reject", "init_image", "mask"):
        path = getattr(config, name)
        check(path is None or os.path.exists(path), name, path, "a file or folder that exists")
