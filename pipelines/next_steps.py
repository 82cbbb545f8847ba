"""What comes after a command: command lines to copy, with the paths that the user gave."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipelines.config import FINE_TUNING
from prior.manifest import parse_level, read_manifest
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import read_record
from vqvae2.common.vocabulary import EXTRACTION_RECORD, IMPORT_RECORD, INDEX_NAME, TRAINING_RECORD
from vqvae2.config import DataConfig, ImagesConfig

logger = logging.getLogger(__name__)
PHOTOS = ImagesConfig(path="PHOTOS")  # whatever they are
RECORDS = (EXTRACTION_RECORD, IMPORT_RECORD, TRAINING_RECORD)


def show_next(command: str, config: Any, recipe: str | None) -> None:
    """Log what may follow a subcommand that has ended well; its recipe goes on to later stages."""
    given = ["--config", recipe] if recipe is not None and command != "sample" else []
    with contextlib.suppress(UserError, OSError):  # something is gone already
        for number, (name, *words) in enumerate(next_steps(command, config)):
            start = "  " if number else "Next:\n  "
            logger.info("%svqvae2 %s %s", start, name, shlex.join([*given, *words]))


def next_steps(command: str, config: Any) -> Iterator[list[str]]:
    """The subcommands that may follow, with their arguments."""
    # Each command's own: what reads what it made.
    out, vqvae = getattr(config, "output_dir", ""), getattr(config, "vqvae", None)
    if command == "prepare":
        target = ["--output-dir", beside(out, "prepared", "vqvae")]
        yield ["train", "--data.path", out, *flags(config.image, "image."), *target]
    elif command == "train" and config.finetune == "decoder":
        codes = beside(config.init_from, "vqvae", "codes")
        for words in priors_of(codes, out, codes):
            pipeline = beside(out, "vqvae", "pipeline")
            yield [*words[:-1], pipeline] if words[0] == "assemble" else words
    elif command in ("train", "import-weights", "reconstruct", "inspect"):
        vqvae = vqvae or out
        own = record_of(vqvae).get("data")  # not any other images
        data = from_dict(DataConfig, own, vqvae) if own else getattr(config, "data", PHOTOS)
        made_of = ["--vqvae", vqvae, *flags(data, "data.", ImagesConfig)]
        codes = beside(vqvae, "vqvae", "codes")
        if command == "import-weights":
            target = ["--data.path", "PHOTOS", "--output-dir", beside(out, "vqvae", "finetuned")]
            yield ["train", "--config", str(Path(out) / FINE_TUNING), *target]
        if (Path(vqvae).expanduser().parent / INDEX_NAME).exists():  # a pipeline's, which stays
            if command == "reconstruct":
                yield ["inspect", *made_of, "--output-dir", f"{out}_report"]
            return
        if command != "inspect":
            yield ["inspect", *made_of]
        views = record_of(codes).get("views", [])  # if they are extracted already
        views = ["--views", *views] if len(views) > 1 else []
        yield ["extract", *made_of, *views, "--output-dir", codes]
    elif command in ("extract", "import-codes"):
        yield from priors_of(out, vqvae, out)
    elif command.startswith("codes"):
        yield from priors_of(config.codes, vqvae, config.codes)
    elif command == "train-prior":
        level = parse_level(config.level, read_manifest(Path(config.codes)).num_levels)
        yield from priors_of(config.codes, vqvae, out, level)
    elif command == "assemble":
        yield ["sample", "--pipeline", out, "--output-dir", beside(out, "pipeline", "samples")]
        read = record_of(config.priors[0]).get("codes")
        yield ["doctor", "--pipeline", out, *(["--codes", read] if read else [])]
    elif command == "doctor" and config.pipeline:
        target = ["--output-dir", beside(config.pipeline, "pipeline", "samples")]
        yield ["sample", "--pipeline", config.pipeline, *target]
    elif command == "sample" and not config.receipt and not _repeats_a_choice(config):
        yield ["sample", *flags(replace(config, num_images=2 * config.num_images))]


def _repeats_a_choice(config: Any) -> bool:
    return bool(config.reject) and Path(config.reject, "sample_config.yaml").exists()


def priors_of(
    codes: str, vqvae: str | None, place: str, level: int | None = None
) -> Iterator[list[str]]:
    """To train the priors that are missing beside `place` (codes, or a level's prior), or to
    assemble all of them."""
    name, levels = "codes", range(read_manifest(Path(codes)).num_levels)
    if level is not None:
        name = f"prior_{level}"
    priors = [place if i == level else beside(place, name, f"prior_{i}") for i in levels]
    model = vqvae or record_of(codes).get("vqvae") or beside(place, name, "vqvae")
    missing = [i for i in levels if not Path(priors[i], "config.json").exists()]
    for i in missing:
        words = ["--codes", codes, "--vqvae", model, "--level", str(i), "--output-dir", priors[i]]
        yield ["train-prior", *words]
    if not missing:
        pipeline = beside(place, name, "pipeline")
        yield ["assemble", "--vqvae", model, "--priors", *priors, "--output-dir", pipeline]


def record_of(folder: str) -> dict[str, Any]:
    """What a folder's record says of how it was made; empty without one."""
    paths = (Path(folder).expanduser() / name for name in RECORDS)
    return next((read_record(path) for path in paths if path.exists()), {})


def beside(folder: str, name: str, other: str) -> str:
    """A folder beside one: x/codes beside x/vqvae, x/big_codes beside x/big; of a model of the Hub,
    a folder here."""
    folder = folder.rstrip("/") or folder
    if not os.path.isdir(os.path.expanduser(folder)) and folder.count("/") == 1:
        folder = os.path.basename(folder)
    own = os.path.basename(os.path.abspath(folder))
    stem = own.removesuffix(name) if own.endswith(name) else f"{own}_"
    return os.path.normpath(f"{folder}/../{stem}{other}")


def flags(config: Any, prefix: str = "", of: type | None = None) -> list[str]:
    """The flags that say how a configuration, or the part of it in the class `of`, differs from
    the defaults."""
    words = []
    for field in fields(of or config):
        value = getattr(config, field.name)
        if value != field.default and not field.metadata.get("recipe_only"):
            words.append(f"--{prefix}{field.name}".replace("_", "-"))
            if value is not True or field.type is not bool:
                words += map(str, value if isinstance(value, tuple) else [value])
    return words
