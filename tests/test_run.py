"""All stages by one command: what is chosen for which images, and that it continues."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines import choices
from pipelines.choices import choose, look
from pipelines.cli import parse
from pipelines.commands.run import make_recipe, parse_time, step_seconds
from pipelines.config import RunConfig
from tests.conftest import command, write_images
from vqvae2.common.config import merged, read_yaml
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.config import ImagesConfig


def make_pictures(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> Path:
    """Coloured noise of these sizes (width, height)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:02d}.png")
    return folder


def chosen_image(folder: Path, **given: object) -> dict:
    choice = choose(look(ImagesConfig(path=str(folder))), on_gpu=False, given=given)
    reasons = "\n".join(choice.reasons)
    assert ("as you asked" in reasons) == bool(given)
    assert ("\nfit " in reasons) == ("fit" not in given)  # a reason only for what was chosen
    return choice.recipe["train"]["model"]["image"]


def test_pictures_of_all_shapes_are_padded_and_equal_shapes_kept(tmp_path: Path) -> None:
    wide_and_tall = make_pictures(tmp_path / "a", [(120, 60), (60, 120), (100, 100)] * 20)
    assert chosen_image(wide_and_tall)["fit"] == "pad"
    assert "fit" not in chosen_image(wide_and_tall, fit="crop")
    faces = make_pictures(tmp_path / "b", [(96, 128)] * 30)
    assert chosen_image(faces)["size"] == [72, 56]  # height, width: about 64 x 64 pixels
    assert chosen_image(make_pictures(tmp_path / "c", [(24, 40)] * 30))["size"] == [40, 24]
    assert "fit" not in chosen_image(faces)
    assert chosen_image(faces, size=(128,))["size"] == [128]


def test_small_grey_pictures_stay_small_and_grey(tmp_path: Path) -> None:
    image = chosen_image(make_pictures(tmp_path / "a", [(28, 28)] * 30, "L"))
    assert (image["size"], image["channels"]) == ([32], 1)


