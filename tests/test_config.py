"""Configuration is strict: what is not understood is refused, with the key and what is allowed."""

import pytest

from pipelines.cli import load_recipe, parse, recipe_names, recipe_section
from prior.config import TransformerConfig, TransformerPriorConfig
from vqvae2.common.config import differences, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.config import TrainVQVAEConfig, VQVAE2Config

TRAIN = {"output_dir": "o", "data": {"path": "p"}}


def test_round_trip() -> None:
    config = from_dict(
        TrainVQVAEConfig,
        {**TRAIN, "model": {"strides": [2, 2, 4], "codebook_sizes": [8, 16, 32]}},
        "here",
    )
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
        (
            {"model": {"hiden_channels": 3}},
            ["here: model", "'hiden_channels'", "did you mean 'hidden_channels'"],
        ),
        ({"batch_size": "many"}, ["here: batch_size", "'many'", "int"]),
        ({"batch_size": True}, ["here: batch_size", "True", "int"]),
        ({"batch_size": 0}, ["batch_size is 0", "at least 1"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision", "'fp8'", "'bf16'"]),
        ({"adam_betas": [0.9]}, ["adam_betas", "1 values", "2"]),
        ({"model": {"strides": [3, 4]}}, ["strides", "(3, 4)", "powers of two"]),
        ({"model": {"image": {"size": [60]}}}, ["image.size", "60", "divisible by 8"]),
        ({"model": {"codebook_sizes": [1, 2, 3]}}, ["codebook_sizes", "(1, 2, 3)", "2 levels"]),
        ({"data": {}}, ["data", "'path'", "missing"]),
    ],
)
def test_mistakes_are_named(data: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_dict(TrainVQVAEConfig, {**TRAIN, **data}, "here")
    for word in words:
        assert word in str(error.value)


def test_flags_win_over_recipe_and_recipe_over_defaults() -> None:
    config = parse(
        "train",
        [
            "--config",
            "tiny",
            "--data.path",
            "p",
            "--output-dir",
            "o",
            "--num-steps",
            "7",
            "--model.code-dims",
            "4",
            "6",
        ],
    )
    assert (config.num_steps, config.batch_size, config.learning_rate) == (
        7,
        16,
        TrainVQVAEConfig(output_dir="o", data=config.data).learning_rate,
    )
    assert config.model.code_dims == (4, 6)
    assert config.model.codebook_sizes == (16, 32)


def test_recipes_speak_per_level() -> None:
    recipe = load_recipe("demo")
    assert (
        recipe_section(recipe, "train-prior", "top")
        == recipe["prior_0"]
        == recipe_section(recipe, "train-prior", "0")
    )
    assert recipe_section(recipe, "train-prior", "bottom") == recipe["prior_1"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_understood(name: str) -> None:
    for section in load_recipe(name):
        command, level = (
            ("train-prior", ["--level", section[-1], "--codes", "c"])
            if section.startswith("prior_")
            else (section, [])
        )
        needed = ["--data.path", "p"] if command in ("train", "extract") else []
        parse(command, ["--config", name, "--output-dir", "o", *level, *needed])


def test_differences_pass_over_what_may_change() -> None:
    old = to_dict(from_dict(TrainVQVAEConfig, TRAIN, "here"))
    new = to_dict(
        from_dict(
            TrainVQVAEConfig,
            {**TRAIN, "num_steps": 5, "log_every": 3, "model": {"quantizer": {"beta": 1.0}}},
            "here",
        )
    )
    assert differences(TrainVQVAEConfig, old, new) == [("model.quantizer.beta", 0.25, 1.0)]


def test_levels_share_or_have_their_own() -> None:
    config = VQVAE2Config(strides=(2, 2, 4), codebook_sizes=(512,), code_dims=(8, 16, 32))
    assert config.codebook_size_per_level == (512, 512, 512)
    assert config.code_dim_per_level == (8, 16, 32)
    assert config.grids == ((4, 4), (8, 8), (16, 16))
