"""The configuration reference: every flag, from the dataclasses and the docstrings of fields."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pipelines.cli import COMMANDS, flag_groups

NAMES = {int: "whole number", float: "number", str: "text", bool: "yes or no"}


class Flag(typing.NamedTuple):
    """What the command line takes for one field."""

    name: str
    """With its dashes."""
    type: str
    default: str
    meaning: str
    may_change: bool
    """Whether a continued run may set another value."""


class Group(typing.NamedTuple):
    """The flags of one dataclass."""

    prefix: str
    """What their names begin with, such as "model.quantizer.", or nothing."""
    meaning: str
    flags: list[Flag]
    recipe_only: list[Flag]
    """Settings without a flag, under their names in a recipe."""


def all_commands() -> str:
    """A section per command, in Markdown."""
    lines = [line for command in COMMANDS for line in describe(command)]
    return "\n".join(lines) + "\n"


def describe(command: str) -> Iterator[str]:
    """The lines of a command's section."""
    text, example = help_and_example(COMMANDS[command][0])
    yield from ["", f"## vqvae2 {command}", "", text, ""]
    if example:
        yield from ["```bash", example, "```", ""]
    for group in groups(COMMANDS[command][0]):
        if group.prefix:
            yield from [f"### vqvae2 {command}: {group.prefix}\\*", "", group.meaning, ""]
        for flag in group.flags:
            yield from _describe_flag(flag)
        for flag in group.recipe_only:
            yield from _describe_flag(flag._replace(default=f"{flag.default}, in recipes only"))


def _describe_flag(flag: Flag) -> list[str]:
    arrow = " ↻" if flag.may_change else ""
    title = f"`{flag.name}` *{flag.type}* — {flag.default}{arrow}"
    return [title, f": {_markdown(flag.meaning)}", ""]


def help_and_example(config: type) -> tuple[str, str]:
    """A command's docstring, and the example that it ends with, or nothing."""
    text, _, example = inspect.cleandoc(config.__doc__ or "").partition("Example: ")
    return text.strip(), " ".join(example.replace("\\\n", " ").split())


def groups(config: type) -> Iterator[Group]:
    """The flags of a command's dataclass, then those of the dataclasses in it."""
    for prefix, cls, fields in flag_groups(config):
        flags, recipe_only = [], []
        for field in dataclasses.fields(cls):
            if field in fields:
                flags.append(_flag(cls, field, f"--{prefix}{field.name}".replace("_", "-")))
            elif field.metadata.get("recipe_only") and field.default is not dataclasses.MISSING:
                recipe_only.append(_flag(cls, field, field.name))
        meaning = _markdown(inspect.cleandoc(cls.__doc__ or "")) if prefix else ""
        yield Group(prefix, meaning, flags, recipe_only)


def _flag(config: type, field: dataclasses.Field, name: str) -> Flag:
    hint = typing.get_type_hints(config)[field.name]
    if hint is bool and name.startswith("--"):
        start, dot, end = name.rpartition(".")
        name += f", {start}.no-{end}" if dot else f", --no-{name.removeprefix('--')}"
    return Flag(
        name,
        type_name(hint),
        default_name(field),
        docstrings(config)[field.name],
        bool(field.metadata.get("may_change")),
    )


@cache
def docstrings(config: type) -> dict[str, str]:
    """The docstring below each field, from the class itself or else from those it extends."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)):
                continue
            if isinstance(below.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def type_name(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        *others, last = map(str, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        words = {str: "words", float: "numbers"}.get(arguments[0], "whole numbers")
        number = "one or more" if arguments[-1] is Ellipsis else len(arguments)
        return f"{number} {words}"
    return NAMES[hint]


def default_name(field: dataclasses.Field) -> str:
    """A default as one types it."""
    if field.default is dataclasses.MISSING:
        return "**required**"
    if field.default is None or field.default == ():
        return "not set"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return f"default `{' '.join(map(str, values))}`"


def _markdown(text: str) -> str:
    """Prose as Markdown: characters that would be markup are escaped, flags are set as code."""
    text = re.sub(r"(?<![\w`])(--[a-z][\w.-]*\w)", r"`\1`", text)
    return re.sub(r"(`[^`]*`)|([*_|$<>{}\[\]])", lambda m: m[1] or "\\" + m[2], text)