def test_pictures_of_twelve_bits_in_sixteen_keep_their_contrast(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i, largest in enumerate((4000, 900)):
        pixels = np.random.default_rng(i).integers(0, largest, (24, 24)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    assert chosen_image(tmp_path / "a")["value_range"] == [0, 4095]
    (tmp_path / "a" / "0.png").unlink()
    assert chosen_image(tmp_path / "a")["value_range"] == [0, 1023]


def test_floats_need_their_range_from_a_flag_or_a_recipe(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.random.default_rng(0).random((60, 16, 16, 1), np.float32))
    words = ["--data.path", str(tmp_path / "stack.npy"), "--output-dir", "o"]
    with pytest.raises(UserError, match=r"unknown: give --image\.value-range"):
        make_recipe(parse("run", words))
    recipe, image = tmp_path / "mine.yaml", {"value_range": [0, 1]}
    recipe.write_text(yaml.safe_dump({"train": {"model": {"image": image}}}))
    with mock.patch("pipelines.commands.run.step_seconds", return_value=1.0):
        for more in (["--image.value-range", "0", "1"], ["--config", str(recipe)]):
            chosen = yaml.safe_load(make_recipe(parse("run", [*words, *more]))[0])
            assert chosen["train"]["model"]["image"]["value_range"] == [0, 1]
    for wrong in (["--image.value-range", "1"], ["--image.value-range", "1", "0"]):
        with pytest.raises(UserError, match="must be two rising numbers"):
            make_recipe(parse("run", [*words, *wrong]))
    recipe.write_text(yaml.safe_dump({"train": {"model": {"image": {"value_range": [1]}}}}))
    with pytest.raises(UserError, match="value-range"):
        make_recipe(parse("run", [*words, "--config", str(recipe)]))


def test_white_drawings_on_nothing_get_a_background_on_which_they_show(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(20):
        drawing = Image.new("RGBA", (64, 64))
        drawing.paste("white", (10 + i, 10, 40, 40))
        drawing.save(tmp_path / "a" / f"{i}.png")
    assert chosen_image(tmp_path / "a")["background"] in ("black", "gray")


def test_enough_images_are_held_out_or_none(tmp_path: Path) -> None:
    some = make_pictures(tmp_path / "some", [(40, 40)] * 120)
    assert chosen_image(some)["validation_fraction"] * 120 == pytest.approx(30, abs=1)
    few = make_pictures(tmp_path / "few", [(40, 40)] * 30)
    assert chosen_image(few)["validation_fraction"] == 0


def test_a_budget_is_a_time() -> None:
    assert [parse_time(text) for text in ("90s", "1.5h", "2d")] == [90, 5400, 172800]
    for text in ("", "30", "m", "-1m", "0m", "1 hour", "infm", 400 * "9" + "d"):
        with pytest.raises(UserError, match="30m or 2h"):
            parse_time(text)


def test_settings_that_are_given_win_at_any_depth() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}) == {
        "a": {"b": 4, "c": 2},
        "d": 3,
    }


def test_all_stages_run_once_and_an_edited_recipe_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_images(tmp_path / "photos", 150)
    root, start = tmp_path / "all", ("run", "--data.path", photos, "--budget", "1s")
    mine, steps = tmp_path / "mine.yaml", {"num_steps": 4, "validate_every": 2}
    small = {**steps, "transformer": {"width": 16, "num_layers": 1, "num_heads": 2}}
    train = {**steps, "model": {"hidden_channels": 16}}
    mine.write_text(yaml.safe_dump({"train": train, "prior_0": small, "prior_1": small}))
    command(*start, "--config", mine, "--dry-run", "--output-dir", root)
    assert not root.exists()
    assert "codebook_sizes: [64]" in capsys.readouterr().out

    command(*start, "--config", mine, "--output-dir", root)
    page = (root / "index.html").read_text()
    for name in ("samples/samples.png", "reconstructions/reconstructions.png"):
        assert (root / name).stat().st_size
        assert f'src="{name}"' in page
    model = read_yaml(root / "vqvae" / "train_config.yaml")["model"]
    assert (model["hidden_channels"], model["image"]["channels"]) == (16, 1)

    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    command(*start, "--config", mine, "--output-dir", root)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())

    # A copy, whose files have new times, is finished, too; what trains on is used anew.
    copied = tmp_path / "copied"
    shutil.copytree(root, copied)
    (copied / "prior_1" / "model.safetensors").touch()
    kept = copied / "pipeline" / "normal.json"
    kept.touch()
    command(*start, "--config", mine, "--output-dir", copied)
    assert kept.exists()
    recipe = read_yaml(copied / "recipe.yaml")
    recipe["prior_1"]["num_steps"] = 8
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command(*start, "--config", mine, "--output-dir", copied)
    assert not kept.exists()
    index, sampled = copied / "pipeline" / "model_index.json", copied / "samples/sample_config.yaml"
    assert read_json(index)["prior_1_hash"] == read_yaml(sampled)["prior_1_hash"]

    mine.write_text(yaml.safe_dump({"train": train, "prior_0": small}))
    capsys.readouterr()
    command(*start, "--config", mine, "--output-dir", root, code=2)
    message = capsys.readouterr().err
    assert "another recipe" in message
    assert "edit the recipe.yaml that it holds" in message


def test_a_recipe_comes_before_what_is_chosen_and_flags_before_both(tmp_path: Path) -> None:
    photos, mine = write_images(tmp_path / "photos", 100), tmp_path / "mine.yaml"
    own = {"warmup_steps": 3, "weight_ema_decay": 0.5, "model": {"image": {"size": [16]}}}
    data = {"path": str(photos), "on_error": "skip", "augmentation": {"horizontal_flip": True}}
    mine.write_text(yaml.safe_dump({"train": {**own, "data": data}}))
    config = parse("run", ["--config", str(mine), "--output-dir", "o"])
    assert (config.data.path, config.data.on_error) == (str(photos), "skip")
    with mock.patch("pipelines.commands.run.step_seconds", return_value=1.0):
        recipe = yaml.safe_load(make_recipe(config)[0])
        train = recipe["train"]
        assert (train["warmup_steps"], train["weight_ema_decay"]) == (3, 0.5)
        assert train["model"]["image"]["size"] == [16]
        flags = ["--image.size", "32", "--flips", "no", "--data.on-error", "stop"]
        config = parse("run", ["--config", str(mine), "--output-dir", "o", *flags])
        recipe = yaml.safe_load(make_recipe(config)[0])
    assert config.data.on_error == "stop"
    assert recipe["train"]["model"]["image"]["size"] == [32]
    assert recipe["train"]["data"]["augmentation"] == {"horizontal_flip": False}
    assert recipe["extract"]["views"] == ["original"]


