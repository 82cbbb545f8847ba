"""The command line: `vqvae2 SUBCOMMAND --flags`. Torch is loaded only after the arguments are understood."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tyro

from pipelines.config import (
    AssembleConfig,
    CodesInfoConfig,
    CodesVerifyConfig,
    CodesViewConfig,
    DemoConfig,
    DoctorConfig,
    ExtractConfig,
    ImportCodesConfig,
    ImportWeightsConfig,
    InspectConfig,
    PlanConfig,
    ReconstructConfig,
    SampleConfig,
    TrainPriorCommandConfig,
)
from vqvae2.common.config import from_dict, read_yaml, suggest
from vqvae2.common.errors import Stopped, UserError
from vqvae2.common.messages import show_messages
from vqvae2.config import PrepareConfig, TrainVQVAEConfig

COMMANDS: dict[
    str, tuple[type, str]
] = {  # subcommand -> its configuration, and where its function is
    "demo": (DemoConfig, "pipelines.commands.demo:demo"),
    "plan": (PlanConfig, "pipelines.plan.command:plan"),
    "prepare": (PrepareConfig, "vqvae2.prepare:prepare_command"),
    "train": (TrainVQVAEConfig, "pipelines.commands.train:train"),
    "extract": (ExtractConfig, "pipelines.commands.extract:extract"),
    "train-prior": (TrainPriorCommandConfig, "pipelines.commands.train_prior:train_prior"),
    "codes info": (CodesInfoConfig, "pipelines.commands.codes:info"),
    "codes view": (CodesViewConfig, "pipelines.commands.codes:view"),
    "codes verify": (CodesVerifyConfig, "pipelines.commands.codes:verify"),
    "reconstruct": (ReconstructConfig, "pipelines.commands.reconstruct:reconstruct"),
    "inspect": (InspectConfig, "pipelines.commands.inspect:inspect_command"),
    "doctor": (DoctorConfig, "pipelines.commands.doctor:doctor"),
    "sample": (SampleConfig, "pipelines.commands.sample:sample"),
    "assemble": (AssembleConfig, "pipelines.commands.assemble:assemble"),
    "import-weights": (ImportWeightsConfig, "pipelines.commands.import_weights:import_weights"),
    "import-codes": (ImportCodesConfig, "pipelines.importers.rosinality_codes:import_codes"),
}
RECIPES = files("pipelines") / "recipes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 where checks failed, 2 for a user's mistake (one sentence on stderr), 128 + n after signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_messages()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
            return 0
        command, rest = split_command(arguments)
        config = parse(command, rest)
        return function_of(command)(config) or 0
    except UserError as error:
        print(f"vqvae2: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"vqvae2: error: {error.filename}: {error.strerror}: check the path, its permissions, and the space on the disk.",
            file=sys.stderr,
        )
        return 2
    except Stopped as stopped:
        print(f"vqvae2: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("vqvae2: interrupted; the same command starts where it can.", file=sys.stderr)
        return 130
    finally:
        _leave_process_group()


def split_command(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The subcommand, of one word or two ("codes info"), and its arguments.

    Raises:
        UserError: there is no such subcommand.
    """
    for number in (1, 2):
        if (command := " ".join(arguments[:number])) in COMMANDS:
            return command, arguments[number:]
    family = [command for command in COMMANDS if command.startswith(f"{arguments[0]} ")]
    if family:
        raise UserError(
            f"vqvae2 {arguments[0]} needs a second word: {', '.join(family)} (see vqvae2 --help)."
        )
    raise UserError(
        f"unknown subcommand {arguments[0]!r}; {suggest(arguments[0], COMMANDS)} (see vqvae2 --help)."
    )


def _leave_process_group() -> None:
    """Without it a process of several may be aborted at its exit, after all its work is done."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def run_script(command: str) -> None:
    """What a file of scripts/ calls: the subcommand with the script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


