"""Mistaken command lines: every flag with wrong values, recipes of wrong kinds, damaged files.

Each must end with the right exit code and one sentence: no traceback, no hang, nothing in silence.
`python -m benchmarks.mistakes --trials 500` makes a small run in a temporary folder, tries so many
command lines on copies of it, each in a forked process with a limit on time and memory, prints the
table "promise, trials, failures" and lists the failures. A seed gives the same command lines again.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from pipelines.cli import COMMANDS, flag_groups, function_of, main
from prior.manifest import Manifest
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError

SECONDS, MEMORY = 60, 12 << 30  # of a trial, and over what is loaded when it starts
LONGEST = 1000  # letters of a sentence
ANY = frozenset({0, 1, 2})
FREE = {"preprocessing", "versions", "trainings", "command_line", "source"}  # anything may be there
NO_TEXT = os.fsdecode(b"caf\xe9.png")  # a file name in Latin-1


@dataclass(frozen=True)
class Trial:
    """A command line on a copy of the run ({x} in its words), which `prepare` damages first."""

    promise: str
    name: str
    words: tuple[str, ...]
    codes: frozenset[int] = frozenset({2})
    prepare: Callable[[Path], object] = lambda x: None


# What a trial needs


def make_run(x: Path) -> None:
    """A small run of every stage, and `make_inputs`."""
    rng = np.random.default_rng(0)
    for i in range(36):
        path = x / "photos" / ("bag", "coat", "dress")[i % 3] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path)
    tiny, images = ("--config", "tiny"), ("--data.path", f"{x}/photos")
    run("train", *tiny, *images, "--output-dir", x / "vqvae")
    run("extract", "--vqvae", x / "vqvae", *images, "--output-dir", x / "codes")
    for level in (0, 1):
        prior = ("--level", level, "--output-dir", x / f"prior_{level}")
        run("train-prior", *tiny, "--codes", x / "codes", *prior)
    parts = ("--vqvae", x / "vqvae", "--priors", x / "prior_0", x / "prior_1")
    run("assemble", *parts, "--output-dir", x / "pipeline")
    make_inputs(x)


def make_inputs(x: Path) -> None:
    """Beside photos/ and pipeline/ of a run: other kinds of inputs, and what is no file."""
    # Lists and tables of the pictures, and arrays.
    files = sorted((x / "photos").rglob("*.png"))
    rows = [(str(file.relative_to(x)), file.parent.name) for file in files]
    (x / "list.txt").write_text("".join(f"{path}\n" for path, _ in rows))
    (x / "list.csv").write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in rows))
    lines = [json.dumps({"path": path, "label": label}) for path, label in rows]
    (x / "list.jsonl").write_text("\n".join(lines))
    table = {"image": [file.read_bytes() for file in files], "label": [row[1] for row in rows]}
    pq.write_table(pa.table(table), x / "table.parquet")
    np.save(x / "array.npy", np.zeros((36, 16, 16), np.uint8))
    np.savez(x / "array.npz", images=np.zeros((36, 16, 16), np.uint8), labels=np.zeros(36, int))

    # Folders that commands write.
    image = ("--image.size", 16, "--image.channels", 1)
    run("prepare", "--data.path", x / "photos", *image, "--output-dir", x / "ready")
    run("sample", "--pipeline", x / "pipeline", "--num-images", 2, "--output-dir", x / "samples")

    pack = ("compress", "--pipeline", x / "pipeline", "--data.path", x / "table.parquet")
    run(*pack, "--output-dir", x / "packed")

    # Names that are no files.
    os.mkfifo(x / "pipe.png")
    os.mkfifo(x / "pipe.yaml")
    (x / "loop.yaml").symlink_to(x / "loop.yaml")
    (x / "nowhere.yaml").symlink_to(x / "missing")


def run(*words: object) -> None:
    """A command that must succeed."""
    code = main(["--quiet", *map(str, words)])
    if code != 0:
        raise SystemExit(f"{words} ended with {code}")


BASES = {  # a right command line for each command
    "demo": "demo --output-dir {x}/out",
    "run": "run --config tiny --data.path {x}/photos --budget 1s --output-dir {x}/out",
    "compare": "compare --config tiny --data.path {x}/photos --minutes 1 --output-dir {x}/out",
    "plan": "plan --config tiny",
    "prepare": "prepare --data.path {x}/photos --image.size 16 --output-dir {x}/out",
    "train": "train --config tiny --data.path {x}/photos --output-dir {x}/out",
    "extract": "extract --vqvae {x}/vqvae --data.path {x}/photos --output-dir {x}/out",
    "train-prior": "train-prior --config tiny --codes {x}/codes --level 0 --output-dir {x}/out",
    "codes info": "codes info --codes {x}/codes",
    "codes view": "codes view --codes {x}/codes --vqvae {x}/vqvae --rows 0 --output-dir {x}/out",
    "codes verify": "codes verify --codes {x}/codes",
    "reconstruct": "reconstruct --vqvae {x}/vqvae --data.path {x}/photos --num-images 2 "
    "--output-dir {x}/out",
    "inspect": "inspect --vqvae {x}/vqvae --data.path {x}/photos --output-dir {x}/out",
    "doctor": "doctor --pipeline {x}/pipeline",
    "sample": "sample --pipeline {x}/pipeline --num-images 2 --output-dir {x}/out",
    "evaluate": "evaluate --vqvae {x}/vqvae --data.path {x}/photos --output-dir {x}/out",
    "verify": "verify --files {x}/samples/images/000000.png --pipeline {x}/pipeline",
    "score": "score --pipeline {x}/pipeline --data.path {x}/photos --output-dir {x}/out",
    "compress": "compress --data.path {x}/photos --pipeline {x}/pipeline --output-dir {x}/out",
    "decompress": "decompress --files {x}/packed/images.vq2 --pipeline {x}/pipeline "
    "--output-dir {x}/out",
    "assemble": "assemble --vqvae {x}/vqvae --priors {x}/prior_0 {x}/prior_1 --output-dir {x}/out",
    "import-weights": "import-weights --checkpoint {x}/table.parquet --output-dir {x}/out",
    "import-codes": "import-codes --lmdb {x}/table.parquet --vqvae {x}/vqvae --output-dir {x}/out",
    "completion": "completion",
}


# Flags


def flag_trials() -> Iterator[Trial]:
    """Every flag of every command with values of wrong kinds."""
    for command, (config_class, _) in COMMANDS.items():
        for prefix, inner, flags in flag_groups(config_class):
            hints = get_type_hints(inner)
            for field in flags:
                flag = f"--{prefix}{field.name.replace('_', '-')}"
                for values, codes in wrong_values(hints[field.name], field.name):
                    codes = ANY if values == (field.default,) else codes  # noqa: PLW2901
                    base = _without(BASES[command].split(), flag)
                    if command in ("demo", "compare") and codes == ANY:
                        continue  # it would run for minutes
                    name = f"{command} {flag} {' '.join(values)!r:.60}"
                    yield Trial("wrong flags", name, (*base, flag, *values), codes)
        yield Trial("wrong flags", f"{command} --nonsense", (*BASES[command].split(), "--nonsense"))


def _without(words: list[str], flag: str) -> list[str]:
    """A command line without a flag and its values."""
    if flag not in words:
        return words
    start = end = words.index(flag)
    while end + 1 < len(words) and not words[end + 1].startswith("--"):
        end += 1
    return words[:start] + words[end + 1 :]


def wrong_values(hint: Any, name: str) -> Iterator[tuple[tuple[str, ...], frozenset[int]]]:
    """The words after a flag of this type, and the exit codes that are right."""
    wrong, arguments = frozenset({2}), get_args(hint)
    if get_origin(hint) is Literal or (arguments and get_origin(arguments[0]) is Literal):
        kinds: set[Any] = {Literal}
    elif get_origin(hint) is tuple:
        kinds = {arguments[0], tuple}
    else:
        kinds = {kind for kind in arguments or (hint,) if kind is not type(None)}
    if bool in kinds:
        yield ("3",), wrong
        return
    if kinds & {int, float}:
        for value in ("many", "nan", "inf", "-inf", "1e400", "", "[1, 2]", "x" * 100_000):
            yield (value,), wrong
        yield (str(2**70),), wrong
        yield ("9" * 5000,), wrong if name != "value_range" else ANY
        yield (str(10**13),), wrong if int in kinds and name != "seed" else ANY
        yield ("-1",), wrong if name != "value_range" else ANY
        if tuple not in kinds:
            yield ("1", "2"), wrong
        if int in kinds:
            yield ("1.5",), wrong
    elif Literal in kinds:
        for value in ("nonsense", "", "3", "x" * 100_000, NO_TEXT):
            yield (value,), wrong
    else:
        idle = name in ("image_column", "label_column", "weights_file", "codes_cache")
        sure = ANY if idle or name == "output_dir" else wrong  # not read here, or to be made
        yield ("",), wrong
        yield ("x" * 100_000,), ANY if idle else wrong
        for value in ("{x}/pipe.png", "{x}/loop.yaml", "{x}/list.csv/inside", "/dev/full"):
            yield (value,), ANY if idle else wrong
        for value in ("{x}/nowhere.yaml", "~nosuchuser/x", "{x}/" + NO_TEXT, "{{0..99}}" * 6):
            yield (value,), sure
        yield ("{x}/array.npy",), ANY if name in ("path", "validation_path") else sure
        yield ("{x}/photos/bag",), ANY if name in ("path", "validation_path") else sure


# Recipes

BROKEN_YAML = {
    "a date that is none": "train: {num_steps: 2001-99-99}",
    "a number that is none": "train: {num_steps: !!int abc}",
    "code": "train: !!python/object/apply:os.system ['echo gotcha']",
    "brackets": "train: " + "[" * 20_000,
    "closed brackets": "train: " + "[" * 5_000 + "]" * 5_000,
    "braces": "train: " + "{a: " * 20_000,
    "indentation": "".join(" " * i + "a:\n" for i in range(2_000)),
    "bomb": "a: &a0 [x, x, x]\n"
    + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(14)),
    "merged bomb": "a: &a0 {x: 1}\n"
    + "".join(f"b{i}: &a{i + 1}\n  <<: [*a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(14)),
    "bomb in a section": "train: {data: {path: &a [x, x]}, model: {strides: &b [*a, *a]}}",
    "itself": "train: &t\n  model: *t\n",
    "an alias of nothing": "train: *t",
    "numbers as sections": "3: {}\n",
    "lists as sections": "[1, 2]: {}\n",
    "no sections": "null: {}\n",
    "a list": "[1, 2]",
    "a text": "text",
    "a number": "3",
    "nothing": "",
    "binary": "train: {num_steps: !!binary aGFsbG8=}",
    "a set": "train: !!set {a, b}",
    "a long text": "train: {mixed_precision: " + "x" * (32 << 20) + "}",
    "a long number": "train: {num_steps: " + "9" * 10_000 + "}",
    "a long hexadecimal number": "train: {num_steps: 0x" + "f" * 100_000 + "}",
    "sexagesimal": "train: {learning_rate: 190:20:30:10000000000}",
    "tabs": "train:\n\tnum_steps: 3",
    "twice": "train: {num_steps: }\ntrain: 3",
    "two documents": "train: {}\n---\ntrain: {}",
    "no such version": "%YAML 9.9\n---\ntrain: {}",
    "adam_betas": "train: {adam_betas: [1.5, 2]}",
    "level": "prior_99999999999999999999: {}",
    "a section of its own": "prior_x: {}",
    "an unfinished text": 'train: {output_dir: "abc',
    "surrogates": 'train: {data: {path: "\\ud800"}}',
}
WRONG_KINDS = (None, 3, -1, 10**30, 1.5, float("nan"), float("inf"), True, "text", "", [], [[1]],
               {"a": 1}, [None], ["x"] * 50, "x" * 100_000)  # fmt: skip


def recipe_trials() -> Iterator[Trial]:
    """Recipes that are no YAML, or too much of it, or of wrong kinds."""
    use = ("train", "--config", "{x}/r.yaml", "--data.path", "{x}/photos", "--output-dir")
    words = (*use, "{x}/out")
    for name, text in BROKEN_YAML.items():
        yield Trial("wrong recipes", name, words, prepare=_writing("r.yaml", text.encode()))
    contents = {"Latin-1": "train: {data: {path: café}}".encode("latin-1"), "zeros": b"\0" * 1000}
    contents |= {"UTF-16": "train: {num_steps: a}".encode("utf-16"), "bytes": bytes(range(256))}
    for name, content in contents.items():
        yield Trial("wrong recipes", name, words, prepare=_writing("r.yaml", content))
    for place in ("pipe.yaml", "loop.yaml", "nowhere.yaml", "photos", "list.csv", "none.yaml", ""):
        name = f"--config {place}"
        yield Trial("wrong recipes", name, ("plan", "--config", f"{{x}}/{place}"))
        yield Trial("wrong recipes", name, (*use[:2], f"{{x}}/{place}", *use[3:], "{x}/out"))

    # Every setting of another kind.
    for command, (config_class, _) in COMMANDS.items():
        for value in WRONG_KINDS[1:]:
            if not isinstance(value, dict):
                yield _recipe(command, (), value)
        for path, hint in settings(config_class):
            for value in WRONG_KINDS:
                if not _may_be(hint, value) and path not in (("recipe",), ("planned",)):
                    yield _recipe(command, path, value)


def settings(config_class: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Where every setting lies in a configuration, and its type."""
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        yield (*path, field.name), hint
        if is_dataclass(hint):
            yield from settings(hint, (*path, field.name))  # type: ignore[arg-type]


