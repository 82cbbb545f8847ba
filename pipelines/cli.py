"""The command line: `vqvae2 SUBCOMMAND --flags`. Torch loads only when the arguments are valid."""

import contextlib
import dataclasses
import gc
import importlib
import inspect
import io
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

from pipelines import config as configs
from vqvae2.common.config import (
    check,
    expand_paths,
    from_dict,
    merged,
    read_yaml,
    shown,
    suggest,
)
from vqvae2.common.errors import Stopped, UserError
from vqvae2.common.files import read_json
from vqvae2.common.messages import is_first_process, show_messages
from vqvae2.config import ImagesConfig, PrepareConfig, PreprocessingConfig, TrainVQVAEConfig

COMMANDS: dict[str, tuple[type, str]] = {  # subcommand -> its configuration and its function
    "demo": (configs.DemoConfig, "pipelines.commands.demo:demo"),
    "run": (configs.RunConfig, "pipelines.commands.run:run"),
    "compare": (configs.CompareConfig, "pipelines.commands.compare:compare"),
    "plan": (configs.PlanConfig, "pipelines.plan.command:plan"),
    "prepare": (PrepareConfig, "vqvae2.data.prepared:prepare_command"),
    "train": (TrainVQVAEConfig, "vqvae2.training:train"),
    "extract": (configs.ExtractConfig, "pipelines.commands.extract:extract"),
    "train-prior": (configs.TrainPriorCommandConfig, "pipelines.commands.train_prior:train_prior"),
    "codes info": (configs.CodesInfoConfig, "pipelines.commands.codes:info"),
    "codes view": (configs.CodesViewConfig, "pipelines.commands.codes:view"),
    "codes verify": (configs.CodesVerifyConfig, "pipelines.commands.codes:verify"),
    "reconstruct": (configs.ReconstructConfig, "pipelines.commands.reconstruct:reconstruct"),
    "inspect": (configs.InspectConfig, "pipelines.commands.inspect:inspect_command"),
    "doctor": (configs.DoctorConfig, "pipelines.commands.doctor:doctor"),
    "sample": (configs.SampleConfig, "pipelines.commands.sample:sample"),
    "evaluate": (configs.EvaluateConfig, "pipelines.commands.evaluate:evaluate"),
    "verify": (configs.VerifyConfig, "pipelines.commands.verify:verify"),
    "score": (configs.ScoreConfig, "pipelines.commands.score:score"),
    "compress": (configs.CompressConfig, "pipelines.commands.compress:compress"),
    "decompress": (configs.DecompressConfig, "pipelines.commands.compress:decompress"),
    "assemble": (configs.AssembleConfig, "pipelines.commands.assemble:assemble"),
    "import-weights": (configs.ImportWeightsConfig, "pipelines.commands.import_weights:command"),
    "import-codes": (configs.ImportCodesConfig, "pipelines.commands.import_codes:import_codes"),
    "completion": (configs.CompletionConfig, "pipelines.commands.completion:completion"),
}
RECIPES = files("pipelines") / "recipes"
PLANNED = ("train", "extract", "train-prior", "run", "demo")  # what `plan` takes in front of it
LONGEST_MESSAGE = 900
NARROWEST = 40  # columns for the help
OTHER_ENDED = re.compile("connection (closed|reset) by peer", re.IGNORECASE)  # gloo's words
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)  # torch's words
# The flag that the words in front of all others belong to.
FIRST = {"verify": "--files", "score": "--data.path", "compress": "--data.path",
         "decompress": "--files"}  # fmt: skip
NAMELESS = {  # a file in what people give without a flag -> the flag
    "model_index.json": "--pipeline", "manifest.json": "--codes", "config.json": "--vqvae",
    "": "--data.path"}  # fmt: skip
