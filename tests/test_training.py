"""The training loop: what it computes is a function of its configuration, whatever interrupts it or splits it up."""

import importlib.util
import json
import math
import random
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import command, kill_when, vqvae2, write_images
from tests.conftest import command as run_here
from tests.test_sources import numbered_tars
from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.config import TrainingConfig
from vqvae2.common.accelerate import native_bf16
from vqvae2.common.fit import fit, learning_rate, update_average
from vqvae2.common.loading import StreamLoader
from vqvae2.data import is_held_out
from vqvae2.losses import make_loss

STEPS = 60
TIMES = {"images_per_second", "data_wait_share"}


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the model, the training state, the figures."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)
    last = sorted((one / "checkpoints").iterdir())[-1].name
    assert (one / "checkpoints" / last / "model.safetensors").read_bytes() == (
        other / "checkpoints" / last / "model.safetensors"
    ).read_bytes()
    states = [
        torch.load(run / "checkpoints" / last / "optimizer.bin", weights_only=True)["state"]
        for run in (one, other)
    ]
    assert all(
        torch.equal(a[k], b[k])
        for a, b in zip(*(s.values() for s in states), strict=True)
        for k in a
    )


def train_command(photos: Path, output_dir: Path, *more: object) -> list[object]:
    return [
        "train",
        "--config",
        "tiny",
        "--data.path",
        photos,
        "--output-dir",
        output_dir,
        "--num-steps",
        STEPS,
        *more,
    ]


def prior_command(run: Path, output_dir: Path, *more: object) -> list[object]:
    return [
        "train-prior",
        "--config",
        "tiny",
        "--codes",
        run / "codes",
        "--level",
        "bottom",
        "--output-dir",
        output_dir,
        "--num-steps",
        STEPS,
        *more,
    ]


def line_count(run: Path) -> int:
    return (
        (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    )


def stream_command(tars: Path, output_dir: Path) -> list[object]:
    flags = ["--data.on-error", "skip", "--model.image.validation-fraction", "0.2"]
    return train_command(tars, output_dir, "--data.streaming", *flags)


@pytest.mark.parametrize("stage", ["stage 1", "stream", "prior"])
def test_killed_and_continued_is_uninterrupted(
    stage: str, photos: Path, run: Path, tmp_path: Path
) -> None:
    command = {"stage 1": train_command, "stream": stream_command, "prior": prior_command}[stage]
    source = {"stage 1": photos, "stream": tmp_path / "tars", "prior": run}[stage]
    if stage == "stream":
        numbered_tars(source, shards=4, rows=20)
    run_here(*command(source, tmp_path / "whole"))
    killed = tmp_path / "killed"
    for _ in range(2):  # at two random steps
        until = random.randint(1, 18)
        code = kill_when(lambda until=until: line_count(killed) >= until, *command(source, killed))
        assert code in (-signal.SIGKILL, 0)
    vqvae2(*command(source, killed))
    assert_same_run(tmp_path / "whole", killed)


def test_a_stream_s_broken_images_are_listed_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=2, rows=20)
    names = [f"{i}.png" for i in range(30)]
    with tarfile.open(tars / "002.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    run_here(*stream_command(tars, tmp_path / "x"))
    broken = {f"002/{i}" for i in range(30)}
    assert any(is_held_out(name, 0.2) for name in broken)
    run_here(*stream_command(tars, tmp_path / "none_held_out")[:-1], 0)
    listed = [
        json.loads(line)["image"]
        for line in (tmp_path / "x" / "skipped.jsonl").read_text().splitlines()
    ]
    assert sorted(listed) == sorted(broken)
    assert (
        "0x" not in (tmp_path / "x" / "skipped.jsonl").read_text()
    )  # an address would list each image again when the run continues
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("30 images could not be read and were skipped")
    )


