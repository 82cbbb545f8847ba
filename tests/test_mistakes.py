"""A few of the mistakes of benchmarks/mistakes.py, the same ones each time."""

import random
import shutil
from pathlib import Path

from benchmarks.mistakes import all_trials, choose, make_inputs, report


def test_every_mistake_is_answered_by_one_sentence(run: Path, photos: Path, tmp_path: Path) -> None:
    x = shutil.copytree(run, tmp_path / "x")
    shutil.copytree(photos, x / "photos")
    make_inputs(x)
    rng = random.Random(13)
    trials = choose(all_trials(x, rng), 30, rng)
    assert len(trials) == 30
    assert not report(trials, x, seconds=300)
