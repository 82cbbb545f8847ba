"""The training loop: what it computes is a function of its configuration, whatever interrupts it or splits it up."""

import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import kill_when, vqvae2
from vqvae2.common.config import TrainingConfig
from vqvae2.common.training import learning_rate, update_average

STEPS = 60


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the model, the training state, the figures."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    last = sorted((one / "checkpoints").iterdir())[-1].name
    assert (one / "checkpoints" / last / "model.safetensors").read_bytes() == (other / "checkpoints" / last / "model.safetensors").read_bytes()
    states = [torch.load(run / "checkpoints" / last / "optimizer.bin", weights_only=True)["state"] for run in (one, other)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(s.values() for s in states), strict=True) for k in a)


def train_command(photos: Path, output_dir: Path, *more: object) -> list[object]:
    return ["train", "--config", "tiny", "--data.path", photos, "--output-dir", output_dir, "--num-steps", STEPS, *more]


def prior_command(run: Path, output_dir: Path, *more: object) -> list[object]:
    return ["train-prior", "--config", "tiny", "--codes", run / "codes", "--level", "bottom", "--output-dir", output_dir, "--num-steps", STEPS, *more]


def line_count(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("stage", ["stage 1", "prior"])
def test_killed_and_continued_is_uninterrupted(stage: str, photos: Path, run: Path, tmp_path: Path) -> None:
    command = train_command if stage == "stage 1" else prior_command
    source = photos if stage == "stage 1" else run
    vqvae2(*command(source, tmp_path / "whole"))
    killed = tmp_path / "killed"
    for _ in range(2):  # at two random steps
        until = random.randint(1, 18)
        code = kill_when(lambda until=until: line_count(killed) >= until, *command(source, killed))
        assert code in (-signal.SIGKILL, 0)
    vqvae2(*command(source, killed))
    assert_same_run(tmp_path / "whole", killed)


def test_a_clean_stop_saves_and_continues(photos: Path, tmp_path: Path) -> None:
    vqvae2(*train_command(photos, tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    code = kill_when(lambda: line_count(stopped) >= 3, *train_command(photos, stopped), number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert not (stopped / "checkpoints" / f"step_{STEPS:08d}").exists()
    vqvae2(*train_command(photos, stopped))
    assert_same_run(tmp_path / "whole", stopped)


def test_a_finished_run_is_left_alone_and_can_be_prolonged(photos: Path, tmp_path: Path) -> None:
    vqvae2(*train_command(photos, tmp_path / "x"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert "done already" in vqvae2(*train_command(photos, tmp_path / "x")).stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()}
    vqvae2(*train_command(photos, tmp_path / "x", "--num-steps", STEPS + 4))
    assert metrics(tmp_path / "x")[-1]["step"] == STEPS + 4
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir()) == [f"step_{STEPS:08d}", f"step_{STEPS + 4:08d}"]


def test_the_best_weights_are_kept(photos: Path, tmp_path: Path) -> None:
    """With a learning rate that ruins the model after a good start, the folder holds the good start."""
    vqvae2(*train_command(photos, tmp_path / "x", "--learning-rate", "0.5", "--warmup-steps", "50", "--weight-ema-decay", "0"))
    validations = [line["validation/mse"] for line in metrics(tmp_path / "x") if "validation/mse" in line]
    best = min(validations)
    assert best < validations[-1]
    out = vqvae2("train", "--config", "tiny", "--data.path", photos, "--output-dir", tmp_path / "again", "--init-from", tmp_path / "x",
                 "--num-steps", 1, "--learning-rate", "1e-12", "--weight-ema-decay", "0", "--model.quantizer.decay", "0.99999")  # fmt: skip
    assert "held out" in out.stdout
    assert metrics(tmp_path / "again")[-1]["validation/mse"] == pytest.approx(best, rel=0.02)


def test_accumulation_and_workers_do_not_change_the_result(photos: Path, tmp_path: Path) -> None:
    """With a codebook that learns by gradient alone; running averages move between the parts of a batch."""
    options = ("--mixed-precision", "no", "--model.quantizer.kind", "gradient", "--model.quantizer.revival-threshold", 0, "--num-steps", 12)
    vqvae2(*train_command(photos, tmp_path / "whole", *options))
    vqvae2(*train_command(photos, tmp_path / "workers", *options, "--data.num-workers", 1))
    assert_same_run(tmp_path / "whole", tmp_path / "workers")
    # The data-dependent start looks at the first part alone, so both begin from the same weights.
    for name, parts in (("one", 1), ("four", 4)):
        vqvae2(*train_command(photos, tmp_path / name, *options, "--init-from", tmp_path / "whole", "--gradient-accumulation-steps", parts))
    one, four = (load_file(tmp_path / name / "checkpoints" / "step_00000012" / "model.safetensors") for name in ("one", "four"))
    for key in [key for key in one if not key.endswith((".num_updates", ".counts"))]:
        torch.testing.assert_close(one[key], four[key], atol=1e-4, rtol=0)


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = TrainingConfig(num_steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])
    for num_steps in (1, 5, 19):  # short runs
        rates = [learning_rate(s, TrainingConfig(num_steps=num_steps)) for s in range(1, num_steps + 1)]
        assert all(0 < rate <= 1e-3 for rate in rates)


def test_the_average_lerps_parameters_and_copies_buffers() -> None:
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    update_average(average, model, step=1000, decay=0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [7.0, 7.0]


def test_every_training_setting_changes_something(photos: Path, tmp_path: Path) -> None:
    """No flag is accepted and dropped."""
    vqvae2(*train_command(photos, tmp_path / "base", "--num-steps", 8))
    base = (tmp_path / "base" / "checkpoints" / "step_00000008" / "model.safetensors").read_bytes()
    for i, option in enumerate(
        (["--batch-size", 8], ["--learning-rate", "1e-2"], ["--warmup-steps", 5], ["--weight-decay", "0.5"], ["--adam-betas", "0.5", "0.5"],
         ["--max-grad-norm", "0.001"], ["--mixed-precision", "no"], ["--seed", 1], ["--reconstruction-loss", "l1"], ["--model.quantizer.beta", "2"])
    ):  # fmt: skip
        vqvae2(*train_command(photos, tmp_path / str(i), "--num-steps", 8, *option))
        assert (tmp_path / str(i) / "checkpoints" / "step_00000008" / "model.safetensors").read_bytes() != base, option


def test_tensorboard(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    vqvae2(*train_command(photos, tmp_path / "x", "--num-steps", 6, "--tracker", "tensorboard"))
    assert list((tmp_path / "x").rglob("events.out.tfevents*"))
