"""Images that could not be read and are skipped: counted, and listed in skipped.jsonl with the reason."""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

FILE_NAME = "skipped.jsonl"


def list_skipped(folder: Path, skipped: Sequence[tuple[str, str]], process_index: int = 0) -> None:
    """Add names and reasons to the list, each once. Every process has a list of its own."""
    path = folder / (FILE_NAME if process_index == 0 else f"skipped_{process_index}.jsonl")
    listed = set(path.read_text().splitlines()) if path.exists() else set()
    new = [
        line
        for line in dict.fromkeys(
            json.dumps({"image": name, "reason": reason}) for name, reason in skipped
        )
        if line not in listed
    ]
    if new:
        with open(path, "a") as file:
            file.write("".join(f"{line}\n" for line in new))


def list_met(folder: Path, process_index: int, name: str, reason: str) -> None:
    """List one that a stream has met, and say so at once."""
    tqdm.write(f"skipped {name}: {reason}")
    list_skipped(folder, [(name, reason)], process_index)


def report_skipped(folder: Path) -> str:
    """A sentence on all that the processes have listed here, or nothing."""
    lists = sorted(folder.glob("skipped*.jsonl"))
    names = {json.loads(line)["image"] for path in lists for line in path.read_text().splitlines()}
    where = f"{' and '.join(map(str, lists))} {'lists' if len(lists) == 1 else 'list'} them"
    return f"{len(names)} images could not be read and were skipped: {where}." if names else ""
