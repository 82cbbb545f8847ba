"""Two real processes over gloo do what one does on the joint batch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, command, two_processes
from tests.test_training import last_checkpoint, metrics
from tests.worker_two_processes import VARIANTS

WORKER = ROOT / "tests" / "worker_two_processes.py"


def test_stage_1_equals_one_process(tmp_path: Path) -> None:
    """Twenty float64 steps with initialisation, revival and averages: weights agree to 1e-9, for
    every variant of the worker."""
    for number, variant in itertools.product(("one", "two"), VARIANTS):
        (tmp_path / number / variant).mkdir(parents=True)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, WORKER, "1", tmp_path / "one"], check=True, env=environment)
    said = "".join(result.stdout for result in two_processes(WORKER, 2, tmp_path / "two"))

    # One process's SIGTERM stopped both at the same slow step, though no report was due; and each
    # says that they see other images.
    for rank in (0, 1):
        assert f"process {rank}: {tmp_path / 'two' / 'dropout_1'}: stopped at step 3 of 9" in said
        assert said.count("process 1 sees other images than process 0 (10 instead of 12)") == 2

    # The same weights.
    for variant in VARIANTS:
        expected = torch.load(tmp_path / "one" / variant / "rank_0.pt", weights_only=True)
        folder = tmp_path / "two" / variant
        ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name, tensor in expected.items():
            what = f"{variant}: {name}"
            assert torch.equal(ranks[0][name], ranks[1][name]), what
            torch.testing.assert_close(ranks[0][name], tensor, atol=1e-9, rtol=0, msg=what)


def assert_close_figures(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert b == pytest.approx(a, rel=tolerance)


def test_the_script_is_the_command(photos: Path, tmp_path: Path) -> None:
    """Both processes train, held-out figures are overall ones, and one process can load the run."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--config", "tiny", "--data.path", photos, "--mixed-precision", "no"]
    command("train", *arguments, "--output-dir", one)
    two_processes(ROOT / "scripts" / "train.py", *arguments, "--output-dir", two)
    assert load_file(last_checkpoint(two) / "random.safetensors").keys() == {"0.cpu", "1.cpu"}
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
