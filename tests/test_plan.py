"""`vqvae2 plan` against the truth: real models, and what a real step saves."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipelines.cli import COMMANDS, load_recipe, main, recipe_names, recipe_section
from pipelines.config import PlanConfig
from pipelines.plan.command import Estimate, estimate_stage, find_device, stages_of, time_step
from pipelines.plan.memory import Stage, saved_for_backward, trace
from prior.config import TrainPriorConfig
from tests.conftest import ROOT
from vqvae2.common.config import from_dict
from vqvae2.config import TrainVQVAEConfig

CPU = torch.device("cpu")


def sections(name: str) -> tuple[TrainVQVAEConfig, list[TrainPriorConfig]]:
    """A recipe as the trainings read it."""
    recipe = load_recipe(name)
    given = {"data": {"path": "photos"}, "output_dir": "out"}
    train = from_dict(TrainVQVAEConfig, {**recipe_section(recipe, "train"), **given}, name)
    levels = ["top", *map(str, range(1, train.model.num_levels - 1)), "bottom"]
    priors = [
        from_dict(
            TrainPriorConfig,
            {
                **recipe_section(recipe, "train-prior", level),
                "codes": "codes",
                "level": level,
                "output_dir": "out",
            },
            name,
        )
        for level in levels
    ]
    return train, priors


def estimates(name: str, **settings: object) -> list[Estimate]:
    config = PlanConfig(recipe=name, **settings)  # type: ignore[arg-type]
    return [estimate_stage(stage, find_device(config)) for stage in stages_of(config)]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_can_be_planned(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train, priors = sections(name)
    assert set(load_recipe(name)) == {
        "train",
        *(f"prior_{level}" for level in range(train.model.num_levels)),
        "sample",
    }
    assert from_dict(
        COMMANDS["sample"][0],
        {**recipe_section(load_recipe(name), "sample"), "output_dir": "out"},
        name,
    )
    heading = (
        (Path(ROOT) / "pipelines" / "recipes" / f"{name}.yaml")
        .read_text()
        .split("train:")[0]
        .lower()
    )
    assert all(f"{h} x {w}" in heading for h, w in train.model.grids)
    assert main(["plan", name]) == 0
    said = capsys.readouterr().out
    assert said.count("parameters") == said.count("time        at least") == 1 + len(priors)


def test_the_recipes_have_the_grids_and_sizes_they_promise() -> None:
    grids = {
        name: sections(name)[0].model.grids
        for name in ("emoji64", "cifar10", "ffhq256", "imagenet256_paper", "ffhq1024_paper")
    }
    assert grids["emoji64"] == grids["cifar10"] == ((8, 8), (16, 16))
    assert grids["ffhq256"] == grids["imagenet256_paper"] == ((32, 32), (64, 64))
    assert grids["ffhq1024_paper"] == ((32, 32), (64, 64), (128, 128))
    for estimate in estimates("ffhq256", device="cuda", memory_gibibytes=24)[1:]:
        assert 80e6 < estimate.per_row.num_parameters < 90e6
        assert estimate.fits(estimate.rows)
    for name in ("imagenet256_paper", "ffhq1024_paper"):
        assert all(prior.family == "pixelsnail" for prior in sections(name)[1])


def test_the_paper_is_planned_in_seconds_without_its_memory() -> None:
    program = "import resource, torch, pipelines.plan.command; from pipelines.cli import main; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; \
        assert main(['plan', 'imagenet256_paper', '--num-classes', '1000']) == 0; print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert int(said.split("grew")[-1]) < 500 * 1024  # KiB
    assert after.ru_utime - before.ru_utime < 60


def real_step(stage: Stage, rows: int, precision: str = "no") -> tuple[torch.nn.Module, int]:
    """The model, and the bytes that a real step saves."""
    torch.manual_seed(0)
    model = stage.make_model().train()
    with (
        saved_for_backward(model) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"),
    ):
        loss, _ = stage.make_loss(model)(model, stage.batch(rows, CPU))
    loss.backward()
    return model, sum(saved.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_tiny_is_what_the_plan_says(number: int, precision: str) -> None:
    stage = stages_of(PlanConfig(recipe="tiny", num_classes=3))[number]
    estimate = estimate_stage(stage, find_device(PlanConfig(recipe="tiny")))
    planned = trace(stage, 16, precision)
    model, saved = real_step(stage, 16, precision)
    assert (
        planned.num_parameters
        == estimate.per_row.num_parameters
        == sum(p.numel() for p in model.parameters())
    )
    assert planned.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert planned.activations == pytest.approx(saved, rel=0.2)
    assert all(p.grad is not None for p in model.parameters())


def test_rows_cost_what_they_cost() -> None:
    """Two traces of few rows say what a trace of many would."""
    device = find_device(PlanConfig(recipe="tiny"))
    for stage in stages_of(PlanConfig(recipe="tiny")):
        estimate = estimate_stage(stage, device)
        whole = trace(stage, 16, device.precision(stage.config))
        assert estimate.memory["activations"] == pytest.approx(whole.activations, rel=0.01)
        assert estimate.flops_per_step == pytest.approx(whole.flops, rel=0.01)
        amounts = [sum(estimate.memory_with(rows).values()) for rows in (1, 2, 8, 64)]
        assert amounts == sorted(set(amounts))


def test_flops_of_a_transformer() -> None:
    """Six per weight and position (two forward, four backward), and the attention, which the long grid computes in a fused kernel."""
    stage = stages_of(PlanConfig(recipe="ffhq256"))[1]
    model_width, layers, positions = 768, 12, 32 * 32
    weights = layers * 12 * model_width**2 + model_width * 512
    attention = (
        layers * positions * positions * model_width * 2 * 2
    )  # q k^T and the sum of values, multiply and add
    flops = trace(stage, 1, "no").flops
    assert flops == pytest.approx(
        6 * weights * positions + 3.5 * attention, rel=0.02
    )  # the fused backward computes q k^T again


def recipe_file(folder: Path, **changes: object) -> str:
    recipe = load_recipe("tiny")
    for name, value in changes.items():
        recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "mine.yaml")


def test_what_to_change_when_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(tmp_path, train={"batch_size": 4096})
    (bad, *_) = estimates(recipe, memory_gibibytes=0.02)
    assert not bad.fits(4096)
    assert main(["plan", recipe, "--memory-gibibytes", "0.02"]) == 0
    said = capsys.readouterr().out
    parts = int(said.split("--gradient-accumulation-steps ")[1].split()[0])
    assert (
        main(
            [
                "plan",
                recipe_file(
                    tmp_path, train={"batch_size": 4096, "gradient_accumulation_steps": parts}
                ),
                "--memory-gibibytes",
                "0.02",
            ]
        )
        == 0
    )
    assert "DOES NOT FIT" not in capsys.readouterr().out.split("prior_0")[0]
    assert main(["plan", recipe, "--memory-gibibytes", "0.0001"]) == 0
    assert "even a single image" in capsys.readouterr().out


def test_other_quantizers_and_a_discriminator_are_planned(tmp_path: Path) -> None:
    plain = estimates("tiny")[0]
    for kind in ("gradient", "cosine", "fsq"):
        recipe = recipe_file(
            tmp_path,
            train={"model": {**load_recipe("tiny")["train"]["model"], "quantizer": {"kind": kind}}},
        )
        assert estimates(recipe)[0].per_row.flops > 0
    pair = estimates(
        recipe_file(tmp_path, train={"discriminator": {"weight": 0.8, "num_layers": 1}})
    )[0]
    assert pair.per_row.activations > plain.per_row.activations
    assert pair.per_row.num_parameters > plain.per_row.num_parameters


def test_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "tiny",
                "--images-per-second",
                "100",
                "50",
                "10",
                "--num-images",
                "36000",
                "--device",
                "cuda",
                "--memory-gibibytes",
                "1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    for hours in ("6.0 min", "12.0 min", "1.0 h"):
        assert f"{hours} for an epoch of 36,000 images" in said
    stage = stages_of(PlanConfig(recipe="tiny"))[0]
    started = time.perf_counter()
    assert 0 < sum(time_step(stage, 4, CPU, "no")) < time.perf_counter() - started
    assert main(["plan", "tiny", "--measure"]) == 0
    assert capsys.readouterr().out.count("a real step timed here") == 3


def test_nothing_unreal_is_left_behind() -> None:
    """The masks that attention caches: a real step after a plan, and a plan after a real step."""
    stage = stages_of(PlanConfig(recipe="tiny"))[2]
    for _ in range(2):
        trace(stage, 2, "no")
        real_step(stage, 2)


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], list[str]]] = [
        (["tinny"], ["no recipe 'tinny'", "ffhq256"]),
        ([], ["must be given"]),
        (["tiny", "--num-images", "0"], ["num_images is 0", "at least 1"]),
        (["tiny", "--num-devices", "3"], ["batch_size is 16", "3 devices"]),
        (["tiny", "--images-per-second", "1", "2"], ["images_per_second", "3 trainings"]),
        (["tiny", "--memmory-gibibytes", "2"], ["--memory-gibibytes"]),
        ([recipe_file(tmp_path, train={"batch_sise": 3})], ["batch_sise", "batch_size"]),
    ]
    if not torch.cuda.is_available():
        cases += [(["tiny", "--device", "cuda"], ["--memory-gibibytes"])]
        cases += [
            (["tiny", "--device", "cuda", "--memory-gibibytes", "8", "--measure"], ["measure"])
        ]
    for arguments, words in cases:
        if any("mine.yaml" in argument for argument in arguments):
            recipe_file(tmp_path, train={"batch_sise": 3})
        assert main(["plan", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for word in words:
            assert word in said, (arguments, said)
    assert main(["plan", recipe_file(tmp_path, prior_7={"batch_size": 3})]) == 2
    assert "prior_7" in capsys.readouterr().err
