"""Two real processes over gloo do what one does on the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, command, two_processes
from tests.test_training import last_checkpoint, metrics

WORKER = ROOT / "tests" / "worker_two_processes.py"


@pytest.mark.parametrize(
    ("quantizer", "parts"),
    [("ema", 1), ("cosine", 1), ("gradient", 1), ("fsq", 2), ("adversary", 1)],
)
def test_stage_1_equals_one_process(quantizer: str, parts: int, tmp_path: Path) -> None:
    """Twenty float64 steps with initialisation, revival and averages: weights agree to 1e-9."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    alone = [sys.executable, WORKER, "1", quantizer, str(parts), one]
    subprocess.run(alone, check=True, env=environment)
    two_processes(WORKER, 2, quantizer, parts, two)
    expected = torch.load(one / "rank_0.pt", weights_only=True)
    ranks = [torch.load(two / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, atol=1e-9, rtol=0, msg=name)


def assert_close_figures(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert b == pytest.approx(a, rel=tolerance)


def test_the_script_is_the_command(photos: Path, tmp_path: Path) -> None:
    """Both processes train, held-out figures are overall ones, and one process can load the run."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--config", "tiny", "--data.path", photos, "--mixed-precision", "no"]
    command("train", *arguments, "--output-dir", one)
    two_processes(ROOT / "scripts" / "train.py", *arguments, "--output-dir", two)
    assert len(list(last_checkpoint(two).glob("random_states_*.pkl"))) == 2
    assert_close_figures(one, two, 0.02)
    some = ("--num-images", 3, "--output-dir", tmp_path / "out")
    command("reconstruct", "--vqvae", two, "--data.path", photos, *some)


def test_a_prior_on_two_processes(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--config", "tiny", "--codes", run / "codes", "--level", "bottom"]
    arguments += ["--mixed-precision", "no", "--transformer.dropout", 0, "--label-dropout", 0]
    command("train-prior", *arguments, "--output-dir", one)
    two_processes(ROOT / "scripts" / "train_prior.py", *arguments, "--output-dir", two)
    assert_close_figures(one, two, 1e-4)
