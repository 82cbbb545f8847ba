"""Shared fixtures: real images, tiny configurations, and one run of the whole path per session."""

import os

# Set before torch loads, here and in subprocesses: two workers share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what they promise to the bit, they promise of CPUs

import dataclasses
import io
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli import main
from prior.manifest import read_manifest, write_manifest
from prior.shards import ShardRecord, content_hash, file_hash, row_groups
from tests.forked import Running, start_two

ROOT = Path(__file__).parent.parent
PARQUET = Path(str(files("pipelines") / "demo_data" / "fashion_mnist.parquet"))


def vqvae2(
    *arguments: object, check: bool = True, cwd: Path | None = None
) -> CompletedProcess[str]:
    """Run the command line in a process of its own."""
    result = Running(arguments, cwd=cwd).wait()
    assert not check or result.returncode == 0, result.stderr
    return result


def command(*arguments: object, code: int = 0) -> None:
    """Run the command line in this process, which is quicker, and demand its exit code."""
    words = [str(argument) for argument in arguments]
    with mock.patch.object(sys, "argv", ["vqvae2", *words]):  # which run records quote
        assert main(words) == code


def two_processes(*arguments: object, cwd: Path | None = None) -> list[CompletedProcess[str]]:
    """Run the command line, or a Python file, on two processes that talk over gloo."""
    results = [running.wait() for running in start_two(arguments, cwd=cwd)]
    for result in results:
        assert result.returncode == 0, "\n\n".join(each.stderr for each in results)
    return results


def kill_when(
    condition: Callable[[], bool], *arguments: object, number: int = signal.SIGKILL
) -> int:
    """Start the command line, send a signal once the condition holds, and return the exit code."""
    running = Running(arguments)
    while running.is_alive() and not condition():
        time.sleep(0.001)
    running.send(number)
    return running.wait().returncode


def write_images(folder: Path, number: int, *, num_classes: int = 3) -> Path:
    """Real images in class folders, `number` in all."""
    table = pq.read_table(PARQUET, columns=["image", "label"]).slice(0, 2000).to_pylist()
    rows = [row for row in table if row["label"] < num_classes][:number]
    for i, row in enumerate(rows):
        path = folder / ("bag", "coat", "dress")[row["label"]] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(row["image"]["bytes"])).save(path)
    return folder


def edit_manifest(codes: Path, **changes: object) -> None:
    """Change what a code dataset's manifest says, with a hash as if it had been extracted so."""
    write_manifest(codes, dataclasses.replace(read_manifest(codes), **changes))  # type: ignore[arg-type]


def record_shard(path: Path, schema: pa.Schema) -> ShardRecord:
    """The record in a manifest of a shard as it is."""
    tables = list(row_groups(path, schema)) or [schema.empty_table()]
    return ShardRecord(
        name=path.name,
        rows=sum(map(len, tables)),
        sha256=file_hash(path),
        content_hash=content_hash(tables),
    )


def edit_shard(path: Path, change: Callable[[dict[str, list]], object]) -> None:
    """Change a shard's rows, given as columns of lists, and its record in the manifest."""
    codes, split = path.parent.parent, path.parent.name
    manifest, table = read_manifest(codes), pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path)
    new = record_shard(path, manifest.schema)
    records = tuple(new if old.name == new.name else old for old in manifest.shards(split))
    edit_manifest(codes, **{split: records})


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 real images in three class folders."""
    return write_images(tmp_path_factory.mktemp("images") / "photos", 150)


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder runs/x with every stage of the tiny recipe. Tests must not change it."""
    x = tmp_path_factory.mktemp("run") / "runs" / "x"
    vqvae, codes, priors = x / "vqvae", x / "codes", (x / "prior_0", x / "prior_1")
    tiny = ("--config", "tiny")
    command("train", *tiny, "--data.path", photos, "--output-dir", vqvae)
    command("extract", "--vqvae", vqvae, "--data.path", photos, "--output-dir", codes)
    for name, prior in zip(("top", "bottom"), priors, strict=True):
        parts = ("--codes", codes, "--vqvae", vqvae, "--output-dir", prior)
        command("train-prior", *tiny, "--level", name, *parts)
    command("assemble", "--vqvae", vqvae, "--priors", *priors, "--output-dir", x / "pipeline")
    return x


@pytest.fixture
def copy_of_run(run: Path, tmp_path: Path) -> Path:
    """The same, to change; as far from the photos, to which its records hold relative paths."""
    return shutil.copytree(run, tmp_path / "runs" / "x")


@pytest.fixture
def stub_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """For packages that import torchvision, which not every torch has, and hardly use it."""
    for name in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", mock.MagicMock())
