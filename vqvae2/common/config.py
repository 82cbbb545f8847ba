"""Configuration as frozen dataclasses: one schema for recipes (YAML), flags, run records and artifacts. Torch-free.

`from_dict` and `to_dict` are strict inverses: an unknown key, a wrong type or a missing value is a `UserError` that names
the key and says what is allowed.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vqvae2.common.errors import UserError

T = TypeVar("T")


def may_change(default: Any = dataclasses.MISSING, *, recipe_only: bool = False) -> Any:
    """A field that may differ when a run is resumed, as it does not change what is computed."""
    return field(default=default, metadata={"may_change": True, "recipe_only": recipe_only})


def recipe_only(default: Any) -> Any:
    """A field that is set in a recipe's YAML and has no flag: few people need it."""
    return field(default=default, metadata={"recipe_only": True})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained: the settings of the one training loop, `vqvae2.common.fit.fit`."""

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
    """Compile the model (torch.compile). Worth it on a GPU; slow to start and little faster on a
    CPU."""
    weight_ema_decay: float = 0.999
    """Decay of the weights' running average, which is what is validated and saved; 0 turns it off.
    It warms up with the steps."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    init_from: str | None = None
    """Fine-tune: start from the weights of this model folder. (To continue a run, repeat its
    command instead.)"""
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
        check(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(
            self.gradient_accumulation_steps >= 1,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            "at least 1",
        )
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "0 (off) or more")
        check(
            0 <= self.weight_ema_decay < 1, "weight_ema_decay", self.weight_ema_decay, "in [0, 1)"
        )
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        check(self.picture_every >= 0, "picture_every", self.picture_every, "0 (off) or more")


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `UserError` that names the key, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise UserError(f"{key} is {value!r}, but must be {allowed}: set it to an allowed value.")


def check_at_least(config: Any, least: float, *keys: str) -> None:
    """`check` that each of these fields of a configuration is at least `least`."""
    for key in keys:
        value = getattr(config, key)
        check(value >= least, key, value, f"at least {least}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries, lists and scalars, ready for JSON or YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, where: str, *, missing: Any = dataclasses.MISSING) -> T:
    """Build the dataclass `cls` from plain data; `where` (a file or a key) begins the error messages.

    Args:
        missing: what to put where a required value is absent; without it an absent value is an error.

    Raises:
        UserError: unknown key, wrong type, missing or impossible value.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} holds {data!r}, but must be a mapping of keys to values.")
    hints = typing.get_type_hints(cls, include_extras=False)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {suggest(str(key), known)}.")
    values: dict[str, Any] = {}
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}: {name}", missing)
        elif dataclasses.is_dataclass(hints[name]) and missing is not dataclasses.MISSING:
            values[name] = from_dict(hints[name], {}, f"{where}: {name}", missing=missing)
        elif required and missing is dataclasses.MISSING:
            raise UserError(f"{where}: the key {name!r} is missing; add it.")
        elif required:
            values[name] = missing
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """'did you mean ...' for a word that is nearly known, else the list of what is."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, missing: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, missing=missing)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (
            a for a in arguments if a is not type(None)
        )  # the only unions here are "X or None"
        return _convert(hint, value, where, missing)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where} is {value!r}, but must be one of {', '.join(map(repr, arguments))}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}, but must be a list.")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{where} has {len(value)} values, but must have {len(arguments)}.")
        return tuple(
            _convert(arguments[0], item, f"{where}[{i}]", missing) for i, item in enumerate(value)
        )
    if (
        hint is float and isinstance(value, int | str) and not isinstance(value, bool)
    ):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is not Any and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise UserError(f"{where} is {value!r}, but must be of type {hint.__name__}.")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is absent, is not YAML, or is not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as YAML ({str(error).splitlines()[0]}): check the file."
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping of keys to values: check the file.")
    return data


def differences(
    cls: type, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The keys (dotted) with old and new value in which two records of the same dataclass differ, but for `may_change` fields."""
    hints = typing.get_type_hints(cls)
    found: list[tuple[str, Any, Any]] = []
    for f in fields(cls):
        before, after = old.get(f.name), new.get(f.name)
        if f.metadata.get("may_change") or before == after:
            continue
        if (
            dataclasses.is_dataclass(hints[f.name])
            and isinstance(before, dict)
            and isinstance(after, dict)
        ):
            found += differences(hints[f.name], before, after, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, before, after))
    return found
