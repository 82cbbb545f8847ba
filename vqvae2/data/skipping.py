"""Images that could not be read and are skipped: counted, and listed in skipped.jsonl with the reason."""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from vqvae2.common.files import write_text

FILE_NAME = "skipped.jsonl"


def report_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> str:
    """List names and reasons, if there are any, and say so in a sentence (else an empty one)."""
    if not skipped:
        return ""
    write_text(folder / FILE_NAME, "".join(_line(name, reason) for name, reason in skipped))
    return f"{len(skipped)} images could not be read and were skipped: {folder / FILE_NAME} lists them."


def note_skipped(folder: Path, process_index: int, name: str, reason: str) -> None:
    """Append one that a stream met, each process to a list of its own (a run that continues may list it again)."""
    path = folder / (FILE_NAME if process_index == 0 else f"skipped_{process_index}.jsonl")
    tqdm.write(f"skipped {name}: {reason} (listed in {path})")
    with open(path, "a") as file:
        file.write(_line(name, reason))


def _line(name: str, reason: str) -> str:
    return json.dumps({"image": name, "reason": reason}) + "\n"
