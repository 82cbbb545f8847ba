"""The training loop: what it computes is a function of its configuration alone."""

import dataclasses
import importlib.util
import json
import math
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipelines.cli import load_recipe
from prior.audit import warn_of_noise
from tests.conftest import command, kill_when, write_images
from tests.test_sources import numbered_tars
from tests.worker_two_processes import Images, small_model
from vqvae2.common.accelerate import make_accelerator, native_bf16
from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.fit import fit, is_finished, learning_rate, update_average
from vqvae2.common.loading import ShuffledLoader
from vqvae2.common.metrics import PANEL, best_validation, conclusion, save_curves
from vqvae2.config import DataConfig, DiscriminatorConfig, TrainVQVAEConfig
from vqvae2.data import is_held_out
from vqvae2.losses import make_loss
from vqvae2.model import VQVAE2

STEPS = 60
TIMES = {"images_per_second", "data_wait_share"}


def words(flags: tuple[object, ...]) -> list[object]:
    """Flags as a list of words, where several may stand in one string."""
    split = (flag.split() if isinstance(flag, str) else [flag] for flag in flags)
    return [word for several in split for word in several]


def train_command(
    photos: Path, output_dir: Path, *flags: object, recipe: object = "tiny"
) -> list[object]:
    needed = ("--data.path", photos, "--output-dir", output_dir, "--num-steps", STEPS)
    return ["train", "--config", recipe, *needed, *words(flags)]


def prior_command(run: Path, output_dir: Path, *flags: object) -> list[object]:
    needed = ("--codes", run / "codes", "--output-dir", output_dir, "--num-steps", STEPS)
    return ["train-prior", "--config", "tiny", "--level", "bottom", *needed, *words(flags)]


def stream_command(tars: Path, output_dir: Path, *flags: object) -> list[object]:
    settings = "--data.streaming --data.on-error skip --image.validation-fraction 0.2"
    return train_command(tars, output_dir, settings, *flags)


