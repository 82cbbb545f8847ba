"""`vqvae2 plan` against the truth: real models, and what the allocator gives to a real step."""

import contextlib
import io
import resource
import tarfile
import time
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.cli import COMMANDS, load_recipe, main, recipe_names, recipe_section
from pipelines.config import PlanConfig
from pipelines.plan.command import advise, in_words, verdict
from pipelines.plan.stages import Stage, stages_of, trace, trainings_of
from prior import attention
from prior.config import TrainPriorConfig
from tests.conftest import ROOT
from vqvae2.common.config import from_dict
from vqvae2.common.muon import layer_weights
from vqvae2.config import TrainVQVAEConfig
from vqvae2.model import VQVAE2


def plan(*words: object) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["plan", *map(str, words)]) == 0
    return output.getvalue()


def stages(recipe: str) -> list[Stage]:
    return stages_of(PlanConfig(recipe=recipe, planned=None, num_classes=3))


@cache
def tiny_stages() -> list[Stage]:
    return stages("tiny")


@cache
def traced(stage: int, rows: int, precision: str) -> tuple[int, int, dict[str, float]]:
    """The trace of a stage of the recipe tiny."""
    return trace(tiny_stages()[stage], rows, precision)


GPU = ("--device", "cuda", "--memory-gibibytes", "24")


@cache
def sections(name: str) -> tuple[TrainVQVAEConfig, list[TrainPriorConfig]]:
    """A recipe as the trainings read it."""
    recipe, places = load_recipe(name), {"output_dir": "out"}
    section = recipe_section(recipe, "train") | places | {"data": {"path": "photos"}}
    train = from_dict(TrainVQVAEConfig, section, name)
    priors = []
    for level in ("top", *map(str, range(1, train.model.num_levels - 1)), "bottom"):
        section = recipe_section(recipe, "train-prior", level) | places
        section |= {"codes": "codes", "level": level}
        priors.append(from_dict(TrainPriorConfig, section, name))
    return train, priors


def recipe_file(folder: Path, **changes: dict[str, Any]) -> str:
    """The recipe tiny with some settings changed, as a file."""
    recipe = load_recipe("tiny")
    for name, settings in changes.items():
        recipe[name] = {**recipe.get(name, {}), **settings}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


# The shipped recipes.


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_its_heading_names_its_grids(name: str) -> None:
    train, _ = sections(name)
    recipe = load_recipe(name)
    priors = {f"prior_{level}" for level in range(train.model.num_levels)}
    assert set(recipe) - {"extract"} == {"train", "sample", *priors}
    section = recipe_section(recipe, "sample") | {"output_dir": "out"}
    assert from_dict(COMMANDS["sample"][0], section, name)
    text = (Path(ROOT) / "pipelines" / "recipes" / f"{name}.yaml").read_text()
    heading = text.split("train:")[0].lower()
    assert all(f"{h} x {w}" in heading for h, w in train.model.grids)


@pytest.mark.parametrize("name", ["ffhq256"])
def test_a_recipe_is_planned_in_seconds_without_its_memory(name: str) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    text = plan("--config", name, *GPU)
    assert time.process_time() - started < 60
    assert "can be said on such a device alone" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500 * 1024  # KiB
    lines = [line for line in text.splitlines() if line.endswith("parameters")]
    names = [line.split(":")[0] for line in lines]
    assert names == ["train", *(f"prior_{i}" for i in range(len(names) - 1))]
    assert text.count("TFLOP per step") == len(names) == 1 + len(sections(name)[1])

    # The autoencoder's parameters are those of the model, made without memory in another way.
    with torch.device("meta"):
        model = VQVAE2(sections(name)[0].model)
    assert lines[0] == f"train: {sum(p.numel() for p in model.parameters()):,} parameters"

    # Its priors of 85 M parameters are said to fit a GPU of 24 GB; the paper's do not.
    if name == "ffhq256":
        assert text.count("GiB: fits") == 3
        assert all(80e6 < int(line.split()[1].replace(",", "")) < 90e6 for line in lines[1:])
    else:
        assert text.count("DOES NOT FIT: use --gradient-accumulation-steps") >= len(lines) - 1


def test_group_norm_of_a_gpu_is_planned_in_fp32() -> None:
    """That is what CUDA's autocast computes it in, and what it keeps."""
    model = {"network": "resnet", "hidden_channels": 16, "image": {"size": [32]}}
    (stage, *_) = trainings_of({"train": {"model": model, "data": {"path": "photos"}}}, "recipe")

    def activations(precision: str, kind: str) -> float:
        return trace(stage, 4, precision, kind)[2]["activations"]

    assert activations("bf16", "cuda") > 1.3 * activations("bf16", "cpu")
    assert activations("no", "cuda") == activations("no", "cpu")