COMMON_FLAGS = ("--config", "--quiet", "--verbose", "--help")
OVERVIEW = """usage: vqvae2 SUBCOMMAND [--config RECIPE] [--quiet | --verbose] [--flags]

Train a VQ-VAE-2 on your own images and sample from it: train, extract, train-prior for each level,
sample.

{commands}

RECIPE is a YAML file, or one of {recipes}; flags override it.
vqvae2 SUBCOMMAND --help explains every flag. vqvae2 --version shows the version.
On several processes: accelerate launch -m pipelines.cli SUBCOMMAND --flags"""
SYNONYMS = {"epochs": "num-steps", "steps": "num-steps", "resolution": "size", "data": "path",
            "output": "output-dir", "out": "output-dir", "input": "path", "images": "path",
            "workers": "num-workers", "resume": "output-dir"}  # fmt: skip
COMMON_HELP = """{description}

--config RECIPE takes the defaults from a recipe: a YAML file, or {recipes}.
--quiet shows warnings only, --verbose every message."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, 1 if checks failed, 2 for a user's mistake (with
    one sentence on stderr), or 128 + n after signal n."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        message, code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if message:
            message = " ".join(message.splitlines())
            if len(message) > LONGEST_MESSAGE:
                message = f"{message[: LONGEST_MESSAGE - 200]} ... {message[-200:]}"
            print(f"vqvae2: {message}", file=sys.stderr)
        print(end="", flush=True)
        return code
    except OSError as error:  # the output went nowhere: `head` has seen enough, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2
    finally:
        _leave_process_group()


def _run(arguments: Sequence[str]) -> tuple[str, int]:
    """Run one command line: in one sentence why it ended early, or "", and the exit code."""
    try:
        # How much is shown, and what needs no subcommand.
        quiet, verbose = "--quiet" in arguments, "--verbose" in arguments
        show_messages(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        arguments = [word for word in arguments if word not in ("--quiet", "--verbose")]
        if not arguments or arguments[0] in ("-h", "--help", "--version"):
            print(f"vqvae2 {version('vqvae2')}" if "--version" in arguments else overview())
            return "", 0

        # A subcommand, and in one sentence why it ended early.
        command, flags = split_command(arguments)
        config = expand_paths(parse(command, flags))  # before torch is imported
        code = function_of(command)(config) or 0
        if not code:
            from pipelines.next_steps import show_next

            show_next(command, config, _take_flag(list(flags), "--config")[1])
        print(end="", flush=True)
        return "", code
    except SystemExit:  # after --help
        return "", 0
    except UserError as error:
        return "" if error.told_by_first else f"error: {error}", 2
    except BrokenPipeError:
        raise
    except OSError as error:
        if getattr(error, "told_by_first", False):
            return "", 2
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"error: {what}: check the path, its permissions and the free space.", 2
    except (MemoryError, RuntimeError) as error:
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if OTHER_ENDED.search(str(error)) and not is_alone:
            return "another process of this job has ended: what it says is why.", 2
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        advice = "make the batch, the images or the network smaller"
        return f"error: this machine ran out of memory ({error}): {advice}.", 2
    except Stopped as stopped:
        return str(stopped) if is_first_process() else "", 128 + stopped.signal_number
    except KeyboardInterrupt:
        return "interrupted; run the same command again to continue.", 130


def run_script(command: str | None = None) -> NoReturn:
    """All that a process does: run a subcommand, by default the one that is its first argument."""
    code = main(([command] if command else []) + sys.argv[1:])
    gc.freeze()  # or Python would search torch's objects for garbage before it ends, for 0.4 s
    sys.exit(code)


def split_command(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The subcommand, of one word or two ("codes info"), and its arguments, or a `UserError`."""
    if arguments[0] == "plan":
        words, recipe = _take_flag(list(arguments[1:]), "--config")
        if words[:1] == ["run"]:  # it chooses what to plan, and plans it itself
            own = ["--config", recipe] if recipe else []
            return "run", ["--output-dir", "nowhere", *own, *words[1:], "--dry-run"]
    for number in (1, 2):
        if (command := " ".join(arguments[:number])) in COMMANDS:
            return command, arguments[number:]
    word = arguments[0]
    family = ", ".join(command for command in COMMANDS if command.startswith(f"{word} "))
    if family:
        raise UserError(f"vqvae2 {word} needs a second word: {family} (see vqvae2 --help).")
    near = suggest(word, COMMANDS)
    raise UserError(f"unknown subcommand {shown(word)}; {near} (see vqvae2 --help).")


