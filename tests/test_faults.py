"""A few of the trials of benchmarks/faults.py, the same ones each time."""

import shutil
from pathlib import Path

import pytest

from benchmarks.faults import Faults


@pytest.fixture(scope="module")
def faults(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """The session's run, with what else the trials read."""
    work = shutil.copytree(run, tmp_path_factory.mktemp("faults") / "runs" / "x")
    shutil.copytree(photos, work / "photos")
    made = Faults(work, seed=0)
    made.prepare()
    return made


@pytest.mark.parametrize(
    ("kind", "number"), [("kills", 2), ("disks", 2), ("flips", 4), ("pairs", 1)]
)
def test_a_fault_changes_nothing_or_is_told_in_a_sentence(
    kind: str, number: int, faults: Faults
) -> None:
    faults.random.seed(kind)  # whichever kind comes first
    trials = getattr(faults, kind)(number)
    assert trials.number >= number
    assert not trials.failures
