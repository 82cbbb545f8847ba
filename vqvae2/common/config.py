"""Configuration as frozen dataclasses: one schema for recipes, flags, run records and models.

`from_dict` and `to_dict` are strict inverses: an unknown key, a wrong type or a missing value is a
`UserError` that names the key and what is allowed. Torch-free.
"""

import contextlib
import difflib
import json
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vqvae2.common.errors import UserError
from vqvae2.common.files import read_text

T = TypeVar("T")
MOST = 10**9  # of what is counted, and held nowhere: steps
MOST_ROWS = 1 << 20  # that are computed together
MOST_WIDTH = 1 << 16  # features, channels
MOST_LAYERS = 1000
MOST_THREADS = 1024
MOST_CODES = 1 << 24  # K, of a codebook
LONGEST_YAML = 1 << 22  # bytes: a second to read
MOST_YAML, DEEPEST_YAML = 200_000, 50  # values, with what aliases stand for, and their nesting
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_placeholders: list[Any] = []  # stand in for values that are still to be given


class Config:
    """What every configuration is: values given in Python are held to the fields' types, as those
    of a file are. A list becomes a tuple, a path a text, a mapping a dataclass. Types may be bool,
    int, float, str, other configurations, Literal, tuples and unions of these, and Any.

    Raises:
        TypeError: a field is of a type that a configuration cannot hold.
        UserError: a value of another type, or one that the configuration's own checks refuse.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not any(value is placeholder for placeholder in _placeholders):
                object.__setattr__(self, f.name, _convert(hints[f.name], value, f.name, MISSING))


def may_change(default: Any = MISSING, *, recipe_only: bool = False) -> Any:
    """A field that may differ when a run is resumed, as it does not change what is computed."""
    return field(default=default, metadata={"may_change": True, "recipe_only": recipe_only})


def recipe_only(default: Any) -> Any:
    """A field that is set in a recipe's YAML and has no flag: few people need it."""
    return field(default=default, metadata={"recipe_only": True})


def added(default: Any, *, earlier: Any = MISSING, recipe_only: bool = False) -> Any:
    """A model's field that was added later: the value that describes earlier models (by default the
    default) is not written, so that their hashes stay the same, and is meant where none is."""
    earlier = default if earlier is MISSING else earlier
    return field(default=default, metadata={"earlier": earlier, "recipe_only": recipe_only})


def newer(default: Any, *, before: Any) -> Any:
    """A setting of a command that was added later: until then all was as with the value `before`,
    with which `as_begun` continues a run."""
    return field(default=default, metadata={"before": before})


