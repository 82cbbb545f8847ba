"""`vqvae2 compare`: equal bits and time for all, the answer in words, and that it goes on."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from PIL import Image

from pipelines.commands import compare
from pipelines.config import CompareConfig
from tests.conftest import command, write_images
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_json
from vqvae2.config import ImagesConfig, PreprocessingConfig, VQVAE2Config


def bits_of(model: VQVAE2Config) -> float:
    return compare.bits_of(model.grids, model.codebook_size_per_level)


@pytest.mark.parametrize(
    ("size", "codes", "sizes"),
    [
        ((64,), (256,), {"one level": (1024,), "two levels": (256,), "three levels": (197,)}),
        ((32, 64), (512, 64), {"one level": (304,), "two levels": (512, 64)}),
    ],
)
def test_an_image_has_as_many_bits_in_each_model(
    size: tuple[int, ...], codes: tuple[int, ...], sizes: dict[str, tuple[int, ...]]
) -> None:
    model = VQVAE2Config(image=PreprocessingConfig(size=size), codebook_sizes=codes)
    found = compare.equal_sizes(model)
    assert sizes.items() <= found.items()
    for name, strides in compare.STRIDES.items():
        other = VQVAE2Config(image=model.image, strides=strides, codebook_sizes=found[name])
        assert bits_of(other) == pytest.approx(bits_of(model), rel=0.002)


def test_each_model_trains_as_long_on_the_same_threads(tmp_path: Path) -> None:
    """Steps that are dearer are fewer; a recipe of the user's own holds for all, but for settings
    that suit one number of levels."""
    text = "train-prior: {transformer: {dropout: 0.3}}\nprior_2: {batch_size: 16}\n"
    text += "sample: {temperature: [1.0, 0.8], guidance_scale: [1.5]}\n"
    (tmp_path / "mine.yaml").write_text(text)
    data = ImagesConfig(path=str(write_images(tmp_path / "photos", 150)))
    config = CompareConfig(
        data=data, output_dir="out", minutes=2, recipe=str(tmp_path / "mine.yaml")
    )

    def seconds(stage: Any) -> float:
        return 0.1 * stage.config.batch_size / 32 * (len(stage.name) % 3 + 1)

    with (
        mock.patch("pipelines.commands.compare.step_seconds", side_effect=seconds),
        mock.patch("pipelines.commands.run.fastest_number", return_value=1),
    ):
        texts = compare.make_recipes(config)
    assert all("each level's sampling is left out" in text for text in texts.values())
    recipes = {name: yaml.safe_load(text) for name, text in texts.items()}
    for name, recipe in recipes.items():
        stages = ["train", *(f"prior_{level}" for level in range(len(compare.STRIDES[name])))]
        assert {key for key in recipe if "prior_" in key or key == "train"} == {*stages}
        assert {recipe[key]["num_threads"] for key in (*stages, "extract", "evaluate")} == {1}
        assert {recipe[key]["transformer"]["dropout"] for key in stages[1:]} == {0.3}
        assert recipe["sample"] == {"num_threads": 1, "guidance_scale": [1.5]}
        assert [key for key in stages if recipe[key]["batch_size"] == 16] == stages[3:]
        spent = sum(
            recipe[key]["num_steps"] * 0.1 * recipe[key]["batch_size"] / 32 * (len(key) % 3 + 1)
            for key in stages
        )
        assert spent == pytest.approx(0.9 * 120, rel=0.02)


def rows_of(models: list[tuple[float, float]], minutes: float = 9.0) -> dict[str, Any]:
    """Figures by name and model; the first trains for so many minutes."""
    spent = dict.fromkeys(compare.STRIDES, 4.5)
    each = dict(zip(compare.STRIDES, models, strict=True))
    return {
        "MSE": {name: mse for name, (mse, _) in each.items()},
        "distance of samples": {name: distance for name, (_, distance) in each.items()},
        "bits per image": dict.fromkeys(each, 640.0),
        "bits per image, with the priors": dict.fromkeys(each, 320.0),
        "minutes, autoencoder": spent,
        "minutes, priors": {**spent, "one level": minutes - 4.5},
    }


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            [(0.02, 5.0), (0.015, 4.0), (0.018, 3.0)],
            ("Yes: pictures come back with 25% less error from two levels than from one, and new "
             "pictures are 40% closer to real ones from three levels than from one.",
             "Take two levels (--model.strides 2 4) for exact pictures, three levels"),
        ),
        (
            [(0.02, 5.0), (0.0201, 5.2), (0.03, 9.0)],
            ("No: pictures come back about as exactly from several levels as from one",
             "Take one level (--model.strides 4) for both"),
        ),
        (
            [(0.02, 5.0), (0.01, 10.0), (0.03, 9.0)],
            ("In part:", "at least 80% farther from real ones from several levels than from one"),
        ),
        ([(0.02, 5.0), (0.03, 5.0), (0.03, 5.0)], ("No:", "at least 50% more error")),
        ([(0.5, 5.0), (0.4, 5.0), (0.3, 5.0)], ("Too early to say", "give more --minutes")),
    ],
)  # fmt: skip
def test_the_answer_follows_from_the_figures(
    models: list[tuple[float, float]], words: tuple[str, ...]
) -> None:
    text = " ".join(compare.summary(rows_of(models), "FD"))
    assert all(word in text for word in words)
    assert "(not alike" not in text
    text = " ".join(compare.summary(rows_of(models, minutes=5.0), "FD"))
    assert "Each trained 5 to 9 minutes (not alike: " in text


@pytest.mark.parametrize(
    ("number", "flags", "recipe", "words"),
    [
        (150, ("--image.size", 40), "", "image.size is (40, 40), but must be divisible by 16"),
        (30, (), "", "too few to hold some out"),
        (40, (), "train: {model: {image: {validation_fraction: 0.2}}}", "has 32 training images"),
        (150, (), "train: {model: {strides: [4]}}", "compare chooses grids and codebooks itself"),
        (150, ("--minutes", 0), "", "minutes is 0.0, but must be at least 0.01"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    number: int,
    flags: tuple[object, ...],
    recipe: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.yaml").write_text(recipe or "{}")
    photos, out = write_images(tmp_path / "photos", number), tmp_path / "out"
    mine = ("--config", tmp_path / "mine.yaml", "--output-dir", out)
    command("compare", "--data.path", photos, *mine, *flags, code=2)
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_page_shows_all_three_and_the_same_command_continues(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stages that are done already, and an evaluation that breaks off once."""
    evaluated: list[str] = []

    def stages(recipe: dict[str, Any], root: Path, data: dict[str, Any]) -> None:
        for part in ("vqvae", "codes", "prior_0", "prior_1", "pipeline"):
            if not (root / part).exists():
                (root / part).symlink_to(run / part)
        (root / "samples").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(root / "samples" / "samples.png")

    def evaluate(recipe: dict[str, Any], name: str, folder: str, **_: Any) -> None:
        assert recipe["train"]["model"]["image"]["size"] == [16]
        evaluated.append(Path(folder).parent.name)
        if len(evaluated) == 2:
            raise UserError("broken off")
        quality = {"MSE": 0.1 / len(evaluated), "PSNR (dB)": 16.0}
        stage_1 = {"Reconstruction": {"all levels": quality}, "Codebooks": {"top": {"used": 7}}}
        rows = {key: {"distance": 1.0, "count": 24} for key in ("samples", "reconstructions")}
        rows["real"] = rows["samples"]
        seen = {"distance_name": "FD", "kernel_distance_name": "KD"}
        found = {"stage 1": stage_1, "against": {"held-out images": rows}, "extractor": seen}
        write_json(Path(folder, "report", "figures.json"), {**found, "decides": "held-out images"})

    monkeypatch.setattr(compare, "run_stages", stages)
    monkeypatch.setattr(compare, "start_stage", evaluate)
    monkeypatch.setattr("pipelines.commands.compare.step_seconds", lambda _: 0.1)
    words = ("compare", "--data.path", photos, "--image.size", 16, "--output-dir", tmp_path / "out")
    command(*words, code=2)
    recipe = (tmp_path / "out" / "levels_1" / "recipe.yaml").read_bytes()
    for _ in range(2):
        command(*words)
    assert evaluated == ["levels_1", "levels_2", "levels_2", "levels_3"]
    assert (tmp_path / "out" / "levels_1" / "recipe.yaml").read_bytes() == recipe

    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [*found["models"]] == [*compare.STRIDES]
    column = found["models"]["two levels"]
    assert column["bits per image"] == 4 * math.log2(16) + 16 * math.log2(32)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Does hierarchy help these images? " in page
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
