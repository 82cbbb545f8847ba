"""Training states: whole or left out, never opened as code, and never missed in silence."""

import errno
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker_two_processes import Dropout, Images, dropout_loss
from vqvae2.common import checkpoint
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.artifact import load_weights
from vqvae2.common.config import TrainingConfig, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, whole_file, write_json
from vqvae2.common.fit import fit, is_finished
from vqvae2.common.loading import ShuffledLoader

FILES = (
    "state.json",
    "model.safetensors",
    "averaged.safetensors",
    "optimizer.safetensors",
    "metrics.safetensors",
    "random.safetensors",
)


def config(**changes: int) -> TrainingConfig:
    steps = {"num_steps": 6, "checkpoint_every": 2, "log_every": 1, **changes}
    return TrainingConfig(batch_size=4, warmup_steps=1, mixed_precision="no", **steps)  # type: ignore[arg-type]


def train(output_dir: Path, *, breaks_at: int = -1, **changes: int) -> dict[str, torch.Tensor]:
    """The weights after some steps with dropout, or after a break before one is done."""
    calls: list[object] = []

    def loss_fn(model: torch.nn.Module, batch: dict) -> tuple:
        calls.append(batch)
        if len(calls) == breaks_at:
            raise RuntimeError("power failure")
        return dropout_loss(model, batch)

    settings, model = config(**changes), Dropout()
    accelerator = make_accelerator(settings, output_dir)
    fit(accelerator, model, loss_fn, ShuffledLoader(Images(), 4), settings, output_dir)
    return model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing interrupted."""
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A run that broke off in step 6: it has the states of steps 2 and 4."""
    with pytest.raises(RuntimeError, match="power failure"):
        train(tmp_path / "run", breaks_at=6)
    assert checkpoint.saved_steps(tmp_path / "run" / "checkpoints") == [2, 4]
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def other_tensors(path: Path) -> None:
    """Names and shapes of another training, under hashes that fit."""
    if path.suffix == ".safetensors":
        save_file({"x": torch.zeros(3)}, path)
        state = checkpoint.Numbers(**json.loads((path.parent / "state.json").read_text()))
        files = {**state.files, path.name: file_hash(path)}
        write_json(path.parent / "state.json", to_dict(replace(state, files=files).signed()))
    else:
        write_json(path, {"step": "4"})


def other_number(path: Path) -> None:
    """A digit that changed."""
    path.write_bytes(path.read_bytes().replace(b"4", b"5", 1))


@pytest.mark.parametrize(
    ("name", "damage"),
    [*product(FILES, (Path.unlink, cut, flip, other_tensors)), ("state.json", other_number)],
)
def test_a_damaged_state_gives_way_to_an_older_one(
    name: str,
    damage: Callable[[Path], None],
    broken: Path,
    whole: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(broken / "checkpoints" / "step_00000004" / name)
    with caplog.at_level(logging.WARNING, "vqvae2"):
        weights = train(broken)
    assert "step_00000004 is not whole, so an older state is taken" in caplog.text
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    assert checkpoint.saved_steps(broken / "checkpoints") == [4, 6]
    checkpoint.read_checkpoint(broken / "checkpoints" / "step_00000004")  # written anew


def test_a_run_without_a_whole_state_is_not_begun_anew(broken: Path) -> None:
    for path in broken.glob("checkpoints/*/model.safetensors"):
        flip(path)
    with pytest.raises(UserError, match=r"no state in it is whole .* give --init-from"):
        train(broken)
    assert checkpoint.saved_steps(broken / "checkpoints") == [2, 4]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(broken: Path, tmp_path: Path) -> None:
    """What earlier versions wrote is refused; what lies beside a state is left alone."""
    folder = broken / "checkpoints" / "step_00000004"
    names = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin")
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "run_code")))
    with pytest.raises(UserError, match=r"of an earlier version.*--init-from"):
        train(broken)
    (folder / names[0]).unlink()
    train(broken)
    assert not (tmp_path / "run_code").exists()


@pytest.mark.parametrize("full_at", range(1, 6))
def test_a_full_disk_leaves_the_last_state_and_nothing_half_done(
    full_at: int, tmp_path: Path, whole: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = tmp_path / "run", []

    @contextmanager
    def full_disk(path: Path) -> Iterator[Path]:
        written.append(path)
        with whole_file(path) as aside:
            yield aside
            if len(written) == 5 + full_at:  # five files for the state before the first step
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "whole_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000000"]
    monkeypatch.undo()
    weights = train(run)
    assert all(torch.equal(weights[key], whole[key]) for key in whole)


def test_what_a_killed_run_left_half_done_is_removed(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in (".step_00000002.removed", ".step_00000006.partial"):
        (broken / "checkpoints" / name).mkdir()
    (broken / "checkpoints" / ".step_00000008.partial").symlink_to(tmp_path / "other")
    train(broken)
    (broken / "checkpoints" / ".step_00000002.removed").mkdir()
    train(broken)  # which is finished
    names = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006"]
    assert (tmp_path / "other").is_dir()


def test_a_finished_run_needs_no_checkpoints_and_is_not_begun_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    shutil.rmtree(run / "checkpoints")
    assert is_finished(run, config())
    train(run)
    assert not (run / "checkpoints").exists()
    with pytest.raises(UserError, match=r"of step 6 and no checkpoint .* step 8: .*--init-from"):
        train(run, num_steps=8)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="of an unknown step and no checkpoint"):
        train(run)


def test_an_unfinished_run_without_checkpoints_is_not_begun_anew(broken: Path) -> None:
    (broken / "model.safetensors").touch()  # the best so far
    assert not is_finished(broken, config())
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(UserError, match=r"of step 5 and no checkpoint .* step 6"):
        train(broken)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "mine.txt"
    run.mkdir()
    other.write_text("mine")
    (run / name).symlink_to(other)
    with pytest.raises(UserError, match=f"{name} is a link"):
        train(run)
    assert other.read_text() == "mine"


def test_broken_lines_of_figures_are_named(broken: Path) -> None:
    path = broken / "metrics.jsonl"
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(UserError, match=r"line 1 of .*metrics.jsonl is no line of figures"):
        train(broken)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.full((8, 256), torch.nan), "is not finite"),
        (torch.full((8, 256), 1e300, dtype=torch.float64), "is not finite"),
        (torch.ones(8, 256, dtype=torch.int64), "is of type torch.int64 instead of torch.float32"),
        (torch.ones(8, 256, dtype=torch.bool), "is of type torch.bool"),
        (torch.ones(8, 256, dtype=torch.complex64), "is of type torch.complex64"),
        (torch.ones(8, 256).to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
    ],
    ids=["nan", "too large", "int", "bool", "complex", "fp8"],
)
def test_weights_that_are_no_finite_numbers_are_refused(
    wrong: torch.Tensor, said: str, tmp_path: Path
) -> None:
    save_file({"2.weight": wrong, "2.bias": torch.zeros(8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        load_weights(Dropout(), tmp_path)


def test_half_precision_weights_are_loaded(tmp_path: Path) -> None:
    state = {name: weight.bfloat16() for name, weight in Dropout().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    load_weights(Dropout(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["2.bias"].dtype == torch.bfloat16


def test_a_launcher_s_environment_changes_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = make_accelerator(config(), tmp_path)
    assert accelerator.gradient_accumulation_steps == 1
    model = Dropout()
    assert accelerator.prepare(model) is model
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP is set"):
        make_accelerator(config(), tmp_path)