def test_so_few_images_that_none_is_held_out(tmp_path: Path) -> None:
    photos, root = write_images(tmp_path / "photos", 40), tmp_path / "all"
    steps = {"num_steps": 2}
    small = {**steps, "transformer": {"width": 16, "num_layers": 1, "num_heads": 2}}
    recipe = {"train": steps, "prior_0": small, "prior_1": small}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    start = ("run", "--data.path", photos, "--config", tmp_path / "mine.yaml")
    command(*start, "--output-dir", root)
    assert "No image was held out" in (root / "index.html").read_text()


def test_the_steps_fit_the_budget(tmp_path: Path) -> None:
    """Twice the time, twice the steps; and all of them together take less than the budget."""
    seconds = {"train": 0.1, "prior_0": 0.05, "prior_1": 0.2}
    data = ImagesConfig(path=str(write_images(tmp_path / "photos", 150)))
    steps = []
    for budget in ("2m", "4m"):
        config = RunConfig(data=data, output_dir="out", budget=budget)
        with mock.patch(
            "pipelines.commands.run.step_seconds", side_effect=lambda stage: seconds[stage.name]
        ):
            text, _ = make_recipe(config)
        assert "&" not in text  # no alias
        recipe = yaml.safe_load(text)
        steps.append({name: recipe[name]["num_steps"] for name in seconds})
    assert steps[1] == {name: 2 * number for name, number in steps[0].items()}
    assert 100 < sum(seconds[name] * number for name, number in steps[0].items()) < 120


def test_real_steps_are_timed_unless_their_number_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("prior_1: {num_steps: 3}")
    data = ImagesConfig(path=str(write_images(tmp_path / "photos", 150)))
    timed = []
    with mock.patch(
        "pipelines.commands.run.step_seconds", side_effect=lambda stage: timed.append(stage) or 0.1
    ):
        make_recipe(RunConfig(data=data, output_dir="out", recipe=str(tmp_path / "mine.yaml")))
    assert [stage.name for stage in timed] == ["train", "prior_0"]
    assert 0 < step_seconds(timed[0]) < 60


def test_a_recipe_guides_by_classes_only_if_there_are_any(tmp_path: Path) -> None:
    """The demo's does; else all would be trained, and then sampling refuse."""
    plain = make_pictures(tmp_path / "plain", [(32, 32)] * 30)
    sorted_ = write_images(tmp_path / "sorted", 30)
    for folder, is_guided in ((plain, False), (sorted_, True)):
        config = RunConfig(
            data=ImagesConfig(path=str(folder)), recipe="demo", output_dir=str(tmp_path / "x")
        )
        text, _ = make_recipe(config)
        assert ("guidance_scale" in yaml.safe_load(text)["sample"]) == is_guided
        assert ("no guidance: the images have no classes" in text) != is_guided


def test_fewer_threads_compute_where_they_are_faster_now(tmp_path: Path) -> None:
    data = ImagesConfig(path=str(write_images(tmp_path / "photos", 150)))
    with mock.patch("pipelines.commands.run.fastest_number", return_value=1):
        text, _ = make_recipe(RunConfig(data=data, output_dir="out", budget="1m"))
    recipe = yaml.safe_load(text)
    stages = ("train", "extract", "prior_0", "prior_1", "sample")
    assert [recipe[name]["num_threads"] for name in stages] == [1] * 5


def test_stacks_say_where_their_channels_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((20, 6, 64, 64), np.uint8))
    data = ImagesConfig(path=str(tmp_path / "a.npy"))
    with pytest.raises(UserError, match=r"shape \(6, 64, 64\).*set --image.channels"):
        look(data)
    assert look(data, channels=6).channels == 6
    assert look(data, channels=6).short_side == 64


