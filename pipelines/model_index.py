"""`model_index.json`: what a pipeline's folder says of its parts, and whether they are those."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqvae2.common.artifact import CONFIG_NAME, content_hash, local_folder
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.metrics import best_validation
from vqvae2.common.runs import last_names, read_record
from vqvae2.common.vocabulary import IMPORT_RECORD, INDEX_NAME, TRAINING_RECORD

RESTORE = "restore its files, or run vqvae2 assemble again"
RECORD_NAMES = (TRAINING_RECORD, IMPORT_RECORD)


def part_folders(
    pipeline: str | Path | None, vqvae: str | Path | None = None, priors: Sequence[str | Path] = ()
) -> tuple[Any, list[Any]]:
    """Where the autoencoder and the priors are: in a pipeline's folder, or each in its own."""
    if pipeline is None:
        return vqvae, list(priors)
    folder = local_folder(pipeline).resolve()
    if (folder / CONFIG_NAME).exists() and not (folder / INDEX_NAME).exists():
        what = f"{pipeline} is a model, but a pipeline was expected"
        raise UserError(f"{what}: give the folder that vqvae2 assemble made of all models.")
    if (folder / "pipeline" / INDEX_NAME).exists() and not (folder / INDEX_NAME).exists():
        raise UserError(f"{pipeline} is the folder of a whole run: give {pipeline}/pipeline.")
    path, index = folder / INDEX_NAME, read_json(folder / INDEX_NAME)
    names = [index.get("vqvae"), *_as_list(index.get("priors"))]
    for key, name in zip(["vqvae", *["priors"] * (len(names) - 1)], names, strict=True):
        inside = isinstance(name, str) and Path(name).name == name not in ("", "..")
        allowed = f"the name of a folder in {folder}: remake it with vqvae2 assemble"
        inside = inside and (folder / name).is_dir() and not (folder / name).is_symlink()
        check(inside, f"{path}: {key}", name, allowed)
    return folder / names[0], [folder / name for name in names[1:]]


def _as_list(value: Any) -> list[Any]:
    """A list as it is; of anything else a list that holds it."""
    return value if isinstance(value, list) else [value]


def changed_parts(index: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
    """Which parts are not those that a pipeline's `model_index.json` was written for. (The first
    versions wrote no hashes into it.)"""
    changed = []
    for name, part in parts.items() if any(f"{name}_hash" in index for name in parts) else ():
        expected, found = index.get(f"{name}_hash"), part_hash(part)
        if expected != found:
            both = f"its content hash is {found[:12]}, but {INDEX_NAME} says {str(expected)[:12]}"
            changed.append(f"{name} was changed ({both})")
    return changed


def part_hash(part: Any) -> str:
    """A hash of a part: equal exactly if its configuration and weights are."""
    return content_hash(part.config, part.state_dict().items())


def training_record(folder: str | Path) -> dict[str, Any]:
    """How a part was made, if its folder has a record: command, settings, versions, hashes, and
    the `held_out` figures of its weights."""
    for name in RECORD_NAMES:
        if (path := Path(folder).expanduser() / name).is_file():
            return {**last_names(read_record(path)), "held_out": best_validation(path.parent)}
    return {}


def prior_bits(trainings: Any) -> dict[str, tuple[float, float]]:
    """Of each prior (prior_0, ...) whose `training_record` says so: bits per held-out code, and by
    frequency alone."""
    known: dict[str, tuple[float, float]] = {}
    for name, record in trainings.items() if isinstance(trainings, dict) else ():
        with suppress(LookupError, TypeError, ValueError):  # recorded by an earlier version
            held_out = record["held_out"]
            known[name] = float(held_out["bits_per_code"]), float(held_out["unigram_bits"])
    return known
