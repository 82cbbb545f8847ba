"""Configuration as frozen dataclasses: one schema for recipes, flags, run records and models.

`from_dict` and `to_dict` are strict inverses: an unknown key, a wrong type or a missing value is a
`UserError` that names the key and what is allowed. Torch-free.
"""

import contextlib
import difflib
import json
import os
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vqvae2.common.errors import UserError

T = TypeVar("T")


def may_change(default: Any = MISSING, *, recipe_only: bool = False) -> Any:
    """A field that may differ when a run is resumed, as it does not change what is computed."""
    return field(default=default, metadata={"may_change": True, "recipe_only": recipe_only})


def recipe_only(default: Any) -> Any:
    """A field that is set in a recipe's YAML and has no flag: few people need it."""
    return field(default=default, metadata={"recipe_only": True})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained: what the training loop, `vqvae2.common.fit.fit`, needs to know."""

    num_steps: int = may_change(10_000)
    """Optimizer steps. Raise it to continue a finished run."""
    batch_size: int = 64
    """Rows per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Compute each batch in this many pieces, one after the other, to save memory."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises to its peak; a cosine then takes it down to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices and convolution kernels only."""
    adam_betas: tuple[float, float] = recipe_only((0.9, 0.99))
    """AdamW's decay rates of the first and second moment."""
    max_grad_norm: float = 1.0
    """Clip gradients to this norm (a discriminator's separately); 0 turns clipping off."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware computes in it, else fp32. fp16 needs CUDA."""
    compile: bool = may_change(False)
    """Compile the model (torch.compile): slow to start, and worth it on a GPU alone."""
    weight_ema_decay: float = 0.999
    """Decay of the weights' running average, which is what is validated and saved; 0 for none."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    init_from: str | None = None
    """Fine-tune: start from the weights of this model folder. (A run continues by itself.)"""
    validate_every: int = 500
    """Steps between validations on held-out data. The output folder holds the best weights."""
    checkpoint_every: int = 500
    """Steps between saved training states, from which a killed run continues."""
    keep_checkpoints: int = may_change(2, recipe_only=True)
    """How many of the latest training states are kept."""
    picture_every: int = may_change(500)
    """Steps between pictures in images/; 0 for none."""
    log_every: int = may_change(20)
    """Steps between lines of metrics.jsonl."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = may_change(None)
    """Also log to this tracker, which must be installed."""

    def __post_init__(self) -> None:
        positive = ("num_steps", "batch_size", "gradient_accumulation_steps", "validate_every")
        check_at_least(self, 1, *positive, "checkpoint_every", "keep_checkpoints", "log_every")
        check_at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "picture_every")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        decay = self.weight_ema_decay
        check(0 <= decay < 1, "weight_ema_decay", decay, "at least 0 and below 1")
        check(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Unless the condition holds, raise a `UserError`: the key, its value and what is allowed."""
    if not condition:
        raise UserError(f"{key} is {value!r}, but must be {allowed}.")


def check_at_least(config: Any, least: float, *keys: str) -> None:
    """`check` that each of these fields of a configuration is at least `least`."""
    for key in keys:
        value = getattr(config, key)
        check(value >= least, key, value, f"at least {least}")


def expand_paths(config: T, prefix: str = "") -> T:
    """A configuration with `~` expanded wherever a text begins with it; raises as `expand_path`."""
    changed: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value, key = getattr(config, f.name), prefix + f.name
        if is_dataclass(value):
            changed[f.name] = expand_paths(value, f"{key}.")
        elif isinstance(value, str) and value != f.default:
            changed[f.name] = expand_path(value, key)
        elif isinstance(value, tuple):
            texts = [expand_path(item, key) if isinstance(item, str) else item for item in value]
            changed[f.name] = tuple(texts)
    return replace(config, **changed)  # type: ignore[type-var]


def expand_path(path: str, key: str) -> str:
    """A path with `~` expanded; a `UserError` if it is empty, or names no user's home folder."""
    check(path != "", key, path, "a path or a name ('.' is the current folder)")
    check("\0" not in path, key, path, "free of zero bytes")
    expanded = os.path.expanduser(path)
    check(expanded[:1] != "~", key, path, "in the home folder of a user who exists")
    return expanded


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries, lists and scalars, ready for JSON or YAML."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(cls: type[T], data: Any, where: str, *, missing: Any = MISSING) -> T:
    """Build the dataclass `cls` from plain data; `where` (a file or a key) begins error messages.

    `missing` stands in for absent required values; without it they are an error.

    Raises:
        UserError: unknown key, wrong type, missing or impossible value.
    """
    # Every key must be a field.
    check(isinstance(data, Mapping), where, data, "a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {suggest(str(key), known)}.")

    # Every field takes its value from the data, from its default, or from `missing`.
    values: dict[str, Any] = {}
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if name in data or (is_dataclass(hints[name]) and missing is not MISSING):
            given = data.get(name, {})
            values[name] = _convert(hints[name], given, f"{where}: {name}", missing)
        elif required and missing is MISSING:
            raise UserError(f"{where}: the key {name!r} is missing; add it.")
        elif required:
            values[name] = missing

    # What the dataclass itself refuses is reported with its place.
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def suggest(word: str, known: Collection[str]) -> str:
    """'did you mean ...' for a near miss of a known word, else the list of known words."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, missing: Any) -> Any:
    """A plain value as the hint says: a dataclass, X | None, Literal, tuple, or scalar."""
    # Types made of others.
    if is_dataclass(hint):
        return from_dict(hint, value, where, missing=missing)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _convert(hint, value, where, missing)
    if origin is Literal:
        check(value in arguments, where, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), where, value, "a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{where} has {len(value)} values, but must have {len(arguments)}.")
        item = arguments[0]
        return tuple(_convert(item, v, f"{where}[{i}]", missing) for i, v in enumerate(value))

    # Scalars. YAML reads 1e-4 as text; a bool is no number, though Python counts it as an int.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int | str) and not is_bool:
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is not Any:
        fits = isinstance(value, hint) and not (hint is int and is_bool)
        check(fits, where, value, f"of type {hint.__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `UserError` if it is absent, broken or no mapping."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as YAML ({reason}): check the file.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping of keys to values: check the file.")
    return data


def differences(
    cls: type, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Where two records of a dataclass differ: (dotted key, old, new), but for `may_change`."""
    hints = typing.get_type_hints(cls)
    changed: list[tuple[str, Any, Any]] = []
    for f in fields(cls):
        before, after = old.get(f.name), new.get(f.name)
        if is_dataclass(hints[f.name]) and isinstance(before, dict) and isinstance(after, dict):
            changed += differences(hints[f.name], before, after, f"{prefix}{f.name}.")
        elif before != after and not f.metadata.get("may_change"):
            changed.append((prefix + f.name, before, after))
    return changed