def _may_be(hint: Any, value: Any) -> bool:
    """Whether a value of this kind may be right."""
    kinds = {*get_args(hint), hint}
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    if isinstance(value, str):
        return str in kinds or (get_origin(hint) is tuple and value == "")
    if isinstance(value, float):
        return float in kinds and value == 1.5
    if isinstance(value, int):
        return bool(kinds & {int, float}) and value == 3
    if isinstance(value, dict):
        return False
    return get_origin(hint) is tuple and (not value or str in kinds)


def _recipe(command: str, path: Sequence[str], value: Any) -> Trial:
    data = value
    for key in reversed((command, *path)):
        data = {key: data}
    text = json.dumps(data).replace("NaN", ".nan").replace("Infinity", ".inf")
    words = (*BASES[command].replace("--config tiny", "").split(), "--config", "{x}/r.yaml")
    name = f"recipe {text:.100}"
    return Trial("wrong recipes", name, words, prepare=_writing("r.yaml", text.encode()))


# Files


def file_trials(x: Path, rng: random.Random) -> Iterator[Trial]:
    """Every file that commands read, damaged."""
    uses = {
        "vqvae/config.json": ("reconstruct", "extract", "assemble"),
        "vqvae/model.safetensors": ("reconstruct", "assemble"),
        "vqvae/train_config.yaml": ("train_on", "inspect", "assemble", "extract"),
        "vqvae/metrics.jsonl": ("train_on",),
        "prior_0/config.json": ("assemble",),
        "prior_1/model.safetensors": ("assemble",),
        "prior_1/train_config.yaml": ("assemble",),
        "pipeline/model_index.json": ("sample", "doctor"),
        "pipeline/prior_0/config.json": ("sample",),
        "codes/manifest.json": ("codes info", "codes verify", "train-prior", "codes view"),
        "codes/train/00000.parquet": ("codes info", "codes verify", "train-prior"),
        "codes/validation/00000.parquet": ("codes verify", "train-prior"),
        "codes/extract_config.yaml": ("extract_on", "doctor_codes"),
        "ready/prepared.json": ("train_ready",),
        "ready/train/00000.parquet": ("train_ready",),
        "ready/prepare_config.yaml": ("prepare_on",),
        "samples/sample_config.yaml": ("sample_on",),
        "samples/receipt.json": ("sample_again",),
        "samples/images/000000.png": ("verify",),
        "list.txt": ("list.txt",),
        "list.csv": ("list.csv",),
        "list.jsonl": ("list.jsonl",),
        "table.parquet": ("table.parquet",),
        "array.npy": ("array.npy",),
        "array.npz": ("array.npz",),
    }
    more = {
        "train_on": BASES["train"].replace("/out", "/vqvae") + " --num-steps 13",
        "train_ready": BASES["train"].replace("/photos", "/ready"),
        "prepare_on": BASES["prepare"].replace("/out", "/ready") + " --image.channels 1",
        "extract_on": BASES["extract"].replace("/out", "/codes"),
        "doctor_codes": "doctor --codes {x}/codes --vqvae {x}/vqvae",
        "sample_on": BASES["sample"].replace("/out", "/samples"),
        "sample_again": "sample --receipt {x}/samples/receipt.json --pipeline {x}/pipeline "
        "--output-dir {x}/out",
    }
    for file, names in uses.items():
        for name in names:
            line = {**BASES, **more}.get(name) or BASES["prepare"].replace("/photos", f"/{file}")
            yield from _damages(x, file, tuple(line.split()), rng)


