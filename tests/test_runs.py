"""Run folders: files that are whole or absent, and records of what binds a run, which hold nothing
of the machine that made it."""

import errno
import fcntl
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.cli import main, parse
from pipelines.commands.assemble import assemble
from pipelines.config import AssembleConfig
from tests.conftest import command
from vqvae2.common import lock
from vqvae2.common.config import expand_paths, may_change
from vqvae2.common.errors import UserError
from vqvae2.common.files import append_text, whole_file, write_text
from vqvae2.common.lock import LOCK_NAME, only_writer
from vqvae2.common.runs import RunRecord, command_line, last_names, read_record, versions


@dataclass(frozen=True, kw_only=True)
class Config:
    path: str = may_change("photos")
    init_from: str | None = None
    labels: tuple[str, ...] = ()


def record(**settings: object) -> RunRecord:
    return RunRecord("train", Config(**settings), "record.yaml")  # type: ignore[arg-type]


def test_no_file_of_a_run_holds_a_path_of_the_machine(run: Path, photos: Path) -> None:
    texts = [path for path in run.rglob("*") if path.suffix in (".json", ".yaml", ".jsonl")]
    assert len(texts) > 10
    for path in texts:
        assert str(photos.parent) not in path.read_text(), path
        assert str(run) not in path.read_text(), path
    assert read_record(run / "vqvae" / "train_config.yaml")["data"]["path"] == str(photos)
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    assert index["trainings"]["vqvae"]["data"]["path"] == photos.name


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("/data/photos", "$RUN/../photos"),
        ("/data/a/../photos/", "$RUN/../photos"),
        ("/data/run", "$RUN/."),
        ("/home/alice/photos", "~/photos"),
        ("~/photos", "~/photos"),
        ("file:///data/x.tar", "file://$RUN/../x.tar"),
        ("photos", "photos"),
        ("../photos", "../photos"),
        ("someone/photos", "someone/photos"),
        ("https://example.org/x.tar", "https://example.org/x.tar"),
    ],
)
def test_a_path_is_stored_without_the_folders_above_the_run(
    path: str, stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    folder = tmp_path / "run"
    written = path.replace("/data", str(tmp_path))
    record(path=written, labels=("/m/0", "x")).write(folder)
    assert f"path: {stored}\n" in (folder / "record.yaml").read_text()
    read = read_record(folder / "record.yaml")
    normal = written.replace("a/../photos/", "photos").replace("~", "/home/alice")
    assert (read["path"], read["labels"]) == (normal, ["/m/0", "x"])


def test_a_run_can_be_moved_alone_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    record(path=str(tmp_path / "photos")).write(tmp_path / "x" / "run")
    moved = (tmp_path / "x" / "run").rename(tmp_path / "run")
    assert read_record(moved / "record.yaml")["path"] == str(tmp_path / "photos")


def test_a_run_and_its_images_can_be_moved_together(tmp_path: Path) -> None:
    record(path=str(tmp_path / "x" / "photos")).write(tmp_path / "x" / "run")
    (tmp_path / "x").rename(tmp_path / "y")
    read = read_record(tmp_path / "y" / "run" / "record.yaml")
    assert read["path"] == str(tmp_path / "y" / "photos")


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    settings = {"init_from": str(tmp_path / "other"), "labels": ("/m/0",)}
    record(**settings).write(tmp_path / "run")
    record(**settings, path="elsewhere").check(tmp_path / "run")
    with pytest.raises(UserError, match=r"init_from = '.*other', but this command says None"):
        record(labels=("/m/0",)).check(tmp_path / "run")
    with pytest.raises(UserError, match="command = 'train', but this command says 'sample'"):
        RunRecord("sample", Config(), "record.yaml").check(tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no run of 'train'"):
        record().check(tmp_path / "thesis")


def test_a_checkout_that_was_never_installed_has_versions_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "vqvae2":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr("vqvae2.common.runs.version", version)
    found = versions()
    assert (found["vqvae2"], found["torch"]) == ("not installed", "1.2")


def test_the_command_line_is_quoted_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/opt/bin/vqvae2", "train", "--data.path=/home/alice/photos", "--seed", "1", "/a/b c"]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "vqvae2 train --data.path=photos --seed 1 'b c'"
    assert last_names({"data": ["/home/alice/photos", "a/b"]}) == {"data": ["photos", "a/b"]}


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file can grow beyond 64 KiB, which fails in the libraries as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


NUMBERS = np.random.default_rng(0).random(1 << 16, dtype=np.float32)


def write_parquet(path: Path) -> None:
    table = pa.table({"x": NUMBERS})
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.from_numpy(NUMBERS)}, path),
    "torch": lambda path: torch.save(torch.from_numpy(NUMBERS), path),
    "parquet": write_parquet,
    "png": lambda path: Image.effect_noise((999, 999), 99).save(path, format="PNG"),
    "tiff": lambda path: tifffile.imwrite(path, NUMBERS.reshape(256, 256)),
    "numpy": lambda path: np.save(path, NUMBERS),
    "text": lambda path: path.write_text("x" * (1 << 17)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_error_and_leaves_nothing(
    kind: str, little_room: None, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "x.npy"
    with pytest.raises(OSError, match=r"x\.npy") as caught, whole_file(path) as aside:
        WRITERS[kind](aside)
    assert (caught.value.filename, type(caught.value)) == (str(path), OSError)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert os.listdir(path.parent) == []


def test_a_line_is_appended_whole_or_not_at_all(little_room: None, tmp_path: Path) -> None:
    append_text(tmp_path / "log", "first\n")
    with pytest.raises(OSError, match="log"):
        append_text(tmp_path / "log", "x" * (1 << 17))
    assert (tmp_path / "log").read_text() == "first\n"


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        append_text(link, "lost")
    write_text(link, "new")
    assert (link.read_text(), (tmp_path / "other").read_text()) == ("new", "kept")
    assert not link.is_symlink()


def test_files_have_the_mode_that_the_umask_says(run: Path) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert len({mode for path, mode in modes.items() if "checkpoints" not in path.parts}) == 1


def test_two_commands_do_not_write_to_one_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    priors = (run / "prior_0", run / "prior_1")
    assemble = ("assemble", "--vqvae", run / "vqvae", "--priors", *priors, "--output-dir", tmp_path)
    with open(tmp_path / LOCK_NAME, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 4711 on host X")
        other.flush()
        command(*assemble, code=2)
    sentence = f"process 4711 on host X is writing to {tmp_path}: wait for it or choose another"
    assert sentence in capsys.readouterr().err
    command(*assemble)  # the lock has died with its holder
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_lock_leaves_nothing_and_may_be_taken_again_by_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    with only_writer(folder), only_writer(folder / ".." / "x"):
        assert f"process {os.getpid()} on host " in (folder / LOCK_NAME).read_text()
    assert not (tmp_path / "runs").exists()


def test_every_process_of_a_launch_ends_with_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(outcome: list) -> None:
        outcome[1] = UserError("process 4711 is writing")

    monkeypatch.setattr(
        lock, "processes", lambda: SimpleNamespace(is_main_process=False, num_processes=2)
    )
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", told)
    with pytest.raises(UserError, match="4711") as refused, only_writer(tmp_path):
        pass
    assert refused.value.told_by_first  # so that one process alone prints it


def test_what_killed_commands_left_is_removed(tmp_path: Path) -> None:
    for name in ("x/.000001.png.1-ab.partial/a", "x/images/.a.png.partial", "x/.step_1.removed/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = ("x/000000.png", "x/.00000.json", f"x/vqvae/{LOCK_NAME}", "x/vqvae/.a.partial")
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with only_writer(tmp_path / "x"):
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_once(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusal = OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=refusal))
    with caplog.at_level("WARNING"), only_writer(tmp_path / "x"):
        write_text(tmp_path / "x" / "file", "written")
    assert caplog.text.count("its file system has no locks") == 1


def test_paths_are_expanded_and_never_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["assemble", "--vqvae=~/x", "--priors", "~/p", "--output-dir=~/out"]
    expanded = expand_paths(parse("assemble", words[1:]))
    assert expanded.priors == (f"{tmp_path}/p",)
    assert (expanded.vqvae, expanded.output_dir) == (f"{tmp_path}/x", f"{tmp_path}/out")
    sample = ["--pipeline", "p", "--output-dir", "~/out", "--labels", "~root", "--attributes", "~"]
    names = expand_paths(parse("sample", sample))  # names are no paths
    assert (names.labels, names.attributes) == (("~root",), ("~",))
    train = ["train", "--data.path", "photos", "--output-dir", "out"]
    cases = {
        "output_dir is '', but must be a path": [*train, "--output-dir="],
        "data.path is '', but must be a path": [*train, "--data.path", ""],
        "output_dir is '~nosuchuser/x', but must be in the home": [*train[:-1], "~nosuchuser/x"],
        "priors is '', but must be a path": [
            "assemble",
            "--vqvae=x",
            "--priors",
            "p",
            "",
            *train[3:],
        ],
    }
    for sentence, mistake in cases.items():
        assert main(mistake) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(UserError, match="output_dir is ''"):
        assemble(AssembleConfig(vqvae="x", priors=("p",), output_dir=""))
    assert list(tmp_path.iterdir()) == []