def function_of(command: str) -> Callable[[Any], int | None]:
    """The function that runs a subcommand and may return an exit code; importing it loads torch."""
    module, name = COMMANDS[command][1].split(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    """The text of `vqvae2 --help`."""
    docs = {name: config_class.__doc__ or "" for name, (config_class, _) in COMMANDS.items()}
    lines = [f"  {name:<14} {doc.splitlines()[0]}" for name, doc in docs.items()]
    return OVERVIEW.format(commands="\n".join(lines), recipes=", ".join(recipe_names()))


def flag_groups(config_class: type, prefix: str = "") -> Iterator[tuple[str, type, list]]:
    """The flags of a subcommand, by dataclass: what their names begin with, the dataclass, and
    those of its fields that have a flag. Preprocessing is `--image.*` wherever it lies."""
    hints = get_type_hints(config_class)
    flags: list[dataclasses.Field] = []
    nested: list[dataclasses.Field] = []
    for field in dataclasses.fields(config_class):
        if not field.metadata.get("recipe_only"):
            (nested if dataclasses.is_dataclass(hints[field.name]) else flags).append(field)
    yield prefix, config_class, flags
    for field in nested:
        is_image = hints[field.name] is PreprocessingConfig
        inner_prefix = "image." if is_image else f"{prefix}{field.name}.".replace("_", "-")
        yield from flag_groups(hints[field.name], inner_prefix)


def flag_names(command: str) -> list[str]:
    """Every flag that a subcommand takes."""
    names = []
    for prefix, config_class, fields in flag_groups(COMMANDS[command][0]):
        hints = get_type_hints(config_class)
        for field in fields:
            for no in ("", "no-") if hints[field.name] is bool else ("",):
                names.append(f"--{prefix}{no}{field.name.replace('_', '-')}")
    return [*names, *COMMON_FLAGS]


def parse(command: str, arguments: Sequence[str]) -> Any:
    """The configuration that a subcommand's arguments ask for: defaults < recipe < flags.
    Raises a `UserError` for an unknown flag, and for a value that is wrong or missing."""
    import tyro

    # Refuse unknown flags with the nearest known one. `plan` takes those of the command behind it.
    config_class: Any = COMMANDS[command][0]
    arguments, recipe = _take_flag(list(arguments), "--config")
    asks_for_help, planned = bool({"-h", "--help"} & {*arguments}), ""
    if command == "plan" and arguments and not arguments[0].startswith("-"):
        planned = arguments.pop(0)
    if command == "plan" and not (asks_for_help or (recipe and not planned)):
        allowed = ", ".join(PLANNED)
        allowed = f"one of {allowed}, before all flags, or left out beside --config RECIPE"
        check(planned in PLANNED, "vqvae2 plan: the command", planned, allowed)
    known = flag_names(command) + (flag_names(planned) if planned in PLANNED else [])
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = suggest_flag(flag, list(dict.fromkeys(known)))
            where = f"vqvae2 {planned or command} --help"
            raise UserError(f"unknown flag {flag:.100}; {near} (see {where}).")
    if arguments and not arguments[0].startswith("-") and command in FIRST:
        first = FIRST[command]
        if any(argument.split("=")[0] == first for argument in arguments):
            what = f"vqvae2 {command}: {shown(arguments[0])} has no flag in front of it"
            raise UserError(f"{what}, but {first} is given too: give all of them there.")
        arguments.insert(0, first)
    elif arguments and not arguments[0].startswith("-"):
        meant = [f for file, f in NAMELESS.items() if Path(arguments[0], file).exists()]
        meant += [*NAMELESS.values(), known[0]]
        unset = (flag for flag in meant if flag in known and flag not in arguments)
        flag = next(unset, known[0])
        what = f"vqvae2 {command}: {shown(arguments[0])} has no flag in front of it"
        raise UserError(f"{what}; did you mean {flag} {shlex.quote(arguments[0]):.100}?")

    # Take the defaults from the recipe. For some commands, the recipe itself is a setting.
    section: dict[str, Any] = {}
    if recipe is not None:
        level, codes = (_take_flag(arguments, flag)[1] or "" for flag in ("--level", "--codes"))
        section = recipe_section(load_recipe(recipe), command, level, codes)
    if issubclass(config_class, configs.PlanConfig | configs.ChosenConfig):
        section = {**section, "recipe": recipe or ""}
    if recipe and issubclass(config_class, configs.ChosenConfig):
        section["data"] = _where_images_are(load_recipe(recipe)) | (section.get("data") or {})
    if command == "plan":
        arguments, words = _split_planned(arguments, recipe)
        section["planned"] = parse(planned, words) if planned and not asks_for_help else None
    default = from_dict(config_class, section, f"recipe {recipe}", missing=tyro.MISSING)

    # Let tyro parse the flags or print the help, and shorten its message about a mistake. In a
    # terminal of a few columns it would not end.
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    _annotate_for_tyro(config_class, asks_for_help)
    lesson = inspect.cleandoc(config_class.__doc__ or "")
    description = COMMON_HELP.format(description=lesson, recipes=", ".join(recipe_names()))
    options: dict[str, Any] = {"prog": f"vqvae2 {command}", "description": description}
    mistake = io.StringIO()
    try:
        with contextlib.redirect_stderr(mistake):
            config = tyro.cli(config_class, args=arguments, default=default, **options)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        sentence = _one_sentence(mistake.getvalue())
        raise UserError(f"vqvae2 {command}: {sentence} See vqvae2 {command} --help.") from None
    return dataclasses.replace(config, planned=section["planned"]) if command == "plan" else config


def _where_images_are(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's training says of that."""
    data = (recipe.get("train") or {}).get("data")
    known = {field.name for field in dataclasses.fields(ImagesConfig)}
    said = data if isinstance(data, dict) else {}  # what else it may be is refused later
    return {key: value for key, value in said.items() if key in known}


def _split_planned(arguments: Sequence[str], recipe: str | None) -> tuple[list[str], list[str]]:
    """The arguments of `plan` itself, and those of the command that it plans: also its recipe, and
    an output folder, which a plan does not need."""
    own: list[str] = []
    part = others = ["--output-dir", "nowhere", *([] if recipe is None else ["--config", recipe])]
    for word in arguments:
        if word.startswith("--"):
            is_own = word.split("=")[0].replace("_", "-") in flag_names("plan")
            part = own if is_own else others
        part.append(word)
    return own, others


@cache
def _annotate_for_tyro(config_class: type, for_help: bool) -> None:
    """Give tyro what `flag_groups` decides. It reads annotations, in which the configurations
    cannot name it themselves: `vqvae2 --help` would wait for its import."""
    from docstring_parser import parse_from_object
    from tyro.conf import Fixed, Suppress, arg

    # A field's docstring without its line breaks, some of which tyro would keep.
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]) if for_help else ():
        for parameter in parse_from_object(base).params:
            texts[parameter.arg_name] = " ".join((parameter.description or "").split())

    # Annotations: no flag, a short prefix, or the text.
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            _annotate_for_tyro(hint, for_help)  # type: ignore[arg-type]
        if field.metadata.get("recipe_only"):
            annotation: Any = Annotated[hint, Fixed, Suppress]
        elif hint is PreprocessingConfig:
            annotation = Annotated[hint, arg(name="image", prefix_name=False)]
        elif dataclasses.is_dataclass(hint) or not texts.get(field.name):
            continue
        else:
            text = texts[field.name]
            described = arg(help=text, help_behavior_hint=partial(_default_hint, text))
            annotation = Annotated[hint, described]
        config_class.__annotations__[field.name] = annotation