def as_begun(config: T, record: Mapping[str, Any]) -> T:
    """A run's settings, by its record: what was added after the run was begun is as it was then,
    where it is left at its default now."""
    changes: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value, before = getattr(config, f.name), f.metadata.get("before", MISSING)
        if is_dataclass(value) and isinstance(record.get(f.name), Mapping):
            changes[f.name] = as_begun(value, record[f.name])
        elif before is not MISSING and value == f.default:
            changes[f.name] = record.get(f.name, before)
    return replace(config, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """How a model is trained: what the training loop, `vqvae2.common.fit.fit`, needs to know."""

    num_steps: int = may_change(10_000)
    """Optimizer steps. Raise it to continue a finished run."""
    batch_size: int = 64
    """Rows per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Compute each batch in this many pieces, one after the other, to save memory. Codebooks take
    each piece for a batch: it should hold more features than there are codes."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for weights of linear layers and convolutions, which it treats as matrices, and
    AdamW for all else: learns more per step. adamw: AdamW for all, as for any PixelSNAIL."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises to its peak; a cosine then takes it down to zero.
    At most half of the run."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices and convolution kernels only."""
    adam_betas: tuple[float, float] = recipe_only((0.9, 0.99))
    """AdamW's decay rates of the first and second moment."""
    max_grad_norm: float = 1.0
    """Clip gradients to this norm (a discriminator's separately); 0 turns clipping off."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware computes in it, else fp32. fp16 needs CUDA."""
    compile: Literal["auto", True, False] = may_change("auto")
    """Compile the model (torch.compile), which takes a minute or two. auto: a run of more than 20
    minutes tries it on its first steps, and keeps it if it is faster."""
    num_threads: int = 0
    """Threads that compute on a CPU; 0: as PyTorch chooses. Results depend on it in the last bits.
    While other programs keep the CPUs busy, 1 may be fastest."""
    deterministic: bool = may_change(False)
    """On a GPU, sum in a fixed order: the same command gives the same bits again, but slower. (On
    a CPU it always does.)"""
    weight_ema_decay: float = 0.999
    """Decay of the weights' running average, which is what is validated and saved; 0 for none."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    init_from: str | None = None
    """Fine-tune: start from the weights of this model folder. (Not needed to continue a run.)"""
    validate_every: int | None = may_change(None)
    """Steps between validations on held-out data. The output folder holds the best weights. By
    default a fifth of the run, and at most 500."""
    patience: int = may_change(0)
    """Stop when the held-out loss has not fallen for this many validations; 0: never."""
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
        super().__post_init__()
        check_between(self, 1, MOST, "num_steps", "checkpoint_every", "log_every")
        check_between(self, 1, MOST, "keep_checkpoints")
        check_between(self, 0, MOST, "warmup_steps", "picture_every", "patience")
        if self.validate_every is not None:
            check_between(self, 1, MOST, "validate_every")
        check_between(self, 0, MOST_THREADS, "num_threads")
        check_between(self, 1, MOST_ROWS, "batch_size", "gradient_accumulation_steps")
        check_between(self, 0, 1e6, "weight_decay", "max_grad_norm")
        check(0 < self.learning_rate <= 1e3, "learning_rate", self.learning_rate, "in (0, 1000]")
        check_share(self, "weight_ema_decay", "adam_betas")
        check_between(self, 0, 2**32 - 1, "seed")

    @property
    def validation_interval(self) -> int:
        """Steps between validations."""
        return self.validate_every or max(1, min(500, self.num_steps // 5))

    @property
    def shortened_warmup(self) -> int:
        """Steps of warm-up that a short run makes."""
        return min(self.warmup_steps, self.num_steps // 2)


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Unless the condition holds, raise a `UserError`: the key, its value and what is allowed."""
    if not condition:
        raise UserError(f"{key} is {shown(value)}, but must be {allowed}.")


def check_whole(key: str, value: Any, least: int) -> None:
    """`check` that this is a whole number (Python's or NumPy's) from `least` on."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    check(is_whole and value >= least, key, value, f"a whole number, {least} or more")


def check_between(config: Any, least: float, most: float, *keys: str) -> None:
    """`check` that these fields of a configuration (each number of a tuple) lie in this range."""
    for key in keys:
        value = getattr(config, key)
        for number in value if isinstance(value, tuple) else (value,):
            check(number >= least, key, value, f"at least {least}")
            check(number <= most, key, value, f"at most {most:,}")


def check_share(config: Any, *keys: str) -> None:
    """`check` that these fields of a configuration (each number of a tuple) lie in [0, 1)."""
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        check(all(0 <= number < 1 for number in numbers), key, value, "at least 0 and below 1")


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        """A number, unless it is so long that Python refuses to write it."""
        is_short = x.bit_length() < 1000
        return super().repr_int(x, level) if is_short else f"a number of {x.bit_length()} bits"


shown = _Shown().repr
"""A value as Python writes it, of limited length: for messages about what others wrote."""


NO_PATHS = {"labels", "attributes"}  # fields of names, which may begin with a ~


def expand_paths(config: T, prefix: str = "") -> T:
    """A configuration with `~` expanded wherever a path begins with it; raises as `expand_path`."""
    changed: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value, key = getattr(config, f.name), prefix + f.name
        if f.name in NO_PATHS:
            continue
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
    return json.loads(json.dumps(config, default=_written_fields))


def _written_fields(config: Any) -> dict[str, Any]:
    written = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.metadata.get("earlier", MISSING):
            written[f.name] = value
    return written


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
            raise UserError(f"{where}: unknown key {shown(key)} ({suggest(key, known)}).")

    # Every field takes its value from the data, from its default, or from `missing`.
    if missing is not MISSING and not any(missing is known for known in _placeholders):
        _placeholders.append(missing)
    values: dict[str, Any] = {}
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if name in data or (is_dataclass(hints[name]) and missing is not MISSING):
            given = data.get(name, {})
            values[name] = _convert(hints[name], given, f"{where}: {name}", missing)
        elif "earlier" in f.metadata:
            values[name] = f.metadata["earlier"]
        elif required and missing is MISSING:
            raise UserError(f"{where}: the key {name!r} is missing; add it.")
        elif required:
            values[name] = missing

    # What the dataclass itself refuses is reported with its place.
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def merged(chosen: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, of which those that are given win."""
    result = dict(chosen)
    for key, value in given.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def suggest(word: Any, known: Collection[str]) -> str:
    """'did you mean ...' for a near miss of a known word, else the nearest of the known words."""
    word = word[:100] if isinstance(word, str) else ""
    if near := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {near[0]!r}?"
    nearest = difflib.get_close_matches(word, known, n=5, cutoff=0)
    return f"known are {', '.join(nearest)}{', ...' * (len(known) > 5)}"


def _convert(hint: Any, value: Any, where: str, missing: Any) -> Any:
    """A plain value as the hint says: a dataclass, X | None, Literal, tuple, or scalar."""
    # Types made of others.
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_dict(hint, value, where, missing=missing)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (a for a in arguments if a is not type(None))
        for other in others:  # the first that it can be
            with contextlib.suppress(UserError):
                return _convert(other, value, where, missing)
        return _convert(last, value, where, missing)
    if origin is Literal:
        same = [a for a in arguments if a == value and type(a) is type(value)]  # 1 is not True
        check(bool(same), where, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        example = f", such as [{shown(value)}]" if isinstance(value, int | float | str) else ""
        check(isinstance(value, list | tuple), where, value, f"a list{example}")
        hints = arguments if arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(value) != len(hints):
            raise UserError(f"{where} has {len(value)} values, but must have {len(hints)}.")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(item, v, f"{where}[{i}]", missing) for i, (item, v) in pairs)
    if hint not in (Any, bool, int, float, str):
        raise TypeError(f"{where} is declared as {hint}, which no configuration can hold")

    # Scalars. YAML reads 1e-4 as text; a bool is no number, though Python counts it as an int.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, numbers.Real | str) and not is_bool:
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if hint is int and isinstance(value, numbers.Integral) and not is_bool:  # NumPy's, too
        value = int(value)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hint is not Any:
        fits = isinstance(value, hint) and not (hint is int and is_bool)
        check(fits, where, value, f"of type {hint.__name__}")
    if hint is float:
        check(math.isfinite(value), where, value, "a finite number")
    if hint is int:
        check(abs(value) < 2**63, where, value, "of at most 63 bits")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `UserError` if it is absent, broken or no mapping."""
    try:
        text = read_text(path, LONGEST_YAML)
        _refuse_bombs(text)
        data = yaml.load(text, YAML_LOADER)  # a safe loader
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:  # a constructor's is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason:.300}): check the file.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping of keys to values: check the file.")
    return data


def _refuse_bombs(text: str) -> None:
    """Raise a YAMLError for what would take all memory or all of the stack once it is built."""
    sizes: dict[str, int] = {}  # values in what an anchor names
    open_nodes: list[list[Any]] = [[None, 0]]  # anchor and size of each collection around
    for event in yaml.parse(text, YAML_LOADER):
        size, anchor = 0, None
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor:.50} stands for nothing before it")
            size = sizes[event.anchor]
        if anchor is not None:
            sizes[anchor] = size
        open_nodes[-1][1] += size
        if open_nodes[-1][1] > MOST_YAML or len(open_nodes) > DEEPEST_YAML:
            most = f"{MOST_YAML:,} values, or {DEEPEST_YAML} levels of them"
            raise yaml.YAMLError(f"it holds more than {most}")


def differences(
    cls: type, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Where two records of a dataclass differ: (dotted key, old, new), but for `may_change`."""
    hints = typing.get_type_hints(cls)
    changed: list[tuple[str, Any, Any]] = []
    for f in fields(cls):
        default = f.metadata.get("earlier", MISSING)
        if f.name not in old and default is MISSING:  # the record is older than the field
            continue
        before, after = old.get(f.name, default), new.get(f.name, default)
        if is_dataclass(hints[f.name]) and isinstance(before, dict) and isinstance(after, dict):
            changed += differences(hints[f.name], before, after, f"{prefix}{f.name}.")
        elif before != after and not f.metadata.get("may_change"):
            changed.append((prefix + f.name, before, after))
    return changed