def test_few_pictures_are_kept_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No more than `LOOKED_AT` are read, and what cannot be read is counted."""
    folder = make_pictures(tmp_path / "a", [(40, 40)] * 19)
    np.save(folder / "labels.npy", np.zeros(7, np.uint8))
    monkeypatch.setattr("pipelines.choices.LOOKED_AT", 8)
    read: list[int] = []
    original = choices.read_cell
    monkeypatch.setattr("pipelines.choices.read_cell", lambda c: read.append(1) or original(c))
    assert look(ImagesConfig(path=str(folder))).short_side == 40
    assert len(read) <= 8
    assert not caplog.messages
    (folder / "0.png").write_text("broken")
    assert look(ImagesConfig(path=str(folder))).short_side == 40
    assert "1 of 7 images that were looked at cannot be read" in caplog.text


def test_impossible_settings_are_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "images", tmp_path / "run"
    for name in ("red", "green"):
        make_pictures(folder / name, [(32, 32)] * 15)
    mine = tmp_path / "mine.yaml"
    run = ("run", "--data.path", folder, "--output-dir", output)
    for recipe, message in (
        ("train: {num_stepz: 5}", f"recipe {mine}: unknown key 'num_stepz' (did you mean"),
        ("prior_2: {num_steps: 5}", f"recipe {mine} has a section prior_2, but its priors are"),
        ("extract: {views: [original, flop]}", "views is ['flop'], but must be among"),
        ("sample: {temprature: 0.9}", f"recipe {mine}: unknown key 'temprature' (did you mean"),
        (
            "sample: {top_k: [9, 9, 9]}",
            f"recipe {mine}: top_k has 3 values, but the number of levels is 2",
        ),
        ("assemble: {foo: 1}", f"recipe {mine}: unknown key 'foo'"),
        ("evaluate: {num_sample: 200}", f"recipe {mine}: unknown key 'num_sample' (did you mean"),
        ("evaluate: {num_samples: 5}", f"recipe {mine}: num_samples is 5, but must be at least 20"),
        (
            "{prior_1: {label_dropout: 0}, sample: {guidance_scale: [2.0]}}",
            f"recipe {mine}: guidance_scale is 2.0, but the prior of level 1 was trained without "
            "label dropout",
        ),
        ("sample: {labels: [blue]}", "label 'blue' names no class: give a number from 0 to 1, or"),
        ("{prior_0: {label_dropout: 0}, sample: {labels: [none]}}", "label 'none' names no class"),
        ("evaluate: [5]", "evaluate is [5], but must be a mapping of settings"),
        ("sample: {attributes: [hat]}", "but the priors were trained without: omit them"),
        ("sample: {conditions: there.npy}", "there.npy"),
        ("sample: {reject: there}", "reject is 'there', but must be a file or folder that exists"),
    ):
        mine.write_text(recipe)
        command(*run, "--config", mine, code=2)
        assert message in capsys.readouterr().err
    for flag, value, message in (
        ("--image.size", 33, "the settings: model: image.size"),
        ("--image.channels", 9, "it has 3 channels, but image.channels is 9"),
    ):
        command(*run, flag, value, code=2)
        assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_class_by_the_name_of_the_hidden_label_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("none", "some"):
        make_pictures(tmp_path / "images" / name, [(32, 32)] * 15)
    output = tmp_path / "run"
    command("run", "--data.path", tmp_path / "images", "--output-dir", output, code=2)
    assert "a class is named 'none'" in capsys.readouterr().err
    assert not output.exists()


def test_a_recipes_strides_decide_the_size_and_a_dry_run_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "a", [(60, 96)] * 30)
    (tmp_path / "mine.yaml").write_text("train: {model: {strides: [4, 4]}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.commands.run.step_seconds", lambda _: 0.1)
    monkeypatch.setattr("pipelines.commands.run.show_needs", lambda *_: None)
    words = ("--data.path", folder, "--budget", "1m")
    texts = []
    for line in (
        ("plan", "run", "--config", "mine.yaml"),
        ("plan", "--config", "mine.yaml", "run"),
    ):
        command(*line, *words)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    height, width = yaml.safe_load(texts[0])["train"]["model"]["image"]["size"]
    assert (height % 16, width % 16) == (0, 0)
    assert not Path("nowhere").exists()
