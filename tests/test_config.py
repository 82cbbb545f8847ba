"""Configuration is strict: what is not understood is refused, with the key and what is allowed."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli import load_recipe, parse, recipe_names, recipe_section
from prior.config import PixelSNAILConfig, TransformerConfig, TransformerPriorConfig
from vqvae2.common.config import differences, from_dict, may_change, recipe_only, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.config import DataConfig, PreprocessingConfig, TrainVQVAEConfig, VQVAE2Config

TRAIN = {"output_dir": "o", "data": {"path": "p"}}
FLAGS = ["--data.path", "p", "--output-dir", "o"]


def training(**changes: object) -> TrainVQVAEConfig:
    return from_dict(TrainVQVAEConfig, {**TRAIN, **changes}, "here")


def test_a_configuration_survives_being_written_and_read() -> None:
    config = training(model={"strides": [2, 2, 4], "codebook_sizes": [8, 16, 32]})
    assert from_dict(TrainVQVAEConfig, to_dict(config), "here") == config
    prior = TransformerPriorConfig(
        level=1,
        grids=((2, 3), (4, 6)),
        codebook_sizes=(5, 6),
        class_names=("a", "b"),
        network=TransformerConfig(width=64),
    )
    assert from_dict(TransformerPriorConfig, to_dict(prior), "here") == prior


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": {"hiden_channels": 3}}, ["here: model: unknown key 'hiden_channels'"]),
        ({"model": {"hiden_channels": 3}}, ["did you mean 'hidden_channels'?"]),
        ({"batch_size": "many"}, ["here: batch_size", "'many'", "int"]),
        ({"batch_size": True}, ["here: batch_size", "True", "int"]),
        ({"batch_size": 0}, ["batch_size is 0", "at least 1"]),
        ({"weight_decay": -1.0}, ["weight_decay is -1.0", "at least 0"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision", "'fp8'", "'bf16'"]),
        ({"adam_betas": [0.9]}, ["adam_betas", "1 values", "2"]),
        ({"model": {"strides": [3, 4]}}, ["strides", "(3, 4)", "powers of two"]),
        ({"model": {"image": {"size": [60]}}}, ["image.size", "60", "divisible by 8"]),
        ({"model": {"codebook_sizes": [1, 2, 3]}}, ["codebook_sizes", "(1, 2, 3)", "2 levels"]),
        ({"data": {}}, ["data", "'path'", "missing"]),
        ({"data": 3}, ["here: data is 3", "mapping"]),
        ({"batch_size": 10**10}, ["batch_size is 10000000000", "at most 1,048,576"]),
        ({"batch_size": 2**70}, ["batch_size", "63 bits"]),
        ({"model": {"codebook_sizes": [2**40]}}, ["codebook_sizes", "at most 16,777,216"]),
        ({"model": {"image": {"channels": 10**9}}}, ["channels", "at most 1,024"]),
        ({"model": {"image": {"size": [2**20]}}}, ["size", "at most 16,384"]),
        ({"data": {"path": "p", "num_workers": 10**5}}, ["num_workers", "at most 1,024"]),
        ({"adam_betas": [1.5, 2]}, ["adam_betas", "below 1"]),
        ({"learning_rate": math.nan}, ["learning_rate is nan", "finite"]),
        ({"learning_rate": math.inf}, ["learning_rate is inf", "finite"]),
        ({"weight_decay": "1e400"}, ["weight_decay is inf", "finite"]),
        ({"weight_decay": 10**400}, ["weight_decay", "float"]),
        ({"mixed_precision": "x" * 10**6}, ["'xxxx", "...", "xxx'"]),
    ],
)
def test_mistakes_are_named(data: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        training(**data)
    assert len(str(error.value)) < 500
    for word in words:
        assert word in str(error.value)


def test_no_network_has_millions_of_layers() -> None:
    for settings in ({"num_layers": 10**7}, {"width": 2**40}):
        with pytest.raises(UserError, match="at most"):
            TransformerConfig(**settings)
    with pytest.raises(UserError, match="num_blocks x num_residual_blocks is 250000"):
        PixelSNAILConfig(num_blocks=500, num_residual_blocks=500)


def aliases(first: str, line: str) -> str:
    """Fourteen lines, each of which holds the one before four times."""
    lines = [line.format(i, "{", f"*a{i - 1}, " * 4, "}") for i in range(1, 15)]
    return "\n".join([f"line0: &a0 {first}", *lines])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: {num_steps: 2001-99-99}", "month must be in"),
        ("train: {num_steps: !!int abc}", "invalid literal"),
        ("train: " + "[" * 20_000, "50 levels"),
        (aliases("[x, x]", "line{0}: &a{0} [{2}]"), "200,000 values"),
        (aliases("{x: 1}", "line{0}: &a{0} {1}<<: [{2}]{3}"), "200,000 values"),
        ("train: &t {model: *t}", "stands for nothing before it"),
        ("train: " + "x" * (1 << 22), "more than 4,194,304 bytes"),
        ("train: {num_steps: " + "9" * 5000 + "}", "4300 digits"),
        ("train: {num_steps: 0x" + "f" * 5000 + "}", "a number of 20000 bits"),
        ("3: {}", "unknown section 3"),
        ("[1, 2]: {}", "unhashable"),
        ("train: 3", "train is 3, but must be a mapping"),
        ("train: [1]", "train is .1., but must be a mapping"),
    ],
)
def test_a_recipe_that_is_none_gets_a_sentence(tmp_path: Path, text: str, reason: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=reason) as error:
        parse("train", ["--config", str(recipe), *FLAGS])
    assert len(str(error.value)) < 700


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"pipe\.yaml is a pipe, a socket or a device"):
        load_recipe(str(tmp_path / "pipe.yaml"))
    with pytest.raises(UserError, match=r"config\.json is a pipe, a socket or a device"):
        read_json(tmp_path / "config.json")


def test_flags_win_over_recipe_and_recipe_over_defaults() -> None:
    tiny = ["--config", "tiny", *FLAGS]
    config = parse("train", [*tiny, "--num-steps", "7", "--model.code-dims", "4", "6"])
    assert (config.num_steps, config.batch_size, config.model.code_dims) == (7, 16, (4, 6))
    assert config.model.codebook_sizes == (16, 32)
    assert config.adam_betas == training().adam_betas


def test_flags_are_held_to_the_rules_of_recipes() -> None:
    sample = ["--pipeline", "p", "--output-dir", "o"]
    for value in ("inf", "nan", "1e400"):
        with pytest.raises(UserError, match=r"temperature.* is (inf|nan), .* a finite number"):
            parse("sample", [*sample, "--temperature", "1", value])
        with pytest.raises(UserError, match=r"learning_rate is (inf|nan), but must be a finite"):
            parse("train", [*FLAGS, "--learning-rate", value])


def test_configurations_made_in_python_are_held_to_their_types(tmp_path: Path) -> None:
    wanted = VQVAE2Config(image=PreprocessingConfig(size=(16, 32)), strides=(2, 4))
    given: Any = {"image": {"size": [16, 32]}, "strides": [np.int64(2), 4]}
    assert VQVAE2Config(**given) == wanted
    where: Any = tmp_path
    assert DataConfig(path=where).path == str(tmp_path)
    mistakes: list[tuple[type, dict[str, Any], str]] = [
        (PreprocessingConfig, {"size": 64}, r"size is 64, but must be a list, such as \[64\]"),
        (VQVAE2Config, {"hidden_channels": "wide"}, "hidden_channels is 'wide', .* of type int"),
        (VQVAE2Config, {"network": "resnett"}, "network is 'resnett', but must be one of 'paper'"),
        (
            VQVAE2Config,
            {"image": {"sizes": [8]}},
            "image: unknown key 'sizes' .did you",
        ),
        (
            TrainVQVAEConfig,
            {**TRAIN, "compile": 1},
            "compile is 1, but must be one of",
        ),
    ]
    for config_class, values, message in mistakes:
        with pytest.raises(UserError, match=message):
            config_class(**values)


def test_recipes_speak_per_level() -> None:
    recipe = load_recipe("demo")
    for level, name in (("top", "prior_0"), ("0", "prior_0"), ("bottom", "prior_1")):
        assert recipe_section(recipe, "train-prior", level) == recipe[name]
    many: dict[str, dict] = {f"prior_{level}": {"seed": level} for level in range(12)}
    assert recipe_section(many, "train-prior", "bottom") == {"seed": 11}


def test_a_section_is_of_its_level_alone_and_says_what_differs(tmp_path: Path) -> None:
    top, second = {"prior_0": {"seed": 1}}, {"prior_1": {"seed": 2}}
    assert recipe_section(top, "train-prior", "bottom") == {}
    assert recipe_section(second, "train-prior", "top") == {}
    assert recipe_section(second, "train-prior", "bottom") == {"seed": 2}
    (tmp_path / "manifest.json").write_text(json.dumps({"grids": [[2, 2], [4, 4], [8, 8]]}))
    assert recipe_section(second, "train-prior", "bottom", str(tmp_path)) == {}
    three = {"train": {"model": {"strides": [2, 2, 2]}}, **second}
    assert recipe_section(three, "train-prior", "bottom") == {}
    for train in ({"model": None}, {"model": {"strides": 4}}, None):  # train says what is wrong
        wrong = {"train": train, "train-prior": {"codes": 5}, **second}
        assert recipe_section(wrong, "train-prior", "bottom") == {"codes": 5, "seed": 2}
    both = {"train-prior": {"transformer": {"width": 64, "dropout": 0.1}, "num_steps": 5}}
    both["prior_1"] = {"transformer": {"dropout": 0.3}}
    expected = {"transformer": {"width": 64, "dropout": 0.3}, "num_steps": 5}
    assert recipe_section(both, "train-prior", "1") == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_understood(name: str) -> None:
    for section in load_recipe(name):
        command, needed = section, ["--output-dir", "o"]
        if section.startswith("prior_"):
            command, needed = "train-prior", [*needed, "--level", section[-1], "--codes", "c"]
        elif section in ("train", "extract"):
            needed = [*FLAGS, *(["--vqvae", "v"] if section == "extract" else [])]
        parse(command, ["--config", name, *needed])


def test_differences_ignore_what_may_change() -> None:
    old = to_dict(training())
    new = training(num_steps=5, log_every=3, model={"quantizer": {"beta": 1.0}})
    expected = [("model.quantizer.beta", 0.25, 1.0)]
    assert differences(TrainVQVAEConfig, old, to_dict(new)) == expected


def test_fields_are_marked_for_recipes_and_for_resuming() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        rare: float = recipe_only(0.5)
        how_long: int = may_change(3)
        both: bool = may_change(False, recipe_only=True)

    marked = {f.name: dict(f.metadata) for f in dataclasses.fields(Config)}
    assert [bool(marks.get("recipe_only")) for marks in marked.values()] == [True, False, True]
    assert [bool(marks.get("may_change")) for marks in marked.values()] == [False, True, True]
    assert differences(Config, to_dict(Config()), to_dict(Config(1.0, 4, True))) == [
        ("rare", 0.5, 1.0)
    ]


def test_levels_share_or_have_their_own() -> None:
    config = VQVAE2Config(strides=(2, 2, 4), codebook_sizes=(512,), code_dims=(8, 16, 32))
    assert config.codebook_size_per_level == (512, 512, 512)
    assert config.code_dim_per_level == (8, 16, 32)
    assert config.grids == ((4, 4), (8, 8), (16, 16))


def test_a_later_setting_is_written_if_it_differs_and_compared_if_it_is_missing() -> None:
    paper, resnet = (to_dict(VQVAE2Config(network=network)) for network in ("paper", "resnet"))
    assert resnet == {**paper, "network": "resnet"}
    assert from_dict(VQVAE2Config, resnet, "x").network == "resnet"
    assert differences(VQVAE2Config, paper, resnet) == [("network", "paper", "resnet")]
    assert differences(VQVAE2Config, resnet, paper) == [("network", "resnet", "paper")]
