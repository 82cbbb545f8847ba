"""Two real processes over gloo do what one does on the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, two_processes
from tests.conftest import command as run_here

WORKER = ROOT / "tests" / "worker_two_processes.py"


@pytest.mark.parametrize(
    ("quantizer", "parts"),
    [("ema", 1), ("cosine", 1), ("gradient", 1), ("fsq", 2), ("adversary", 1)],
)
def test_stage_1_equals_one_process(quantizer: str, parts: int, tmp_path: Path) -> None:
    """Twenty steps in float64 with initialisation, revival and averages on: weights and codebooks agree to 1e-9."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    subprocess.run(
        [sys.executable, WORKER, "1", quantizer, str(parts), tmp_path / "one"],
        check=True,
        env=environment,
    )
    two_processes(WORKER, 2, quantizer, parts, tmp_path / "two")
    one = torch.load(tmp_path / "one" / "rank_0.pt", weights_only=True)
    first, second = (
        torch.load(tmp_path / "two" / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=1e-9, rtol=0, msg=name)


def test_the_script_is_the_command(photos: Path, tmp_path: Path) -> None:
    """Both processes train, validation figures are overall ones, and the folder loads in one process."""
    arguments = ["--config", "tiny", "--data.path", photos, "--mixed-precision", "no"]
    run_here("train", *arguments, "--output-dir", tmp_path / "one")
    two_processes(ROOT / "scripts" / "train.py", *arguments, "--output-dir", tmp_path / "two")
    assert (
        len(list((tmp_path / "two" / "checkpoints" / "step_00000012").glob("random_states_*.pkl")))
        == 2
    )
    lines = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        for name in a.keys() - {"images_per_second", "data_wait_share"}:
            assert b[name] == pytest.approx(a[name], rel=0.02), name
    run_here(
        "reconstruct",
        "--vqvae",
        tmp_path / "two",
        photos,
        "--num-images",
        3,
        "--output-dir",
        tmp_path / "out",
    )


def test_prior_on_two_processes(run: Path, tmp_path: Path) -> None:
    arguments = [
        "--config",
        "tiny",
        "--codes",
        run / "codes",
        "--level",
        "bottom",
        "--mixed-precision",
        "no",
        "--transformer.dropout",
        "0",
        "--label-dropout",
        "0",
    ]
    run_here("train-prior", *arguments, "--output-dir", tmp_path / "one")
    two_processes(ROOT / "scripts" / "train_prior.py", *arguments, "--output-dir", tmp_path / "two")
    lines = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        for name in a.keys() - {"images_per_second", "data_wait_share"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