def test_recipes_have_the_grids_and_sizes_that_they_promise() -> None:
    names = ("emoji64", "cifar10", "photos256", "ffhq256", "imagenet256")
    names += ("imagenet256_paper", "ffhq1024_paper")
    grids = {name: sections(name)[0].model.grids for name in names}
    assert grids["emoji64"] == grids["cifar10"] == ((8, 8), (16, 16))
    assert grids["photos256"] == ((16, 16), (32, 32))
    assert grids["ffhq256"] == grids["imagenet256"] == ((32, 32), (64, 64))
    assert grids["imagenet256_paper"] == ((32, 32), (64, 64))
    assert grids["ffhq1024_paper"] == ((32, 32), (64, 64), (128, 128))
    for name in ("imagenet256_paper", "ffhq1024_paper"):
        assert all(prior.family == "pixelsnail" for prior in sections(name)[1])


# The numbers.

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::convolution",
    "aten::convolution_backward",
)


def real_peak(stage: Stage, rows: int, precision: str) -> tuple[torch.nn.Module, float]:
    """The model, and the most GiB that the allocator gave to a step on top of the weights."""
    torch.manual_seed(0)
    model = stage.make_model().train()
    stage.loss(
        model, stage.make_batch(rows), precision
    ).backward()  # leaves its gradients, as the plan assumes
    attention.kept_mask.cache_clear()  # but not its masks, which the plan counts
    with torch.profiler.profile(profile_memory=True) as profile:
        stage.loss(model, stage.make_batch(rows), precision).backward()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    products = [event for event in events if event.name() in PRODUCTS]
    changes = [event for event in events if event.name() == "[memory]"]

    # A product may take scratch memory, which it gives back before it ends (how much depends on
    # the CPU): so it counts as one change.
    sums: list[int] = []
    last = None
    for event in changes:
        within = next((p for p in products if p.start_ns() <= event.start_ns() <= p.end_ns()), None)
        if within is None or within is not last:
            sums.append(0)
        sums[-1] += event.nbytes()
        last = within
    return model, max(accumulate(sums)) / 2**30


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_step_takes_the_memory_that_was_planned(number: int, precision: str) -> None:
    num_parameters, _, sizes = traced(number, 16, precision)
    model, peak = real_peak(tiny_stages()[number], 16, precision)
    assert num_parameters == sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert sizes["weights"] == sum(tensor.nbytes for tensor in tensors) / 2**30
    assert sizes["gradients"] == num_parameters * 4 / 2**30
    matrices = layer_weights(model)  # which have one moment, by Muon; all else has two
    moments = sum(p.nbytes * (1 if id(p) in matrices else 2) for p in model.parameters())
    assert sizes["optimizer"] == moments / 2**30
    # A codebook that learns without gradients takes memory of its own, which is not planned.
    planned_peak = sizes["activations"] + sizes["working memory"]
    assert planned_peak == pytest.approx(peak, rel=0.1 if number == 0 else 0.001)


def test_twice_the_rows_take_twice_the_activations_and_operations() -> None:
    for number in (0, 2):
        _, flops, sizes = traced(number, 8, "no")
        _, more_flops, more_sizes = traced(number, 16, "no")
        # What is computed once, whatever the batch, is little: the tables of neighbours.
        assert more_flops == pytest.approx(2 * flops, rel=0.03)
        assert more_sizes["activations"] == pytest.approx(2 * sizes["activations"], rel=0.01)
        assert more_sizes["weights"] == sizes["weights"]


def test_operations_of_a_transformer() -> None:
    """Six per weight and position (two forward, four backward), and those of fused attention."""
    width, layers, positions = 768, 12, 32 * 32
    weights = layers * 12 * width**2 + width * 512
    # q k^T and the sum of values, multiply and add; the backward computes q k^T again.
    attention = layers * positions * positions * width * 2 * 2
    _, flops, _ = trace(stages("ffhq256")[1], 1, "no")
    assert flops == pytest.approx(6 * weights * positions + 3.5 * attention, rel=0.02)


def test_other_quantizers_and_a_discriminator_are_planned(tmp_path: Path) -> None:
    plain = traced(0, 16, "no")
    for kind in ("gradient", "cosine", "fsq"):
        model = {**load_recipe("tiny")["train"]["model"], "quantizer": {"kind": kind}}
        stage, *_ = stages(recipe_file(tmp_path, train={"model": model}))
        assert trace(stage, 16, "no")[1] > 0
    discriminator = {"weight": 0.8, "num_layers": 1}
    stage, *_ = stages(recipe_file(tmp_path, train={"discriminator": discriminator}))
    pair = trace(stage, 16, "no")
    assert pair[0] > plain[0]
    assert pair[2]["activations"] > plain[2]["activations"]


def test_real_steps_and_plans_do_not_disturb_each_other() -> None:
    """The masks that attention caches: a real step after a plan, and a plan after a real step."""
    stage = tiny_stages()[2]
    for _ in range(2):
        trace(stage, 2, "no")
        stage.loss(stage.make_model(), stage.make_batch(2), "no").backward()


# What it says.


