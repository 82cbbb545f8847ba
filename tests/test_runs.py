"""Run records: what binds a run, and nothing of the machine that made it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from vqvae2.common.config import may_change
from vqvae2.common.errors import UserError
from vqvae2.common.runs import RunRecord, command_line, last_names, read_record


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


def test_the_command_line_is_quoted_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/opt/bin/vqvae2", "train", "--data.path=/home/alice/photos", "--seed", "1", "/a/b c"]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "vqvae2 train --data.path=photos --seed 1 'b c'"
    assert last_names({"data": ["/home/alice/photos", "a/b"]}) == {"data": ["photos", "a/b"]}
