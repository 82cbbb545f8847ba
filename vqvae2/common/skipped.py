"""Images that a run skipped because they could not be read: listed in skipped.jsonl, counted."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)


def list_skipped(folder: Path, skipped: Iterable[tuple[str, str]], process_index: int = 0) -> None:
    """Add (name, reason) pairs to the list, each once. Every process has a list of its own."""
    suffix = f"_{process_index}" if process_index else ""
    path = folder / f"skipped{suffix}.jsonl"
    listed = set(path.read_text().splitlines()) if path.exists() else set()
    with open(path, "a") as file:
        for name, reason in skipped:
            line = json.dumps({"image": name, "reason": reason})
            if line not in listed:
                listed.add(line)
                file.write(f"{line}\n")
    if not listed:
        path.unlink()


def report_skipped(folder: Path) -> None:
    """Say how many images all processes have listed here, if any."""
    lists = sorted(folder.glob("skipped*.jsonl"))
    lines = [line for path in lists for line in path.read_text().splitlines()]
    names = {json.loads(line)["image"] for line in lines}
    if names:
        where = " and ".join(map(str, lists))
        logger.info("%d images could not be read and were skipped: see %s.", len(names), where)