def test_what_to_change_when_it_does_not_fit(tmp_path: Path) -> None:
    stage, *_ = stages(recipe_file(tmp_path, train={"batch_size": 4096}))
    sizes, memory = trace(stage, 4096, "no")[2], 0.012
    assert sum(sizes.values()) > memory
    advice, most_rows = advise(stage, 4096, sizes, memory)
    steps = int(advice.split("DOES NOT FIT: use --gradient-accumulation-steps ")[1].split()[0])
    assert 4096 // steps <= most_rows < 2 * 4096 // steps
    fewer = trace(stage, 4096 // steps, "no")[2]
    assert sum(fewer.values()) < memory
    assert advise(stage, 4096 // steps, fewer, memory)[0] == "fits"
    nothing, most_rows = advise(stage, 4096, sizes, 0.0001)
    assert most_rows == 0
    assert "not even a single image" in nothing


def test_any_command_line_is_planned_with_its_own_flags(photos: Path, run: Path) -> None:
    """Images are counted, steps are timed, and what is not there yet is as the recipe says."""
    started = time.perf_counter()
    tiny = ("--config", "tiny", "--data.path", photos)
    text = plan("train", *tiny, "--batch-size", 4, "--model.hidden-channels", 8, "--num-steps", 3)
    held_out = int(text.split(" training images, ")[1].split()[0])
    number = len(list(photos.rglob("*.png"))) - held_out
    assert text.startswith(f"{number} training images, {held_out} held out, 3 classes\n")
    assert "4 images, 4 at once" in text
    assert f"{12 / number:.1f} epochs of {number} rows" in text
    for vqvae, note in ((run / "vqvae", 0), ("runs/nowhere/vqvae", 1)):
        text = plan("extract", *tiny, "--vqvae", vqvae, "--views", "original", "flip")
        assert f"1.0 epochs of {2 * number} rows" in text.replace("1.1", "1.0")
        assert text.count("is not there yet") == note
    for codes, note in ((run / "codes", 0), ("runs/nowhere/codes", 1)):
        text = plan("train-prior", "--config", "tiny", "--codes", codes, "--level", "bottom")
        assert "prior_1: " in text
        assert text.count("is not there yet") == note
    seconds = time.perf_counter() - started
    for part in text.split(" steps of ")[1:]:
        assert 1e-6 < float(part.split()[0]) < seconds


def test_the_demo_is_planned_with_its_share_of_steps() -> None:
    text = plan("demo", "--budget", 0.01, *GPU)
    assert "training images" in text
    assert text.count("at once") == 3


def test_a_streams_images_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    words = ("train", "--config", "tiny", "--data.path", tmp_path / "0.tar", *GPU)
    assert main(["plan", *map(str, words)]) == 2
    assert "--num-images" in capsys.readouterr().err
    assert "0.2 epochs of 1,000 rows" in plan(*words, "--num-images", 1000)


def test_the_verdict_is_in_words() -> None:
    stage = tiny_stages()[0]
    hours = verdict([(stage, 1.0, "fits", 10_000)], 24, "a GPU")
    assert hours == "fits into 24.0 GiB; as it is, a GPU of 8 GiB would do; " + (
        "it takes about 3 hours on this machine, as busy as it is."
    )
    days = verdict([(stage, 1.0, "fits", 200_000)], 24, "a GPU")
    assert days.endswith("a GPU would be faster.")
    years = verdict([(stage, 30.0, "DOES NOT FIT", 20736000)], 24, "a GPU")
    assert years.startswith(
        "train DOES NOT FIT; as it is, a GPU of 40 GiB would do; it takes about 240 days"
    )
    assert "NOT PRACTICAL: use a GPU, or --image.size 8" in years
    assert [in_words(seconds) for seconds in (0.1, 100, 3600, 1e9)] == [
        "about 1 seconds", "about 100 seconds", "about 60 minutes", "about 32 years",
    ]  # fmt: skip


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    misspelt = str(Path(recipe_file(tmp_path, train={"batch_sise": 3})).rename(tmp_path / "a.yaml"))
    cases: list[tuple[list[str], list[str]]] = [
        (["--config", "tinny"], ["no recipe 'tinny'", "ffhq256"]),
        ([], ["the command is ''", "train-prior", "--config"]),
        (["default"], ["'default'", "train-prior", "--config"]),
        (["demo", "--batch-size", "4"], ["--batch-size", "vqvae2 demo --help"]),
        (["train", "--config", "tiny", "--data.path", "no"], ["no does not exist", "--num-images"]),
        (["--config", "tiny", "--num-images", "0"], ["num_images is 0", "at least 1"]),
        (["--config", "tiny", "--num-devices", "3"], ["batch_size is 16", "3 devices"]),
        (["--config", "tiny", "--memmory-gibibytes", "2"], ["--memory-gibibytes"]),
        (["--config", misspelt], ["batch_sise", "batch_size"]),
    ]
    if not torch.cuda.is_available():
        cuda = ["--config", "tiny", "--device", "cuda"]
        cases.append((cuda, ["--memory-gibibytes"]))
    for arguments, words in cases:
        assert main(["plan", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        for word in words:
            assert word in message, (arguments, message)
