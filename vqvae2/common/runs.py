"""What a run folder says of the run that it holds: command, settings, facts, versions. Torch-free."""

import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vqvae2.common.config import differences, read_yaml, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import check_empty, write_text

PACKAGES = ("vqvae2", "torch", "accelerate", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """What computes here: package -> version."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command_line() -> str:
    """The command that this process was started with, as a shell takes it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


SAMPLE_NAME = "image_sample"
"""The fact that holds marks of some images, such as the lengths of their files, with spaces between."""


def _mostly_same(one: str, other: str) -> bool:
    """Whether two samples are of the same images; a few broken ones may have been mended meanwhile."""
    marks, others = one.split(), other.split()
    return len(marks) == len(others) and 2 * sum(
        a != b for a, b in zip(marks, others, strict=True)
    ) <= len(marks)


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
            raise UserError(
                f"{folder} holds a run of {old.get('command')!r}, not of {self.command!r}: choose another --output-dir."
            )
        changed = [
            (key, old[key], value)
            for key, value in self.facts.items()
            if key != SAMPLE_NAME and key in old and old[key] != value
        ]
        for key, before, after in changed + differences(
            type(self.config), old, to_dict(self.config)
        ):
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