def train(photos: Path, output_dir: Path, *flags: object, recipe: object = "tiny") -> Path:
    """A run of a few steps, or of as many as the flags say."""
    command(*train_command(photos, output_dir, *flags, recipe=recipe))
    return output_dir


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def line_count(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def last_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def trained_weights(run: Path) -> bytes:
    """The weights after the last step, which need not be the best ones."""
    return (last_checkpoint(run) / "model.safetensors").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the model, the training state, the figures."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    assert last_checkpoint(one).name == last_checkpoint(other).name
    assert trained_weights(one) == trained_weights(other)
    files = [json.loads((last_checkpoint(run) / "state.json").read_text()) for run in (one, other)]
    assert files[0] == files[1]  # which holds the hashes of all tensors


# Interruptions change nothing.


@pytest.mark.parametrize("stage", ["stage 1", "stream", "prior", "accumulation"])
def test_a_killed_run_continues_as_if_nothing_had_happened(
    stage: str, photos: Path, run: Path, tmp_path: Path
) -> None:
    source, make = photos, train_command
    if stage == "stream":
        source, make = numbered_tars(tmp_path / "tars", shards=4, rows=20), stream_command
    if stage == "prior":
        source, make = run, prior_command
    more = ("--gradient-accumulation-steps", 4) if stage == "accumulation" else ()
    command(*make(source, tmp_path / "whole", *more))
    killed = tmp_path / "killed"
    again = make(source, killed, *more)
    chance = random.Random(stage)
    for until in sorted(chance.randint(1, 15) for _ in range(2)):
        code = kill_when(lambda until=until: line_count(killed) >= until, *again)
        assert code in (-signal.SIGKILL, 0)  # it may be faster than its killer
    command(*again)
    assert_same_run(tmp_path / "whole", killed)


def test_a_clean_stop_saves_and_continues(photos: Path, tmp_path: Path) -> None:
    whole, stopped = train(photos, tmp_path / "whole"), tmp_path / "stopped"
    arguments = train_command(photos, stopped)
    code = kill_when(lambda: line_count(stopped) >= 3, *arguments, number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert not (stopped / "checkpoints" / f"step_{STEPS:08d}").exists()
    assert_same_run(whole, train(photos, stopped))


def test_fit_from_python_continues_exactly(tmp_path: Path) -> None:
    """With the library's own classes; the first run breaks off between two checkpoints."""

    def run_fit(output_dir: Path, *, breaks_at: int = -1) -> dict[str, torch.Tensor]:
        model = small_model()
        steps = {"num_steps": 9, "warmup_steps": 2, "checkpoint_every": 3}
        config = TrainingConfig(batch_size=4, mixed_precision="no", **steps)
        mse, calls = make_loss("mse", model.config.codebook_size_per_level), []

        def loss_fn(net: torch.nn.Module, batch: Mapping) -> tuple:
            calls.append(batch)
            if len(calls) == breaks_at:
                raise RuntimeError("power failure")
            return mse(net, batch)

        accelerator, loader = make_accelerator(config, output_dir), ShuffledLoader(Images(), 4)
        fit(accelerator, model, loss_fn, loader, config, output_dir)
        return load_file(last_checkpoint(output_dir) / "model.safetensors")

    whole = run_fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        run_fit(tmp_path / "parts", breaks_at=8)
    parts = run_fit(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_picture_that_needs_too_much_memory_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = small_model(), TrainingConfig(batch_size=4, num_steps=4, picture_every=2)
    draw = mock.Mock(side_effect=[torch.OutOfMemoryError, Image.new("RGB", (8, 8))])
    loss = make_loss("mse", model.config.codebook_size_per_level)
    accelerator, loader = make_accelerator(config, tmp_path), ShuffledLoader(Images(), 4)
    fit(accelerator, model, loss, loader, config, tmp_path, draw=draw)
    assert [path.stem for path in (tmp_path / "images").iterdir()] == ["step_00000004"]
    assert "memory is short, so there is no picture at step 2" in caplog.text


def test_a_fine_tuning_continues_without_its_first_weights(run: Path, tmp_path: Path) -> None:
    """Before it has a model of its own, too."""
    first, later = shutil.copytree(run / "prior_0", tmp_path / "first"), tmp_path / "later"
    flags: list[object] = ["train-prior", "--codes", run / "codes", "--level", "top"]
    flags += ["--init-from", first, "--validate-every", 4000, "--batch-size", 8]
    flags += ["--checkpoint-every", 1, "--log-every", 1, "--output-dir", later, "--num-steps"]
    kill_when(lambda: line_count(later) >= 3, *flags, 4000, number=signal.SIGTERM)
    assert not (later / "model.safetensors").exists()
    shutil.rmtree(first)
    command(*flags, 20)
    width = read_json(later / "config.json")["network"]["width"]
    assert width == read_json(run / "prior_0" / "config.json")["network"]["width"] < 128


def test_a_finished_run_is_left_alone_and_can_be_prolonged(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(run: Path) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    x = train(photos, tmp_path / "x")
    before = times(x)
    capsys.readouterr()
    train(photos, x)
    assert f"all {STEPS} steps are done" in capsys.readouterr().out
    assert times(x) == before

    train(photos, x, "--num-steps", STEPS + 4)
    assert metrics(x)[-1]["step"] == STEPS + 4
    names = sorted(path.name for path in (x / "checkpoints").iterdir())
    assert names == [f"step_{STEPS:08d}", f"step_{STEPS + 4:08d}"]


def test_a_moved_run_continues(photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "here", "--num-steps 8")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    train(shutil.copytree(photos, tmp_path / "moved photos"), moved, "--num-steps 12")
    assert metrics(moved)[-1]["step"] == 12


def test_a_run_stops_when_its_held_out_loss_has_not_fallen_for_a_while(tmp_path: Path) -> None:
    """With patience 2; one that broke off on the way stops at the same step, with the same bits."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0, 10: 0.5, 12: 2.0}

    def run_fit(output_dir: Path, *, breaks_at: int = 99, **changes: int) -> TrainingConfig:
        model, calls = small_model(), []
        mse = make_loss("mse", model.config.codebook_size_per_level)
        intervals = {"validate_every": 2, "checkpoint_every": 3, "log_every": 1}
        steps = {"num_steps": 12, "warmup_steps": 2, "patience": 2, **intervals, **changes}
        config = TrainingConfig(batch_size=4, mixed_precision="no", **steps)

        def loss_fn(net: torch.nn.Module, batch: Mapping) -> tuple:
            calls.append(batch)
            if len(calls) == breaks_at:
                raise RuntimeError("power failure")
            return mse(net, batch)

        def evaluate(net: torch.nn.Module) -> dict[str, float]:
            return {"loss": losses[metrics(output_dir)[-1]["step"]]}

        accelerator, loader = make_accelerator(config, output_dir), ShuffledLoader(Images(), 4)
        fit(accelerator, model, loss_fn, loader, config, output_dir, evaluate=evaluate)
        return config

    x, parts = tmp_path / "x", tmp_path / "parts"
    config = run_fit(x)
    assert last_checkpoint(x).name == "step_00000008"
    assert best_validation(x)["step"] == 4
    assert is_finished(x, config)
    for breaks_at in (5, 4):  # after step 4, then after 3 + 3
        with pytest.raises(RuntimeError, match="power failure"):
            run_fit(parts, breaks_at=breaks_at)
    run_fit(parts)
    assert_same_run(x, parts)

    # Where the best weights are gone or damaged, a finished run does not say that it has them.
    damaged = shutil.copytree(x, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="the model is damaged"):
        run_fit(damaged)
    weights.unlink()
    with pytest.raises(UserError, match="the best weights of this run, is gone: restore it"):
        run_fit(damaged)

    # More steps alone change nothing, more patience goes on.
    run_fit(x, num_steps=20)
    assert last_checkpoint(x).name == "step_00000008"
    assert not is_finished(x, dataclasses.replace(config, patience=3))
    run_fit(x, patience=3)
    assert last_checkpoint(x).name == "step_00000012"
    assert best_validation(x)["step"] == 10
    assert (x / "curves.png").stat().st_size


def test_a_run_that_stops_early_tells_of_its_last_steps(tmp_path: Path) -> None:
    model, losses = small_model(), iter([3.0, 1.0, 2.0])
    intervals = {"validate_every": 2, "log_every": 5, "patience": 1, "num_steps": 20}
    config = TrainingConfig(batch_size=4, mixed_precision="no", warmup_steps=2, **intervals)
    accelerator, loader = make_accelerator(config, tmp_path), ShuffledLoader(Images(), 4)
    loss_fn = make_loss("mse", model.config.codebook_size_per_level)
    evaluate = lambda _: {"loss": next(losses)}  # noqa: E731
    fit(accelerator, model, loss_fn, loader, config, tmp_path, evaluate=evaluate)
    told = [line["step"] for line in metrics(tmp_path) if "learning_rate" in line]
    assert told == [5, 6]


# Nor does how a batch is computed.


def test_accumulation_and_workers_do_not_change_the_result(photos: Path, tmp_path: Path) -> None:
    """With a codebook that learns by gradient alone, as averages move between the parts of a batch;
    and without Muon, whose products in bf16 make rounding errors large."""
    settings = "--mixed-precision no --optimizer adamw --num-steps 12 --model.level-dropout 0"
    quantizer = "--model.quantizer.kind gradient --model.quantizer.revival-threshold 0"
    options = (settings, quantizer)
    others = ("--data.num-workers 1", "--deterministic")
    whole = train(photos, tmp_path / "whole", *options)
    assert_same_run(whole, train(photos, tmp_path / "workers", *options, *others))

    # The data-dependent start looks at the first part alone, so both begin from the same weights.
    begun = (*options, "--init-from", whole)
    one = train(photos, tmp_path / "one", *begun)
    four = train(photos, tmp_path / "four", *begun, "--gradient-accumulation-steps 4")
    weights = [load_file(last_checkpoint(run) / "model.safetensors") for run in (one, four)]
    for name, tensor in weights[0].items():
        if not name.endswith(("num_forwards", ".num_updates", ".counts")):
            torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=0)


def test_compiled_training_is_the_same_training(photos: Path, tmp_path: Path) -> None:
    """With a discriminator, whose weight goes back through the decoder several times."""
    options = ["--num-steps 4 --mixed-precision no --image.size 16 --log-every 1"]
    options.append("--discriminator.weight 0.8 --discriminator.num-layers 1")
    options.append("--discriminator.start-step 2")
    eager = metrics(train(photos, tmp_path / "eager", *options))
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):  # no C++
        compiled = metrics(train(photos, tmp_path / "compiled", *options, "--compile True"))
    for one, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


# Every setting does what it says.


def test_every_training_setting_changes_something(photos: Path, tmp_path: Path) -> None:
    """No flag is accepted and dropped, and no setting of a recipe either."""
    settings = ["--batch-size 8", "--learning-rate 1e-2", "--warmup-steps 5", "--weight-decay 0.5"]
    settings += ["--max-grad-norm 0.001", "--seed 1"]
    settings += ["--mixed-precision no" if native_bf16() else "--mixed-precision bf16"]
    settings += ["--reconstruction-loss l1", "--optimizer adamw"]
    base = trained_weights(train(photos, tmp_path / "base", "--num-steps 8"))
    for setting in settings:
        other = train(photos, tmp_path / setting, "--num-steps 8", setting)
        assert trained_weights(other) != base, setting

    # Noise, beside next to none: it is counted in a wrapper, whose weights have other names.
    noisy, quiet = (
        train(photos, tmp_path / share, "--num-steps 8", f"--code-noise {share}")
        for share in ("0.5", "1e-9")
    )
    assert trained_weights(noisy) != trained_weights(quiet)

    # Settings without a flag.
    model = load_recipe("tiny")["train"]["model"] | {"quantizer": {"beta": 2}}
    for name, value in {"adam_betas": [0.5, 0.5], "model": model}.items():
        sections = load_recipe("tiny")
        sections["train"][name] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        other = train(photos, tmp_path / name, "--num-steps 8", recipe=path)
        assert trained_weights(other) != base, name


def test_every_setting_of_a_prior_changes_something(run: Path, tmp_path: Path) -> None:
    settings = ["--label-dropout 0.5", "--token-corruption 0.5", "--no-class-conditional"]
    settings += ["--transformer.dropout 0.3", "--transformer.attention-rows 1"]
    settings += ["--transformer.num-condition-layers 0", "--family pixelsnail"]
    command(*prior_command(run, tmp_path / "base", "--num-steps 4"))
    for setting in settings:
        command(*prior_command(run, tmp_path / setting, "--num-steps 4", setting))
        assert trained_weights(tmp_path / setting) != trained_weights(tmp_path / "base"), setting


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    config = TrainingConfig(num_steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])
    cut, half = TrainingConfig(num_steps=50, warmup_steps=1000), TrainingConfig(num_steps=50)
    assert learning_rate(25, cut) > 0.9 * cut.learning_rate  # half of the run, not all of it
    assert half.validation_interval == 10
    for num_steps in (1, 5, 19):  # shorter than the warm-up
        short = TrainingConfig(num_steps=num_steps)
        assert all(0 < learning_rate(step, short) <= 1e-3 for step in range(1, num_steps + 1))


def test_the_average_moves_parameters_and_copies_buffers() -> None:
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    update_average(average, model, step=1000, decay=0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [7.0, 7.0]


def test_the_best_weights_are_kept(photos: Path, tmp_path: Path) -> None:
    """With a learning rate that ruins the model after a good start, the folder holds the start."""
    ruin = "--learning-rate 0.5 --warmup-steps 30 --weight-ema-decay 0 --patience 3"
    enough = "--image.validation-fraction 0.2"
    x = train(photos, tmp_path / "x", ruin, enough)
    held_out = [line["validation/mse"] for line in metrics(x) if "validation/mse" in line]
    assert min(held_out) == held_out[-4] < held_out[-1]  # it was stopped early
    still = "--num-steps 1 --learning-rate 1e-12 --model.quantizer.decay 0.99999"
    options = ("--weight-ema-decay 0", still, enough)
    again = train(photos, tmp_path / "again", "--init-from", x, *options)
    assert metrics(again)[-1]["validation/mse"] == pytest.approx(min(held_out), rel=0.02)


def test_the_decoder_alone_is_fine_tuned_and_old_priors_remain_valid(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all that could move more; the settings of the model are those of its folder."""
    x, options = tmp_path / "x", "--finetune decoder --num-steps 6 --code-noise 0.5 --log-every 1"
    moving = "--weight-decay 0.5 --discriminator.weight 0.8 --discriminator.num-layers 1"
    start = ["--init-from", run / "vqvae", "--data.path", photos, "--output-dir", x]
    command("train", *start, *words((options, moving)))
    old, new = (load_file(folder / "model.safetensors") for folder in (run / "vqvae", x))
    last = load_file(last_checkpoint(x) / "model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        is_still = torch.equal(new[name], tensor)
        assert is_still == torch.equal(last[f"autoencoder.autoencoder.{name}"], tensor)
        assert is_still != name.startswith("image_decoder."), name
    next_step = capsys.readouterr().out.splitlines()[-1].split()
    assert next_step[:4] == ["vqvae2", "assemble", "--vqvae", str(x)]
    command(*next_step[1:])

    # It can be prolonged without the model that it began with.
    begun = shutil.copytree(run / "vqvae", tmp_path / "begun")
    gone = ["--init-from", begun, *start[2:5], tmp_path / "y"]
    command("train", *gone, *words((options,)))
    shutil.rmtree(begun)
    command("train", *gone, *words((options, "--num-steps 8")))
    assert metrics(tmp_path / "y")[-1]["step"] == 8

    # Another model, or none. (How deep a discriminator may be, --init-from's size says.)
    large = TrainVQVAEConfig(
        data=DataConfig(path="photos"),
        output_dir="x",
        finetune="decoder",
        init_from="y",
        discriminator=DiscriminatorConfig(weight=0.8, num_layers=5),
    )
    with pytest.raises(UserError, match="5 halvings of 16 pixels"):
        replace(large, model=VQVAE2.from_pretrained(run / "vqvae").config)
    command("train", *start, *words((options, moving, "--model.hidden-channels 64")), code=2)
    assert "leave out --model" in capsys.readouterr().err
    command("train", *start[2:], *words((options,)), code=2)
    assert "finetune is 'decoder', but must be used with --init-from" in capsys.readouterr().err


def test_too_few_images_are_said_and_do_not_choose_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_images(tmp_path / "photos", 20)
    x = train(few, tmp_path / "x", "--num-steps 2 --image.validation-fraction 0.3")
    said = capsys.readouterr()
    assert re.search("only [0-9]+ training images for 32 codes", said.err)
    assert "the last ones are kept" in said.err
    assert "more images would be held out with --data.validation-path" in said.err
    assert [
        line for line in metrics(x) if "validation/mse" in line and "validation/loss" not in line
    ]


def test_a_tracker_is_written_to(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    x = train(photos, tmp_path / "x", "--num-steps 6 --tracker tensorboard")
    assert list(x.rglob("events.out.tfevents*"))


# What goes wrong is said, and spoils nothing.


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = "--learning-rate 1000 --max-grad-norm 0 --warmup-steps 0"
    often = "--log-every 50 --checkpoint-every 2 --validate-every 3"
    command(*train_command(photos, tmp_path / "x", wild, often), code=2)
    assert "the loss is" in capsys.readouterr().err.splitlines()[-1]
    for weights in (tmp_path / "x").rglob("model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(weights).values()), weights


def test_a_run_on_other_images_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, other = train(photos, tmp_path / "x", "--num-steps 4"), write_images(tmp_path / "other", 40)
    capsys.readouterr()
    next(other.rglob("*.png")).write_bytes(b"")  # which is not looked at before
    command(*train_command(other, x, "--num-steps 8"), code=2)
    assert "image_names_hash" in capsys.readouterr().err
    command(*train_command(other, other / "run", "--num-steps 4"), code=2)
    assert "own pictures" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    command(*train_command(photos, tmp_path / "y", "--tracker trackio"), code=2)
    assert "'trackio' is not installed" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_a_collapse_is_warned_about_while_it_happens(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantizer = "--model.quantizer.no-start-from-data --model.quantizer.revival-threshold 0"
    settings = "--num-steps 240 --log-every 40 --model.codebook-sizes 256"
    train(photos, tmp_path / "x", settings, quantizer)
    lines = "".join(capsys.readouterr()).splitlines()
    warnings = [line for line in lines if "warning: " in line and "top:" in line]
    assert warnings
    assert "model.quantizer.revival_threshold" in warnings[0]


def test_a_stream_s_broken_images_are_listed_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=2, rows=20)
    with tarfile.open(tars / "002.tar", "w") as archive:  # thirty empty files
        for i in range(30):
            archive.addfile(tarfile.TarInfo(f"{i}.png"))
    broken = {f"002/{i}" for i in range(30)}
    assert any(is_held_out(name, 0.2) for name in broken)

    command(*stream_command(tars, tmp_path / "x", "--num-steps 12"))
    text = (tmp_path / "x" / "skipped.jsonl").read_text()
    assert sorted(json.loads(line)["image"] for line in text.splitlines()) == sorted(broken)
    assert "0x" not in text  # an address would list each image again when the run continues

    none_held_out = "--num-steps 12 --image.validation-fraction 0"
    command(*stream_command(tars, tmp_path / "y", none_held_out))
    assert "30 images could not be read and were skipped" in "".join(capsys.readouterr())


# What a finished run says.


def test_a_model_that_is_not_there_yet_or_not_finished_is_told(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqvae, extract = tmp_path / "vqvae", ("extract", "--data.path", photos)
    shutil.copytree(run / "vqvae", vqvae)
    record = vqvae / "train_config.yaml"
    record.write_text(record.read_text().replace("num_steps: 12", "num_steps: 1200"))
    command(*extract, "--vqvae", vqvae, "--output-dir", tmp_path / "codes")
    assert "its training is not finished (step 12 of 1,200)" in capsys.readouterr().err
    (vqvae / "model.safetensors").unlink()
    command(*extract, "--vqvae", vqvae, "--output-dir", tmp_path / "none", code=2)
    assert "holds a training run that has no model yet" in capsys.readouterr().err


def test_curves_are_drawn_without_held_out_figures(tmp_path: Path) -> None:
    line = {"step": 5, "images": 20, "loss": 0.5, "reconstruction": 0.4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    save_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size >= PANEL


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([], "all 400 steps are done; the last weights are kept"),
        ([3.0, 2.0, 1.0, 0.9], "step 400 are kept: held-out loss 0.9; it was still falling"),
        ([3.0, 2.0, 2.5, 2.9], r"step 200 are kept: .* over-fitted \(2.9 at the end\)"),
        (
            [3.0, 2.0, 2.0, 1.999],
            "step 400 are kept: held-out loss 1.999; at the end it hardly fell",
        ),
        ([3.0, 2.5, 2.0, 1.5, 1.51], "^stopped early at step 300, .*; at the end it hardly fell"),
        ([3.0], "step 400 are kept: held-out loss 3; with a smaller validate_every"),
        (
            [2.0, 2.1, 2.2],
            "^stopped early at step 300, .* not fallen for 2 .* step 100 are kept: .* over",
        ),
    ],
)
def test_the_end_of_a_run_says_what_is_kept_and_what_would_help(
    losses: list[float], said: str, tmp_path: Path
) -> None:
    first = {1: 4, 5: -1}.get(len(losses), 1)
    lines = [{"step": 100 * i, "validation/loss": loss} for i, loss in enumerate(losses, first)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert re.search(said, conclusion(tmp_path, TrainingConfig(num_steps=400, patience=2)))


@pytest.mark.parametrize(
    "bits", [{}, {"validation/bits_per_code": 4.5, "validation/unigram_bits": 4}]
)
def test_more_steps_are_advised_where_little_was_learned(
    bits: dict[str, float], tmp_path: Path
) -> None:
    """The loss of a short run flattens, too, as the learning rate falls to 0."""
    number = 400 if bits else 4
    lines = [{"step": number // 4 * i, "validation/loss": 3.0, **bits} for i in (1, 2, 3, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    said = conclusion(tmp_path, TrainingConfig(num_steps=number))
    assert said.endswith("it has hardly begun to learn: a larger num_steps would help")


def test_a_prior_that_knows_nothing_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_noise(tmp_path, 5.0, 8.0)
    assert not caplog.records
    warn_of_noise(tmp_path, 8.311, 8.207)
    assert "costs 8.311 bits, by frequency alone 8.207" in caplog.text


def test_first_weights_of_other_settings_are_refused_with_these_settings(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--config", "tiny", "--data.path", photos, "--output-dir", tmp_path / "x")
    command(*train, "--init-from", run / "vqvae", "--model.hidden-channels", 24, code=2)
    sentence = capsys.readouterr().err
    assert "has shape" in sentence
    assert ", here 24: repeat its settings." in sentence
    command(*train, "--init-from", run / "prior_0", code=2)
    assert "It is a TransformerPrior, and here a VQVAE2 is trained." in capsys.readouterr().err
    command(*train, "--init-from", tmp_path, code=2)
    assert "repeat its settings" not in capsys.readouterr().err
