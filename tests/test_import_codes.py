"""Codes that the widely used implementation extracted: taken over bit for bit, and nothing that its pickles may hold is run."""

import os
import pickle
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.importers.rosinality_codes import NAMES, read_row
from prior.manifest import CodeDataset, read_manifest
from tests.conftest import ROOT, command
from vqvae2.common.errors import UserError
from vqvae2.data import is_held_out

CHECKPOINT = ROOT / "tests" / "data" / "rosinality_stage1.pt"
CODES = ROOT / "tests" / "data" / "rosinality_codes.mdb"
CodeRow = namedtuple("CodeRow", ["top", "bottom", "filename"])  # as theirs
CodeRow.__module__ = "dataset"


@pytest.fixture(autouse=True)
def _their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dataset.CodeRow`, which pickling asks for."""
    module = ModuleType("dataset")
    module.CodeRow = CodeRow  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dataset", module)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "vqvae"
    command("import-weights", CHECKPOINT, "--size", 32, "--output-dir", folder)
    return folder


def row(name: str, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return CodeRow(rng.integers(0, 64, (4, 4)), rng.integers(0, 64, (8, 8)), name)


def write_lmdb(path: Path, values: list[bytes], **keys: bytes) -> Path:
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in {
            **{str(i): value for i, value in enumerate(values)},
            "length": str(len(values)).encode(),
            **keys,
        }.items():
            transaction.put(key.encode(), value)
    return path


def test_a_real_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        lmdb.open(str(CODES), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        expected = [
            pickle.loads(transaction.get(str(i).encode()))
            for i in range(int(transaction.get(b"length")))
        ]
    command("import-codes", CODES, "--vqvae", model, "--output-dir", tmp_path / "codes")
    assert "5 training rows, 0 held out, 2 classes (class0, class1)" in capsys.readouterr().out
    read = CodeDataset(tmp_path / "codes", read_manifest(tmp_path / "codes"), "train").__getitems__(
        range(5)
    )
    assert all(
        np.array_equal(codes, theirs.top)
        for codes, theirs in zip(read["codes"][0], expected, strict=True)
    )
    assert all(
        np.array_equal(codes, theirs.bottom)
        for codes, theirs in zip(read["codes"][1], expected, strict=True)
    )
    assert read["labels"].tolist() == [int(theirs.filename[len("class")]) for theirs in expected]
    command("codes", "verify", "--codes", tmp_path / "codes")
    command(
        "codes",
        "view",
        "--codes",
        tmp_path / "codes",
        "--vqvae",
        model,
        "--rows",
        4,
        0,
        "--output-dir",
        tmp_path,
    )
    assert (
        "train row 4: class0/4.png, class0\ntrain row 0: class0/0.png, class0\n"
        in capsys.readouterr().out
    )
    command("import-codes", CODES, "--vqvae", model, "--output-dir", tmp_path / "codes")
    assert "imported already" in capsys.readouterr().out
    shard = tmp_path / "codes" / "train" / "00000.parquet"
    before = shard.read_bytes()
    shard.unlink()
    command("import-codes", CODES, "--vqvae", model, "--output-dir", tmp_path / "codes")
    assert shard.read_bytes() == before
    other = write_lmdb(
        tmp_path / "other.lmdb",
        [pickle.dumps(row(name), protocol=4) for name in ("a/1.png#2", "a/1.png", "a/1.png")],
    )
    command("import-codes", other, "--vqvae", model, "--output-dir", tmp_path / "codes", code=2)
    command(
        "import-codes",
        other,
        "--vqvae",
        model,
        "--output-dir",
        tmp_path / "twice",
        "--validation-fraction",
        0,
    )
    command("codes", "verify", "--codes", tmp_path / "twice")
    command(
        "import-codes",
        other,
        "--vqvae",
        model,
        "--output-dir",
        tmp_path / "none",
        "--validation-fraction",
        "0.9999999",
        code=2,
    )


def test_a_prior_trains_on_it(model: Path, tmp_path: Path) -> None:
    rows = [row(f"{'ab'[i % 2]}/{i}.png", i) for i in range(40)]
    file = write_lmdb(
        tmp_path / "x.lmdb", [pickle.dumps(r, protocol=3 + i % 2) for i, r in enumerate(rows)]
    )
    command(
        "import-codes",
        file,
        "--vqvae",
        model,
        "--output-dir",
        tmp_path / "codes",
        "--validation-fraction",
        0.3,
        "--shard-size",
        7,
    )
    manifest = read_manifest(tmp_path / "codes")
    held_out = [r for r in rows if is_held_out(r.filename, 0.3)]
    validation = CodeDataset(tmp_path / "codes", manifest, "validation").__getitems__(
        range(manifest.num_validation)
    )
    assert [codes.tolist() for codes in validation["codes"][1]] == [
        r.bottom.tolist() for r in held_out
    ]
    assert len(manifest.train) == -(-(40 - len(held_out)) // 7)
    options = ("--num-steps", 2, "--batch-size", 4, "--checkpoint-every", 2, "--validate-every", 2)
    command(
        "train-prior",
        "--config",
        "tiny",
        "--codes",
        tmp_path / "codes",
        "--level",
        "bottom",
        "--output-dir",
        tmp_path / "prior",
        *options,
    )


def test_names_that_repeat_and_no_folders(model: Path, tmp_path: Path) -> None:
    file = write_lmdb(
        tmp_path / "x.lmdb", [pickle.dumps(row(name)) for name in ("a/1.png", "a/2.png", "a/1.png")]
    )
    command(
        "import-codes",
        file,
        "--vqvae",
        model,
        "--output-dir",
        tmp_path / "codes",
        "--validation-fraction",
        0,
    )
    assert read_manifest(tmp_path / "codes").class_names == ()
    command("codes", "verify", "--codes", tmp_path / "codes")


class Evil:
    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def global_of(module: str, name: str, *rest: bytes) -> bytes:
    return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"".join(rest)


def malicious(folder: Path) -> dict[str, bytes]:
    """Name of the trick -> a pickle that plays it; those that run something make the file `folder/run`."""
    good = pickle.dumps(row("a/0.png"), protocol=4)
    top, bottom, name = row("a/0.png")
    touch = Evil(os.system, f"touch {folder / 'run'}")
    return {
        "a command": pickle.dumps(touch),
        "a command as a field": pickle.dumps(CodeRow(top, bottom, touch)),
        "a command in an object array": pickle.dumps(
            CodeRow(np.array([[touch]], dtype=object), bottom, name)
        ),
        "an open file": pickle.dumps(Evil(open, str(folder / "run"), "w")),
        "eval by attribute": global_of("builtins", "eval", b"(", b"X\x01\x00\x00\x001", b"tR."),
        "an attribute of an allowed name": global_of("numpy", "ndarray.tofile", b"."),
        "an array of another size": good.replace(b"K\x04K\x04", b"K\x04K\x09"),
        "a huge array": pickle.dumps(
            CodeRow(
                np.broadcast_to(np.int64(0), (1, 1)), Evil(np.ndarray, (1 << 20, 1 << 20)), name
            )
        ),
        "a memo index that takes all memory": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a state for a class": global_of(
            "numpy", "dtype", b"N}", b"X\x01\x00\x00\x00aNs", b"\x86b."
        ),
        "a state for a class without a dict": global_of("dataset", "CodeRow", b"NN\x86b."),
        "arrays without a state": global_of(
            "dataset",
            "CodeRow",
            2 * b"cnumpy.core.multiarray\n_reconstruct\n)R",
            b"X\x01\x00\x00\x00a\x87\x81.",
        ),
        "text instead of an array": pickle.dumps(CodeRow("top", bottom, name)),
        "floats": pickle.dumps(CodeRow(top.astype(float), bottom, name)),
        "big-endian integers": pickle.dumps(CodeRow(top.astype(">i8"), bottom, name)),
        "a line": pickle.dumps(CodeRow(top.reshape(-1), bottom, name)),
        "nothing in it": pickle.dumps(CodeRow(top[:0], bottom, name)),
        "no name": pickle.dumps(CodeRow(top, bottom, None)),
        "a name that writes over the screen": pickle.dumps(CodeRow(top, bottom, "\x1b[2J")),
        "a plain tuple": pickle.dumps((top, bottom, name)),
        "cut off": good[:-10],
        "empty": b"",
    }


def test_malicious_rows_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trick, value in malicious(tmp_path).items():
        with pytest.raises(
            UserError,
            match=r"^x: row 1 is no pickled CodeRow of int64 arrays and a file name \(.+\): it is not imported\.$",
        ):
            print(trick, read_row(value, "x: row 1"))
    file = write_lmdb(
        tmp_path / "x.lmdb", [pickle.dumps(row("a/0.png")), malicious(tmp_path)["a command"]]
    )
    command("import-codes", file, "--vqvae", model, "--output-dir", tmp_path / "codes", code=2)
    assert "row 1 is no pickled CodeRow" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "codes").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_rows_are_refused_or_the_same_kind_of_row(data: st.DataObject) -> None:
    """Whatever becomes of the bytes, what comes back is a row, or a sentence; and the stand-ins stay as they are."""
    value = bytearray(pickle.dumps(row("a/0.png"), protocol=4))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    kinds = {key: dict(vars(kind)) for key, kind in NAMES.items()}
    try:
        found = read_row(
            bytes(value[: data.draw(st.integers(0, len(value)))])
            if data.draw(st.booleans())
            else bytes(value),
            "x: row 0",
        )
    except UserError:
        return
    finally:
        assert {key: dict(vars(kind)) for key, kind in NAMES.items()} == kinds
    assert [(codes.ndim, codes.dtype) for codes in found.codes] == [(2, np.int64)] * 2
    assert isinstance(found.name, str)


def test_files_that_are_none_and_codes_of_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [pickle.dumps(row(f"a/{i}.png")) for i in range(3)]
    other = tmp_path / "other"
    command("import-weights", CHECKPOINT, "--size", 64, "--output-dir", other)
    (tmp_path / "text.lmdb").write_text("no database" * 1000)
    (tmp_path / "cut.lmdb").write_bytes(CODES.read_bytes()[:-8192])
    large = row("a/0.png")._replace(top=np.full((4, 4), 64))
    cases: list[tuple[Path, Path, str]] = [
        (tmp_path / "nowhere.lmdb", model, "nowhere.lmdb does not exist"),
        (tmp_path / "text.lmdb", model, "text.lmdb cannot be read as LMDB"),
        (tmp_path / "cut.lmdb", model, "cut.lmdb is cut off"),
        (
            write_lmdb(tmp_path / "a.lmdb", good, length=b"many"),
            model,
            "no number of rows under the key 'length'",
        ),
        (
            write_lmdb(tmp_path / "b.lmdb", good, length=b"4"),
            model,
            "4 rows, but row 3 is not there",
        ),
        (
            write_lmdb(tmp_path / "c.lmdb", [*good, pickle.dumps(large)]),
            model,
            "row 3 has codes from 64 to 64, but",
        ),
        (CODES, other, "row 0 has codes of the grids ((4, 4), (8, 8)), but"),
    ]
    for file, vqvae, sentence in cases:
        command("import-codes", file, "--vqvae", vqvae, "--output-dir", tmp_path / "codes", code=2)
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()
