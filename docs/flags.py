"""The configuration reference: every flag of every command, from the dataclasses and the docstrings below their fields."""

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

from pipelines.cli import COMMANDS

NAMES = {int: "whole number", float: "number", str: "text", bool: "yes or no"}


class Flag(typing.NamedTuple):
    """What the command line takes for one field."""

    name: str
    """With its dashes; of a value that stands alone its name in capitals."""
    type: str
    default: str
    meaning: str
    may_change: bool
    """Whether a run that continues may set it anew."""


class Group(typing.NamedTuple):
    """The flags of one dataclass."""

    prefix: str
    """What their names begin with: "model.quantizer." or nothing."""
    meaning: str
    flags: list[Flag]


def all_commands() -> str:
    """A section per command, in Markdown."""
    return "\n".join(line for command in COMMANDS for line in describe(command)) + "\n"


def describe(command: str) -> Iterator[str]:
    """The section of one command."""
    lesson = inspect.cleandoc(COMMANDS[command][0].__doc__ or "")
    text, _, example = lesson.partition("Example: ")
    yield from ["", f"## vqvae2 {command}", "", text.strip(), ""]
    if example:
        yield from ["```bash", example.strip(), "```", ""]
    for group in groups(COMMANDS[command][0]):
        if group.prefix:
            yield from [
                f"### vqvae2 {command}: {group.prefix}*".replace("*", "\\*"),
                "",
                group.meaning,
                "",
            ]
        for flag in group.flags:
            kind = "" if flag.type in ("flag", "") else f" *{flag.type}*"
            yield from [
                f"`{flag.name}`{kind} — {flag.default}{' ↻' if flag.may_change else ''}",
                f": {_markdown(flag.meaning)}",
                "",
            ]


def groups(config: type, prefix: str = "", meaning: str = "") -> Iterator[Group]:
    """The flags of a command's dataclass, then those of the dataclasses in it."""
    nested, flags = [], []
    hints, plain = typing.get_type_hints(config, include_extras=True), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(plain[field.name]):
            nested.append((plain[field.name], f"{prefix}{field.name.replace('_', '-')}."))
            continue
        positional = hints[field.name] != plain[field.name]
        name = field.name.upper() if positional else f"--{prefix}{field.name.replace('_', '-')}"
        if plain[field.name] is bool:
            name += f", --{prefix}no-{field.name.replace('_', '-')}"
        said = docstrings(config)[field.name]
        flags.append(
            Flag(
                name,
                type_name(plain[field.name]),
                default_name(field),
                said,
                bool(field.metadata.get("may_change")),
            )
        )
    yield Group(prefix, meaning, flags)
    for inner, name in nested:
        yield from groups(inner, name, _markdown(inspect.cleandoc(inner.__doc__ or "")))


@cache
def docstrings(config: type) -> dict[str, str]:
    """What stands below each field, in the class or, where it says nothing, in those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def type_name(hint: Any) -> str:
    """A type as one says it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return (
            ", ".join(map(str, arguments[:-1])) + f" or {arguments[-1]}"
            if len(arguments) > 1
            else str(arguments[0])
        )
    if origin is tuple:
        kind = (
            "words"
            if arguments[0] is str
            else "numbers"
            if arguments[0] is float
            else "whole numbers"
        )
        return f"one or more {kind}" if arguments[-1] is Ellipsis else f"{len(arguments)} {kind}"
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
    """Prose as Markdown: characters that would be markup stand for themselves, and flags are set as code."""
    text = re.sub(r"(?<![\w`])(--[a-z][\w.-]*\w)", r"`\1`", text)
    return re.sub(r"(`[^`]*`)|([*_|$<>{}\[\]])", lambda m: m[1] or "\\" + m[2], text)