def function_of(command: str) -> Callable[[Any], int | None]:
    """The function that carries out a subcommand, and may return an exit code; importing it loads torch."""
    module, name = COMMANDS[command][1].split(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    """The text of `vqvae2 --help`."""
    lines = [
        "usage: vqvae2 SUBCOMMAND [--config RECIPE] [--flags]",
        "",
        "Train a VQ-VAE-2 on your own images and sample from it: train, extract, train-prior for each level, sample.",
        "",
    ]
    lines += [
        f"  {name:<14} {(config.__doc__ or '').splitlines()[0]}"
        for name, (config, _) in COMMANDS.items()
    ]
    lines += [
        "",
        f"RECIPE is a YAML file, or one that comes with the package ({', '.join(recipe_names())}); flags win over it.",
        "vqvae2 SUBCOMMAND --help explains every flag. On several processes: accelerate launch scripts/SUBCOMMAND.py with the same flags.",
    ]
    return "\n".join(lines)


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The configuration that a subcommand's arguments ask for: defaults < recipe < flags.

    Raises:
        UserError: an unknown flag, a wrong value, or a missing one.
    """
    config_class = COMMANDS[command][0]
    arguments, recipe = _take_flag(list(arguments), "--config")
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (known := [*_flags(config_class), "--help"]):
            raise UserError(
                f"unknown flag {flag} of vqvae2 {command}; {suggest(flag, known)} (see vqvae2 {command} --help)."
            )
    section = (
        recipe_section(load_recipe(recipe), command, _take_flag(list(arguments), "--level")[1])
        if recipe
        else {}
    )
    if config_class is PlanConfig:  # here the recipe itself is a setting
        if recipe is None and "--help" not in arguments:
            raise UserError("vqvae2 plan: --config must be given. See vqvae2 plan --help.")
        section = {**section, "recipe": recipe or ""}
    default: Any = from_dict(config_class, section, f"recipe {recipe}", missing=tyro.MISSING)
    lesson = inspect.cleandoc(config_class.__doc__ or "")
    description = f"{lesson}\n\n--config RECIPE takes the defaults from a recipe: a YAML file, or {', '.join(recipe_names())}."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class,
                prog=f"vqvae2 {command}",
                args=arguments,
                default=default,
                description=description,
            )
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        raise UserError(
            f"vqvae2 {command}: {_one_sentence(said.getvalue())} See vqvae2 {command} --help."
        ) from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in RECIPES.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name or file: a section of settings for each training.

    Raises:
        UserError: there is no such recipe, or it has an unknown section.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(RECIPES / f"{name}.yaml"))
    if not path.is_file():
        raise UserError(
            f"there is no recipe {name!r}: give a YAML file, or one of {', '.join(recipe_names())}."
        )
    recipe = read_yaml(path)
    for section in recipe:
        if section not in COMMANDS and not re.fullmatch(r"prior_\d+", section):
            raise UserError(
                f"{path}: unknown section {section!r}; sections are the subcommands, and prior_0, prior_1, ... for the levels' train-prior."
            )
    return recipe


def recipe_section(
    recipe: dict[str, Any], command: str, level: str | None = None
) -> dict[str, Any]:
    """What a recipe says to a subcommand; to train-prior it also speaks per level (`prior_0` for the top, the last one for the bottom)."""
    section = recipe.get(command) or {}
    if command == "train-prior":
        priors = sorted(name for name in recipe if name.startswith("prior_"))
        name = (
            {"top": priors[0], "bottom": priors[-1]}.get(level or "", f"prior_{level}")
            if priors
            else ""
        )
        section = {**section, **(recipe.get(name) or {})}
    return section


def _flags(config_class: type, prefix: str = "") -> list[str]:
    flags = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            flags += _flags(hints[field.name], f"{name}.")
        else:
            flags += (
                [f"--{name}", f"--{prefix}no-{field.name.replace('_', '-')}"]
                if hints[field.name] is bool
                else [f"--{name}"]
            )
    return flags


def _take_flag(arguments: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without a flag and its value, and the value."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return arguments[:i] + arguments[i + 1 :], argument.split("=", 1)[1]
        if argument == flag:
            if i + 1 == len(arguments):
                raise UserError(f"{flag} has no value: give one.")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
    return arguments, None


def _one_sentence(box: str) -> str:
    """What tyro says in a box, without the box."""
    lines = [re.sub(r"[│╭╮╰╯]|─+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(
        line
        for line in lines
        if line and "full helptext" not in line and "rgument helptext" not in line
    )
    text = re.sub(r"\s+", " ", text).removeprefix("Value error ").strip()
    if text.startswith("Required options"):
        flags = re.findall(r"(--[a-z.-]+) [A-Z{]", text)
        return f"{' and '.join(flags) or 'what comes after the subcommand, without a flag,'} must be given."
    return text.rstrip(".") + "."


if __name__ == "__main__":
    sys.exit(main())