def test_a_clean_stop_saves_and_continues(photos: Path, tmp_path: Path) -> None:
    run_here(*train_command(photos, tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    code = kill_when(
        lambda: line_count(stopped) >= 3, *train_command(photos, stopped), number=signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM
    assert not (stopped / "checkpoints" / f"step_{STEPS:08d}").exists()
    vqvae2(*train_command(photos, stopped))
    assert_same_run(tmp_path / "whole", stopped)


def test_a_finished_run_is_left_alone_and_can_be_prolonged(photos: Path, tmp_path: Path) -> None:
    run_here(*train_command(photos, tmp_path / "x"))
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    assert "done already" in vqvae2(*train_command(photos, tmp_path / "x")).stdout
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    run_here(*train_command(photos, tmp_path / "x", "--num-steps", STEPS + 4))
    assert metrics(tmp_path / "x")[-1]["step"] == STEPS + 4
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir()) == [
        f"step_{STEPS:08d}",
        f"step_{STEPS + 4:08d}",
    ]


def test_the_best_weights_are_kept(photos: Path, tmp_path: Path) -> None:
    """With a learning rate that ruins the model after a good start, the folder holds the good start."""
    run_here(
        *train_command(
            photos,
            tmp_path / "x",
            "--learning-rate",
            "0.5",
            "--warmup-steps",
            "50",
            "--weight-ema-decay",
            "0",
        )
    )
    validations = [
        line["validation/mse"] for line in metrics(tmp_path / "x") if "validation/mse" in line
    ]
    best = min(validations)
    assert best < validations[-1]
    out = vqvae2("train", "--config", "tiny", "--data.path", photos, "--output-dir", tmp_path / "again", "--init-from", tmp_path / "x",
                 "--num-steps", 1, "--learning-rate", "1e-12", "--weight-ema-decay", "0", "--model.quantizer.decay", "0.99999")  # fmt: skip
    assert "held out" in out.stdout
    assert metrics(tmp_path / "again")[-1]["validation/mse"] == pytest.approx(best, rel=0.02)


def test_accumulation_and_workers_do_not_change_the_result(photos: Path, tmp_path: Path) -> None:
    """With a codebook that learns by gradient alone; running averages move between the parts of a batch."""
    options = ("--mixed-precision", "no", "--model.quantizer.kind", "gradient", "--model.quantizer.revival-threshold", 0, "--num-steps", 12,
               "--model.level-dropout", 0)  # fmt: skip
    run_here(*train_command(photos, tmp_path / "whole", *options))
    run_here(*train_command(photos, tmp_path / "workers", *options, "--data.num-workers", 1))
    assert_same_run(tmp_path / "whole", tmp_path / "workers")
    # The data-dependent start looks at the first part alone, so both begin from the same weights.
    for name, parts in (("one", 1), ("four", 4)):
        run_here(
            *train_command(
                photos,
                tmp_path / name,
                *options,
                "--init-from",
                tmp_path / "whole",
                "--gradient-accumulation-steps",
                parts,
            )
        )
    one, four = (
        load_file(tmp_path / name / "checkpoints" / "step_00000012" / "model.safetensors")
        for name in ("one", "four")
    )
    for key in [
        key for key in one if not key.endswith(("num_forwards", ".num_updates", ".counts"))
    ]:
        torch.testing.assert_close(one[key], four[key], atol=1e-4, rtol=0)


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = TrainingConfig(num_steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])
    for num_steps in (1, 5, 19):  # short runs
        rates = [
            learning_rate(s, TrainingConfig(num_steps=num_steps)) for s in range(1, num_steps + 1)
        ]
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
    command(*train_command(photos, tmp_path / "base", "--num-steps", 8))
    base = (tmp_path / "base" / "checkpoints" / "step_00000008" / "model.safetensors").read_bytes()
    for i, option in enumerate(
        (["--batch-size", 8], ["--learning-rate", "1e-2"], ["--warmup-steps", 5], ["--weight-decay", "0.5"], ["--adam-betas", "0.5", "0.5"],
         ["--max-grad-norm", "0.001"], ["--mixed-precision", "no" if native_bf16() else "bf16"], ["--seed", 1], ["--reconstruction-loss", "l1"], ["--model.quantizer.beta", "2"])
    ):  # fmt: skip
        command(*train_command(photos, tmp_path / str(i), "--num-steps", 8, *option))
        assert (
            tmp_path / str(i) / "checkpoints" / "step_00000008" / "model.safetensors"
        ).read_bytes() != base, option


def test_every_setting_of_a_prior_changes_something(run: Path, tmp_path: Path) -> None:
    command(*prior_command(run, tmp_path / "base", "--num-steps", 4))
    weights = "checkpoints/step_00000004/model.safetensors"
    for i, option in enumerate(
        (["--label-dropout", "0.5"], ["--token-corruption", "0.5"], ["--no-class-conditional"], ["--transformer.dropout", "0.3"],
         ["--transformer.attention-rows", 1], ["--transformer.num-condition-layers", 0], ["--family", "pixelsnail"])
    ):  # fmt: skip
        command(*prior_command(run, tmp_path / str(i), "--num-steps", 4, *option))
        assert (tmp_path / str(i) / weights).read_bytes() != (
            tmp_path / "base" / weights
        ).read_bytes(), option


@pytest.mark.parametrize(
    "adversary",
    [
        (),
        (
            "--discriminator.weight",
            0.8,
            "--discriminator.num-layers",
            1,
            "--discriminator.start-step",
            2,
        ),
    ],
)
def test_compiled_training_is_the_same_training(
    adversary: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    options = (
        "--num-steps",
        4,
        "--mixed-precision",
        "no",
        "--model.image.size",
        16,
        "--log-every",
        1,
        *adversary,
    )
    run_here(*train_command(photos, tmp_path / "eager", *options))
    run_here(*train_command(photos, tmp_path / "compiled", *options, "--compile"))
    for eager, compiled in zip(
        metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True
    ):
        assert compiled == pytest.approx(eager, rel=1e-3)


def test_tensorboard(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    vqvae2(*train_command(photos, tmp_path / "x", "--num-steps", 6, "--tracker", "tensorboard"))
    assert list((tmp_path / "x").rglob("events.out.tfevents*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(
    photos: Path, tmp_path: Path
) -> None:
    options = (
        "--learning-rate",
        "1e30",
        "--max-grad-norm",
        0,
        "--warmup-steps",
        0,
        "--log-every",
        50,
        "--checkpoint-every",
        2,
        "--validate-every",
        3,
    )
    refused = vqvae2(*train_command(photos, tmp_path / "x", *options), check=False)
    assert refused.returncode == 2
    assert "the loss is" in refused.stderr.splitlines()[-1]
    for weights in (tmp_path / "x").rglob("model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(weights).values()), weights


def test_other_images_or_a_missing_tracker_are_refused(photos: Path, tmp_path: Path) -> None:
    run_here(*train_command(photos, tmp_path / "x", "--num-steps", 4))
    other = write_images(tmp_path / "other", 40)
    refused = vqvae2(*train_command(other, tmp_path / "x", "--num-steps", 8), check=False)
    assert (refused.returncode, "image_names_hash" in refused.stderr) == (2, True)
    inside = vqvae2(*train_command(other, other / "run", "--num-steps", 4), check=False)
    assert (inside.returncode, "own pictures" in inside.stderr) == (2, True)
    if importlib.util.find_spec("trackio") is None:
        untracked = vqvae2(
            *train_command(photos, tmp_path / "y", "--tracker", "trackio"), check=False
        )
        assert (untracked.returncode, "'trackio' is not installed" in untracked.stderr) == (2, True)
        assert not (tmp_path / "y").exists()


def test_a_moved_run_continues(photos: Path, tmp_path: Path) -> None:
    run_here(*train_command(photos, tmp_path / "whole"))
    run_here(*train_command(photos, tmp_path / "here", "--num-steps", 8))
    (tmp_path / "here").rename(tmp_path / "there")
    run_here(
        *train_command(
            shutil.copytree(photos, tmp_path / "moved"), tmp_path / "there", "--num-steps", STEPS
        )
    )
    assert (
        metrics(tmp_path / "there")[-1]["step"] == metrics(tmp_path / "whole")[-1]["step"] == STEPS
    )


def test_a_collapse_is_warned_about_while_it_happens(photos: Path, tmp_path: Path) -> None:
    said = vqvae2(*train_command(photos, tmp_path / "x", "--num-steps", 240, "--log-every", 40, "--model.quantizer.no-start-from-data",
                                 "--model.quantizer.revival-threshold", 0, "--model.codebook-sizes", 256)).stderr  # fmt: skip
    warnings = [line for line in said.splitlines() if "warning: top:" in line]
    assert warnings
    assert "model.quantizer.revival_threshold" in warnings[0]


def test_fit_on_a_stream_continues_exactly(tmp_path: Path) -> None:
    """From Python: an iterable of rows, the library's own classes, and a run that breaks off between two checkpoints."""

    def run_fit(output_dir: Path, *, breaks_at: int | None = None) -> dict:
        torch.manual_seed(0)
        image = PreprocessingConfig(size=(16,), channels=1)
        model = VQVAE2(
            VQVAE2Config(
                image=image,
                codebook_sizes=(16,),
                code_dims=(8,),
                hidden_channels=16,
                residual_channels=8,
                num_residual_blocks=1,
            )
        )
        config = TrainingConfig(
            num_steps=9, batch_size=4, warmup_steps=2, checkpoint_every=3, mixed_precision="no"
        )
        rows = [
            {"images": image}
            for image in torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2
            - 1
        ]
        make = make_loss("mse", model.config.codebook_size_per_level)
        calls = []

        def loss_fn(net: torch.nn.Module, batch: dict) -> tuple:
            calls.append(batch)
            if len(calls) == breaks_at:
                raise RuntimeError("the power went")
            return make(net, batch)

        fit(
            make_accelerator(config, output_dir),
            model,
            loss_fn,
            StreamLoader(rows, 4),
            config,
            output_dir,
        )
        return load_file(output_dir / "checkpoints" / "step_00000009" / "model.safetensors")

    whole = run_fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power went"):
        run_fit(tmp_path / "parts", breaks_at=8)
    parts = run_fit(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
