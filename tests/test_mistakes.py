"""A few of the mistakes of benchmarks/mistakes.py, the same ones each time."""

import random
from pathlib import Path

import pytest

from benchmarks.mistakes import all_trials, choose, make_run, report


@pytest.mark.timeout(60)
def test_every_mistake_is_answered_by_one_sentence(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    rng = random.Random(13)
    trials = choose(all_trials(tmp_path / "run", rng), 90, rng)
    assert len(trials) == 90
    assert not report(trials, tmp_path / "run", seconds=20)