def _default_hint(text: str, value: str) -> str:
    """The words for a flag's default behind its text, which may name it itself."""
    says_it = "By default" in text and value in ("", "None")
    return "" if says_it else f"(default: {value or 'none'})"


def suggest_flag(flag: str, known: Sequence[str]) -> str:
    """The known flag that an unknown one means: by what others call it, its initials, its last
    part, or its letters."""
    word = flag.removeprefix("--").lower()
    for name in known:
        last = name.removeprefix("--").rpartition(".")[2]
        initials = "".join(part[0] for part in last.split("-"))
        is_initials = len(word) > 1 and initials == word
        if is_initials or last == SYNONYMS.get(word, word.rpartition(".")[2]):
            return f"did you mean {name!r}?"
    return suggest(flag, known)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if ".yaml" in entry.name)


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name or file: a section of settings for each command. Raises a `UserError` if
    there is none, or if it has an unknown section."""
    is_file, names = name.endswith((".yaml", ".yml")), recipe_names()
    path = Path(os.path.expanduser(name) if is_file else str(RECIPES / f"{name}.yaml"))
    if not (path.exists() if is_file else name in names):
        raise UserError(
            f"there is no recipe {shown(name)}: give a YAML file, or one of {', '.join(names)}."
        )
    recipe = read_yaml(path)
    for key, section in recipe.items():
        if key not in COMMANDS and not re.fullmatch("prior_[0-9]{1,3}", str(key)):
            allowed = "name it after a subcommand, or a level's train-prior prior_0, prior_1, ..."
            raise UserError(f"{path}: unknown section {shown(key)}: {allowed}.")
        fits = section is None or isinstance(section, dict)
        check(fits, f"{path}: {key}", section, "a mapping of settings")
    return recipe


def recipe_section(
    recipe: dict[str, Any], command: str, level: str = "", codes: str = ""
) -> dict[str, Any]:
    """A recipe's settings for a subcommand; those for train-prior may differ by level: `prior_0` is
    the top's. Which is the bottom's, the code dataset says, or if it is not there, the recipe."""
    section = recipe.get(command) or {}
    if command != "train-prior":
        return section
    if level == "bottom":
        level = str(_num_levels(recipe, codes or section.get("codes", "")) - 1)
    return merged(section, recipe.get(f"prior_{0 if level == 'top' else level}") or {})


def _num_levels(recipe: dict[str, Any], codes: str) -> int:
    with contextlib.suppress(UserError, KeyError, TypeError):  # which the command explains
        return len(read_json(Path(os.path.expanduser(codes), "manifest.json"))["grids"])
    model = (recipe.get("train") or {}).get("model")
    strides = model.get("strides") if isinstance(model, dict) else None
    named = [int(name.removeprefix("prior_")) for name in recipe if name.startswith("prior_")]
    return max(len(strides) if isinstance(strides, list) else 2, 1 + max(named, default=0))


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
    """tyro's message about a mistake, without the box around it, its title and its hints."""
    text = " ".join(re.sub(r"[│╭╮╰╯]|─+|-{3,}", " ", box).split())
    text = re.split("(?:Argument|For full) helptext", text)[0].rstrip(". ")
    if text.startswith("Required options"):
        return " and ".join(re.findall(r"(--[a-z.-]+) [A-Z{[]", text)) + " must be given."
    title = r"^[A-Z]\w+ (error|choice|options|argument) (Error parsing [\w.]+: )?"
    return re.sub(title, "", text).replace("Unrecognized options:", "no flag takes") + "."


def _leave_process_group() -> None:
    """Without it, one of several processes may be aborted at exit, after all its work is done."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script()
