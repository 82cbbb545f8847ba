"""A long training tries whether it is faster compiled, and goes on the same way when continued."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.worker_two_processes import Dropout, Images, dropout_loss
from vqvae2.common import compiling
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.config import TrainingConfig
from vqvae2.common.files import read_json
from vqvae2.common.fit import fit
from vqvae2.common.loading import ShuffledLoader


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "STEPS", 2)
    monkeypatch.setattr(compiling, "LONG", 0.0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[int, bool]]:
    """Train in a folder of that name, or continue; which steps were compiled."""

    def train(name: str, *, breaks_at: int = -1, choice: bool | str = "auto") -> dict[int, bool]:
        steps = {"num_steps": 12, "checkpoint_every": 1, "keep_checkpoints": 1, "log_every": 1}
        settings = TrainingConfig(batch_size=4, mixed_precision="no", compile=choice, **steps)  # type: ignore[arg-type]
        model, compiled = Dropout(), {}
        saved = sorted((tmp_path / name / "checkpoints").glob("step_*"))
        first = int(saved[-1].name[5:]) + 1 if saved else 1

        def loss_fn(net: torch.nn.Module, batch: dict) -> tuple:
            step = first + len(compiled)
            if step == breaks_at:
                raise RuntimeError("power failure")
            compiled[step] = model._compiled_call_impl is not None
            return dropout_loss(net, batch)

        accelerator = make_accelerator(settings, tmp_path / name)
        fit(accelerator, model, loss_fn, ShuffledLoader(Images(), 4), settings, tmp_path / name)
        return compiled

    return train


@pytest.mark.parametrize("faster", [True, False])
def test_a_long_training_is_tried_compiled_and_goes_on_the_faster_way(
    train: Callable, faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiling, "CLEARLY", 1e9 if faster else 0.0)
    expected = {step: step in (5, 6, 7, 8) or (faster and step > 8) for step in range(1, 13)}
    assert train("whole") == expected
    assert read_json(tmp_path / "whole" / compiling.RECORD)["compiled"] == faster

    # Continued, each step is taken as it was the first time, whatever the clock says now.
    for breaks_at in (3, 7, 10):
        with pytest.raises(RuntimeError, match="power failure"):
            train(f"broken {breaks_at}", breaks_at=breaks_at)
        if breaks_at == 10:
            monkeypatch.setattr(compiling, "CLEARLY", 0.0 if faster else 1e9)
        rest = train(f"broken {breaks_at}")
        assert rest == {step: expected[step] for step in range(breaks_at, 13)}
        monkeypatch.setattr(compiling, "CLEARLY", 1e9 if faster else 0.0)


def test_a_short_training_and_one_that_is_told_so_are_not_tried(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "LONG", 1e9)
    assert not any(train("short").values())
    assert all(train("always", choice=True).values())
    monkeypatch.setattr(compiling, "LONG", 0.0)
    assert not any(train("never", choice=False).values())


def test_what_cannot_be_compiled_is_trained_as_it_is(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "CLEARLY", 0.0)
    with mock.patch("torch.compile", partial(torch.compile, backend=fails)):
        compiled = train("broken compiler")
    assert [step for step, tried in compiled.items() if tried] == [5, 6, 7, 8]
    assert len(compiled) == 12


def test_a_training_that_went_past_its_trial_by_a_flag_goes_on(train: Callable) -> None:
    with pytest.raises(RuntimeError, match="power failure"):
        train("mixed", breaks_at=7)
    with pytest.raises(RuntimeError, match="power failure"):
        train("mixed", breaks_at=11, choice=False)
    assert train("mixed") == {11: False, 12: False}


def test_time_without_steps_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations of 100 s would make every step look as slow, compiled or not."""
    now = [0.0]
    monkeypatch.setattr(compiling.CompileTrial, "_now", lambda self: now[0])
    trial = compiling.CompileTrial(
        Dropout(), torch.device("cpu"), "auto", tmp_path, lambda action: action()
    )
    trial.begin(0)
    for step in range(1, 9):
        trial.before_step(step)
        now[0] += 0.5 if step > 4 else 1.0
        trial.after_step(step, 1000)
        now[0] += 100
        trial.leave_out(100)
    record = read_json(tmp_path / compiling.RECORD)
    assert record["before"] == pytest.approx(1.0)
    assert record["compiled"]
