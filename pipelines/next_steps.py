"""What comes after a command: command lines to copy, with the paths that the user gave."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from prior.manifest import parse_level, read_manifest
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.runs import read_record
from vqvae2.config import DataConfig, ImagesConfig

logger = logging.getLogger(__name__)
RECORDS = ("extract_config.yaml", "import_config.yaml", "train_config.yaml")


def show_next(command: str, config: Any, recipe: str | None) -> None:
    """Log what may follow a subcommand that has ended well; its recipe goes on to later stages."""
    with contextlib.suppress(UserError, OSError):  # something is gone already
        lines = []
        for name, *words in next_steps(command, config):
            config_flag = ["--config", recipe] if recipe is not None and command != "sample" else []
            lines.append(f"\n  vqvae2 {name} {shlex.join([*config_flag, *words])}")
        if lines:
            logger.info("Next:%s", "".join(lines))


def next_steps(command: str, config: Any) -> Iterator[list[str]]:
    """The subcommands that may follow, with their arguments."""
    out = getattr(config, "output_dir", None) or ""
    if command == "prepare":
        target = ["--output-dir", beside(out, "prepared", "vqvae")]
        yield ["train", "--data.path", out, *flags(config.image, "image."), *target]
    elif command in ("train", "reconstruct", "inspect"):
        vqvae, data = out if command == "train" else config.vqvae, config.data
        if command != "train" and (own := record_of(vqvae).get("data")):  # not any other images
            data = from_dict(DataConfig, own, vqvae)
        made_of = ["--vqvae", vqvae, *flags(data, "data.", ImagesConfig)]
        if command != "inspect":
            yield ["inspect", *made_of]
        yield ["extract", *made_of, "--output-dir", beside(vqvae, "vqvae", "codes")]
    elif command == "import-weights":
        codes = beside(out, "vqvae", "codes")
        yield ["extract", "--vqvae", out, "--data.path", "PHOTOS", "--output-dir", codes]
    elif command == "codes info":
        yield ["codes verify", "--codes", config.codes]
    elif command in ("extract", "import-codes"):
        yield from priors_of(out, config.vqvae, out, "codes")
    elif command in ("codes view", "codes verify"):
        yield from priors_of(config.codes, None, config.codes, "codes")
    elif command == "train-prior":
        level = parse_level(config.level, read_manifest(Path(config.codes)).num_levels)
        yield from priors_of(config.codes, config.vqvae, out, f"prior_{level}")
    elif command == "assemble":
        yield ["sample", "--pipeline", out, "--output-dir", beside(out, "pipeline", "samples")]
        given = record_of(config.priors[0]).get("codes")
        yield ["doctor", "--pipeline", out, *(["--codes", given] if given else [])]
    elif command == "doctor" and config.pipeline is not None:
        samples = beside(config.pipeline, "pipeline", "samples")
        yield ["sample", "--pipeline", config.pipeline, "--output-dir", samples]
    elif command == "sample":
        yield ["sample", *flags(replace(config, num_images=2 * config.num_images))]


def priors_of(codes: str, vqvae: str | None, place: str, name: str) -> Iterator[list[str]]:
    """To train a prior for each level that has none beside `place`, or to assemble what is there.
    `name`: see `beside`."""
    # What is trained: of two of one level, this one.
    manifest, trained = read_manifest(Path(codes)), {}
    model = vqvae or record_of(codes).get("vqvae") or beside(place, name, "vqvae")
    found = Path(place).absolute().parent.glob("*/config.json")
    for path in sorted(found, key=lambda path: (path.parent.name == Path(place).name, path)):
        facts = read_json(path)
        if facts.get("codes_hash") == manifest.codes_hash:
            trained[facts["level"]] = os.path.normpath(f"{place}/../{path.parent.name}")

    # What is left.
    made_of = ["--codes", codes, "--vqvae", model]
    for level in sorted(set(range(manifest.num_levels)) - set(trained)):
        target = ["--output-dir", beside(place, name, f"prior_{level}")]
        yield ["train-prior", *made_of, "--level", str(level), *target]
    if len(trained) == manifest.num_levels:
        priors = [trained[level] for level in sorted(trained)]
        target = ["--output-dir", beside(place, name, "pipeline")]
        yield ["assemble", "--vqvae", model, "--priors", *priors, *target]


def record_of(folder: str) -> dict[str, Any]:
    """What a folder's record says of how it was made; empty without one."""
    paths = (Path(folder).expanduser() / name for name in RECORDS)
    return next((read_record(path) for path in paths if path.exists()), {})


def beside(folder: str, name: str, other: str) -> str:
    """A folder beside one: x/codes beside x/vqvae, x/big_codes beside x/big."""
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
            if value is not True:
                words += map(str, value if isinstance(value, tuple) else [value])
    return words