def _damages(x: Path, file: str, words: tuple[str, ...], rng: random.Random) -> Iterator[Trial]:
    content = (x / file).read_bytes()
    command = " ".join(words[:2] if words[0] == "codes" else words[:1])

    def trial(name: str, changed: bytes | None, codes: frozenset[int] = ANY) -> Trial:
        return Trial("damaged files", f"{file} {name}: {command}", words, codes,
                     _writing(file, changed))  # fmt: skip

    # Damage of any file. Of a table's or a list's rows some may be left.
    is_data = file.startswith(("list.", "array.")) or file.endswith(("metrics.jsonl", "skipped"))
    sure = frozenset({1, 2}) if command == "codes verify" else frozenset({2})
    sure = ANY if is_data or file.endswith(".jsonl") or command == "doctor" else sure
    yield trial("emptied", b"", sure)
    yield trial("cut", content[: len(content) * 2 // 3], ANY if file.endswith(".yaml") else sure)
    yield trial("removed", None)
    yield trial("zeros", bytes(len(content)), sure)
    yield trial("doubled", content * 2)
    yield trial("a picture", b"\x89PNG\r\n\x1a\n" + bytes(100), sure)
    for _ in range(3):
        place = rng.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        yield trial(f"flipped at {place}", flipped)
    yield Trial("damaged files", f"{file} a pipe: {command}", words, ANY, _pipe(file))
    yield Trial("damaged files", f"{file} a folder: {command}", words, ANY, _folder(file))

    # Other texts and kinds.
    if file.endswith((".json", ".yaml")):
        for text in ("null", "[]", "3", '"text"', "[" * 100_000, "{}", '{"a": 1}', "\ud800"):
            yield trial(f"{text:.10}", text.encode("utf-8", "surrogatepass"))
    if file.endswith((".json", ".yaml")):
        data = yaml.safe_load((x / file).read_text())
        sure = ANY if file.endswith(".yaml") else frozenset({1, 2})
        for path in _paths(data):
            free = bool(FREE & {str(key) for key in path}) or command == "doctor"
            for value in (*WRONG_KINDS, ...):
                changed = json.loads(json.dumps(data))
                old = _change(changed, path, value)
                other = type(old) is not type(value) and value is not ...
                other &= not (isinstance(old, float) and isinstance(value, int))
                other &= not (isinstance(value, list) and isinstance(old, list))
                codes = ANY if free or not other else sure
                what = "removed" if value is ... else f"{value!r:.20}"
                place = ".".join(map(str, path))
                if file.endswith("manifest.json"):
                    with contextlib.suppress(UserError):  # as if it had been written so
                        changed["codes_hash"] = from_dict(Manifest, changed, "").content_hash()
                if file.endswith("index.json") and path[0] in ("codes_hash", "encoder_hash"):
                    codes = ANY  # for people
                yield trial(f"{place} = {what}", json.dumps(changed).encode(), codes)


def _paths(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where every value of a document lies (of a list the first alone)."""
    inside = data.items() if isinstance(data, dict) else enumerate(data[:1])
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list) and key not in FREE:
            yield from _paths(value, (*path, key))


def _change(data: Any, path: tuple, value: Any) -> Any:
    """Replace the value there (`...`: remove it), and return the old one."""
    for key in path[:-1]:
        data = data[key]
    old = data[path[-1]]
    if value is ...:
        del data[path[-1]]
    else:
        data[path[-1]] = value
    return old


def _writing(file: str, content: bytes | None) -> Callable[[Path], object]:
    def write(x: Path) -> None:
        (x / file).unlink(missing_ok=True)
        if content is not None:
            (x / file).write_bytes(content)

    return write


def _pipe(file: str) -> Callable[[Path], object]:
    def replace(x: Path) -> None:
        (x / file).unlink()
        os.mkfifo(x / file)

    return replace


def _folder(file: str) -> Callable[[Path], object]:
    def replace(x: Path) -> None:
        (x / file).unlink()
        (x / file).mkdir()

    return replace


# Running them


def attempt(trial: Trial, run_folder: Path, seconds: float = SECONDS) -> str | None:
    """Run a trial on a copy of the run in a forked process; what is wrong with its end, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        # The copy, and the process.
        x, output = Path(scratch) / "x", Path(scratch) / "output"
        copy_run(run_folder, x)
        trial.prepare(x)
        words = [word.replace("{x}", str(x)).replace("{{", "{").replace("}}", "}")
                 for word in trial.words]  # fmt: skip
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            _child(words, Path(scratch), output)

        # Wait for its end, no longer than allowed.
        end, status = time.monotonic() + seconds, 0
        while not (done := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return f"no end after {seconds:g} s"
            time.sleep(0.005)
        status, text = done[1], output.read_text(errors="replace")

    # What it said.
    code = os.waitstatus_to_exitcode(status)
    if "Traceback" in text or code not in (0, 1, 2):
        last = (text.strip().splitlines() or ["nothing said"])[-1]
        return f"exit code {code}, traceback: {last:.300}"
    sentences = [line for line in text.splitlines() if line.startswith("vqvae2: ")]
    if code == 2 and (len(sentences) != 1 or len(sentences[0]) > LONGEST):
        return f"{len(sentences)} sentences, of {max(map(len, sentences), default=0)} letters"
    if code not in trial.codes:
        return f"exit code {code} instead of {sorted(trial.codes)}: {' '.join(sentences):.200}"
    return None


def copy_run(source: Path, target: Path) -> None:
    """A copy of a run with its links and pipes; pictures, which nothing changes, as hard links."""
    for folder, _, names in os.walk(source):
        to = target / Path(folder).relative_to(source)
        to.mkdir(parents=True)
        for name in names:
            path = Path(folder) / name
            if path.is_symlink():
                (to / name).symlink_to(str(path.readlink()).replace(str(source), str(target)))
            elif not path.is_file():
                os.mkfifo(to / name)
            elif name.endswith(".png"):
                os.link(path, to / name)
            else:
                shutil.copyfile(path, to / name)


def _child(words: list[str], folder: Path, output: Path) -> None:
    """Run a command line in this process with its output in a file, and leave the process."""
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.chdir(folder)
        sys.argv = ["vqvae2", *words]
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def choose(trials: Sequence[Trial], number: int, rng: random.Random) -> list[Trial]:
    """So many of them, equally many of each promise as far as there are, in a random order."""
    by_promise: dict[str, list[Trial]] = {}
    for trial in trials:
        by_promise.setdefault(trial.promise, []).append(trial)
    chosen: list[Trial] = []
    for some in by_promise.values():
        chosen += rng.sample(some, min(len(some), number // len(by_promise)))
    return chosen


def report(trials: Sequence[Trial], run_folder: Path, seconds: float = SECONDS) -> list[str]:
    """Run trials, print the table, and return a line for each failure."""
    counts: dict[str, list[int]] = {}
    failures: list[str] = []
    for trial in trials:
        fault = attempt(trial, run_folder, seconds)
        count = counts.setdefault(trial.promise, [0, 0])
        count[0] += 1
        if fault is not None:
            count[1] += 1
            failures.append(f"{trial.name} | {fault}")
            print(failures[-1], flush=True)
    print(f"{'promise: one sentence and the right exit code':50}{'trials':>8}{'failures':>10}")
    for promise, (number, failed) in counts.items():
        print(f"{promise:50}{number:>8}{failed:>10}")
    return failures


def all_trials(run_folder: Path, rng: random.Random) -> list[Trial]:
    """Every mistake that is made here. Loads what commands load, once for all forked processes."""
    for command in COMMANDS:
        function_of(command)
    for library in ("tyro", "datasets", "docstring_parser", "torch.optim", "accelerate"):
        importlib.import_module(library)
    return [*flag_trials(), *recipe_trials(), *file_trials(run_folder, rng)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="trials whose name holds this text")
    parser.add_argument("--run", type=Path, help="a run that make_run has made, or will make")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        x = options.run or Path(temporary) / "run"
        if not x.exists():
            process = os.fork()  # this process stays without threads
            if process == 0:
                make_run(x)
                os._exit(0)
            os.waitpid(process, 0)
        trials = [trial for trial in all_trials(x, rng) if options.only in trial.name]
        print(len(trials), "possible mistakes")
        sys.exit(bool(report(choose(trials, options.trials, rng), x)))
