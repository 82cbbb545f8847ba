"""What a run folder says of the run that it holds: command, settings, facts, versions. Torch-free.

Records are published with their models, so they hold no absolute path of a machine: `write` stores
it as `~/photos` in the home directory, elsewhere relative to the record's folder
(`$RUN/../photos`), and `read_record` resolves it. Relative paths, URLs and Hub ids stay as given.
"""

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from vqvae2.common.config import differences, read_yaml, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import check_empty, write_text

PACKAGES = ("vqvae2", "torch", "accelerate", "numpy", "pyarrow")
SAMPLE_NAME = "image_sample"  # the fact that holds marks of some images, separated by spaces
HASHED = {  # facts that are hashes, in words
    "image_names": "other images, or of the same with other names, labels or splits",
    "rows": "other images",
    "encoder": "another autoencoder",
    "vqvae": "another autoencoder",
    "codes": "other codes",
    "conditions": "other conditions",
    "normal": "another calibration",
    "perceptual": "another network of the perceptual loss",
    "skipped": "images of which others cannot be read",
    "files": "other files",
    "recipe": "another recipe",
    "known": "another picture, mask or --keep-levels",
}
RUN = "$RUN/"
ABSOLUTE = re.compile(r"(file://)?((?:\$RUN/|/|~).*)")


def versions() -> dict[str, str]:
    """What computes here: package -> version."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path: PYTHONPATH=vqvae2 python -m ...
            found[name] = "not installed"
    return found


def command_line() -> str:
    """The command that started this process, as a shell takes it, with `last_names`."""
    words = []
    for word in sys.argv:
        flag, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + sign + last_names(value))
    return shlex.join(words)


def last_names(value: Any) -> Any:
    """A value for where paths cannot be resolved: each absolute one reduced to its last name."""
    return _change_paths(value, lambda path: Path(path).name)


def read_record(path: Path) -> dict[str, Any]:
    """A run record, with its paths as they are on this machine; see `read_yaml` for errors."""
    return _change_paths(read_yaml(path), _resolve, path.parent)


def _resolve(path: str, folder: Path) -> str:
    if path.startswith(RUN):
        path = os.path.join(os.path.abspath(folder), path.removeprefix(RUN))
    return os.path.normpath(os.path.expanduser(path))


def _hide_folders(path: str, folder: Path) -> str:
    """The inverse of `_resolve`."""
    home, path = os.path.expanduser("~"), os.path.abspath(os.path.expanduser(path))
    if Path(path).is_relative_to(home):
        return f"~/{os.path.relpath(path, home)}"
    return RUN + os.path.relpath(path, folder)


def _change_paths(value: Any, change: Callable[..., str], *place: Path) -> Any:
    """Apply a function (of a path and its place) to all absolute paths in nested values."""
    if isinstance(value, Mapping):
        return {key: _change_paths(item, change, *place) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_change_paths(item, change, *place) for item in value]
    if isinstance(value, str) and (match := ABSOLUTE.fullmatch(value)):
        return (match[1] or "") + change(match[2], *place)
    return value


@dataclass(frozen=True)
class RunRecord:
    """A run's command, configuration and facts, none of which may change, and notes that may."""

    command: str
    config: Any
    file_name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def check(self, folder: Path) -> None:
        """Raise a `UserError` if a folder holds another run, or files of no run at all."""
        path = folder / self.file_name
        if not path.exists():
            check_empty(folder, f"run of {self.command!r}")
            return

        # The same command, facts and settings, as far as the record has them.
        old = read_record(path)
        facts = {"command": self.command, **self.facts}
        marks, old_marks = (str(record.pop(SAMPLE_NAME, "")).split() for record in (facts, old))
        changed = [(k, old[k], fact) for k, fact in facts.items() if old.get(k, fact) != fact]
        settings = _change_paths(to_dict(self.config), _resolve, folder)
        for key, before, after in changed + differences(type(self.config), old, settings):
            problem = f"holds a run with {key} = {before!r}, but this command says {after!r}"
            advice = "repeat the run's settings to continue it"
            if match := re.fullmatch(r"(\w+)_(hash|sha256)", key):
                problem = f"holds a run of {HASHED.get(match[1], 'another ' + match[1])}"
                problem += f" ({key} {str(before)[:12]}, here {str(after)[:12]})"
                advice = "restore what that was made from, remove the folder to make it anew"
                if match[1] == "recipe":  # of which a run holds a copy of its own
                    advice = "restore that (to change the run, edit the recipe.yaml that it holds)"
            raise UserError(f"{folder} {problem}: {advice}, or choose another --output-dir.")

        # The same images, by the marks of most: a few may have been repaired meanwhile.
        pairs = list(zip_longest(marks, old_marks)) if marks and old_marks else []
        if sum(mark != old_mark for mark, old_mark in pairs) > len(pairs) / 2:
            problem = f"{folder} holds a run on other images, though they have the same names"
            advice = "restore those, or choose another --output-dir"
            raise UserError(f"{problem} (most of {SAMPLE_NAME} differs): {advice}.")

    def write(self, folder: Path) -> None:
        """Write the record, with the command line and the versions that run it."""
        record = {"command": self.command, **self.facts, **to_dict(self.config)}
        record |= {"command_line": command_line(), "versions": versions(), **self.notes}
        text = yaml.safe_dump(_change_paths(record, _hide_folders, folder), sort_keys=False)
        write_text(folder / self.file_name, text)
