"""Files appear whole or not at all: write beside the target, then rename. Run folders know what run they hold. Torch-free."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vqvae2.common.config import differences, read_yaml, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.provenance import command_line, versions


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk, as libraries report it: say where
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: the file is absent, is not JSON, or is not a mapping.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the folder's name, or make it with the earlier step.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore or remake it.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping of keys to values: restore or remake it.")
    return data


def check_empty(folder: Path, expected: str) -> None:
    """Refuse a folder with something in it.

    Raises:
        UserError: naming the folder and what it could have held.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but --output-dir must be a folder: choose another.")
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {expected}: choose another --output-dir.")


SAMPLE_NAME = "image_sample"
"""The fact that holds marks of some images, such as the lengths of their files, with spaces between."""


def _mostly_same(one: str, other: str) -> bool:
    """Whether two samples are of the same images; a few broken ones may have been mended meanwhile."""
    marks, others = one.split(), other.split()
    return len(marks) == len(others) and 2 * sum(a != b for a, b in zip(marks, others, strict=True)) <= len(marks)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of the run that it holds: the command, facts that it rests on, and its whole configuration (YAML)."""

    command: str
    config: Any
    file_name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else is written down for people, and may be other when the run is continued."""

    def check(self, folder: Path) -> None:
        """Refuse a folder that holds another command's run, a run with other settings or facts, or files of no run at all.

        Raises:
            UserError: naming the key and both values, or the folder.
        """
        if not (folder / self.file_name).exists():
            check_empty(folder, f"run of {self.command!r}")
            return
        old = read_yaml(folder / self.file_name)
        if old.get("command") != self.command:
            raise UserError(f"{folder} holds a run of {old.get('command')!r}, not of {self.command!r}: choose another --output-dir.")
        changed = [(key, old[key], value) for key, value in self.facts.items() if key != SAMPLE_NAME and key in old and old[key] != value]
        for key, before, after in changed + differences(type(self.config), old, to_dict(self.config)):
            raise UserError(
                f"{folder} holds a run with {key} = {before!r}, but this command says {after!r}: "
                f"repeat the run's own settings to continue it, or choose another --output-dir."
            )
        samples = [str(facts[SAMPLE_NAME]) for facts in (old, self.facts) if SAMPLE_NAME in facts]
        if len(samples) == 2 and not _mostly_same(*samples):
            raise UserError(
                f"{folder} holds a run on other images than these, though they have the same names (most of {SAMPLE_NAME} differs): "
                f"restore those, or choose another --output-dir."
            )

    def write(self, folder: Path) -> None:
        """Write the record, with the command line and the versions that run it (for the main process)."""
        retraced = {"command_line": command_line(), "versions": versions(), **self.notes}
        record = {"command": self.command, **self.facts, **to_dict(self.config), **retraced}
        write_text(folder / self.file_name, yaml.safe_dump(record, sort_keys=False))


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it never appears half-removed under its own name."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)
