"""Codes of the widely used implementation: taken over bit for bit, and no code in them is run."""

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
import pyarrow.parquet as pq
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
    return import_model(tmp_path_factory.mktemp("imported") / "vqvae", size=32)


def import_model(folder: Path, size: int) -> Path:
    flags = ("--checkpoint", CHECKPOINT, "--image.size", size)
    command("import-weights", *flags, "--output-dir", folder)
    return folder


def import_codes(lmdb: Path, vqvae: Path, folder: Path, *flags: object, code: int = 0) -> None:
    parts = ("--lmdb", lmdb, "--vqvae", vqvae)
    command("import-codes", *parts, "--output-dir", folder, *flags, code=code)


def row(name: str, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return CodeRow(rng.integers(0, 64, (4, 4)), rng.integers(0, 64, (8, 8)), name)


def write_lmdb(path: Path, values: list[bytes], **keys: bytes) -> Path:
    entries = {str(i): value for i, value in enumerate(values)}
    entries |= {"length": str(len(values)).encode(), **keys}
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


def rows_of(folder: Path, split: str) -> dict[str, Any]:
    manifest = read_manifest(folder)
    dataset = CodeDataset(folder, manifest, split)
    return dataset.__getitems__(range(len(dataset)))


def test_a_real_file_is_taken_over_bit_for_bit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        lmdb.open(str(CODES), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        theirs = [pickle.loads(transaction.get(str(i).encode())) for i in range(5)]
    import_codes(CODES, model, tmp_path / "codes")
    assert "5 training rows, 0 held out, 2 classes (class0, class1)" in capsys.readouterr().out
    read = rows_of(tmp_path / "codes", "train")
    for level, name in enumerate(("top", "bottom")):
        expected = np.stack([getattr(row, name) for row in theirs])
        assert np.array_equal(read["codes"][level], expected)
    ids = pq.read_table(tmp_path / "codes" / "train")["id"].to_pylist()
    assert ids == [row.filename for row in theirs]
    assert read["labels"].tolist() == [int(row.filename[len("class")]) for row in theirs]
    command("codes", "verify", "--codes", tmp_path / "codes")


def test_an_import_is_finished_once_and_not_mixed_with_another(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_codes(CODES, model, tmp_path / "codes")
    import_codes(CODES, model, tmp_path / "codes")
    assert "imported already" in capsys.readouterr().out
    shard = tmp_path / "codes" / "train" / "00000.parquet"
    before = shard.read_bytes()
    shard.unlink()
    import_codes(CODES, model, tmp_path / "codes")
    assert shard.read_bytes() == before
    other = write_lmdb(tmp_path / "other.lmdb", [pickle.dumps(row("a/1.png"))])
    import_codes(other, model, tmp_path / "codes", code=2)
    all_held_out = ("--validation-fraction", 0.9999999)
    import_codes(other, model, tmp_path / "none", *all_held_out, code=2)


def test_a_prior_trains_on_it(model: Path, tmp_path: Path) -> None:
    rows = [row(f"{'ab'[i % 2]}/{i}.png", i) for i in range(40)]
    values = [pickle.dumps(r, protocol=3 + i % 2) for i, r in enumerate(rows)]
    file, codes = write_lmdb(tmp_path / "x.lmdb", values), tmp_path / "codes"
    import_codes(file, model, codes, "--validation-fraction", 0.3, "--shard-size", 7)
    held_out = [r for r in rows if is_held_out(r.filename, 0.3)]
    read = [grid.tolist() for grid in rows_of(codes, "validation")["codes"][1]]
    assert read == [r.bottom.tolist() for r in held_out]
    assert len(read_manifest(codes).train) == -(-(40 - len(held_out)) // 7)
    train = ("train-prior", "--config", "tiny", "--codes", codes, "--level", "bottom")
    steps = ("--num-steps", 2, "--batch-size", 4, "--checkpoint-every", 2, "--validate-every", 2)
    command(*train, *steps, "--output-dir", tmp_path / "prior")


def test_names_that_repeat_get_ids_of_their_own(model: Path, tmp_path: Path) -> None:
    names = ("a/1.png#2", "a/1.png", "a/1.png", "a/2.png")
    file = write_lmdb(tmp_path / "x.lmdb", [pickle.dumps(row(name)) for name in names])
    import_codes(file, model, tmp_path / "codes", "--validation-fraction", 0)
    assert read_manifest(tmp_path / "codes").class_names == ()  # a single folder is no class
    command("codes", "verify", "--codes", tmp_path / "codes")


class Evil:
    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def global_of(module: str, name: str, *rest: bytes) -> bytes:
    return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"".join(rest)


def malicious(folder: Path) -> dict[str, bytes]:
    """Name of the trick -> a pickle that plays it. What one runs makes the file `folder/run`."""
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
    expected = "no pickled CodeRow of int64 arrays and a file name"
    sentence = rf"^x: row 1 is {expected} \(.+\): it is not imported\.$"
    for trick, value in malicious(tmp_path).items():
        with pytest.raises(UserError, match=sentence):
            print(trick, read_row(value, "x: row 1"))
    values = [pickle.dumps(row("a/0.png")), malicious(tmp_path)["a command"]]
    import_codes(write_lmdb(tmp_path / "x.lmdb", values), model, tmp_path / "codes", code=2)
    assert f"row 1 is {expected}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "codes").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_rows_are_refused_or_the_same_kind_of_row(data: st.DataObject) -> None:
    """Whatever becomes of the bytes, a row or a sentence comes back; stand-ins do not change."""
    value = bytearray(pickle.dumps(row("a/0.png"), protocol=4))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(value))) if data.draw(st.booleans()) else len(value)
    kinds = {key: dict(vars(kind)) for key, kind in NAMES.items()}
    try:
        found = read_row(bytes(value[:length]), "x: row 0")
    except UserError:
        return
    finally:
        assert {key: dict(vars(kind)) for key, kind in NAMES.items()} == kinds
    assert [(codes.ndim, codes.dtype) for codes in found.codes] == [(2, np.int64)] * 2
    assert isinstance(found.name, str)


def test_files_that_are_none_and_codes_of_another_model_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [pickle.dumps(row(f"a/{i}.png")) for i in range(3)]
    large = pickle.dumps(row("a/0.png")._replace(top=np.full((4, 4), 64)))
    other = import_model(tmp_path / "other", size=64)
    nowhere, text, cut = (tmp_path / f"{name}.lmdb" for name in ("nowhere", "text", "cut"))
    text.write_text("no database" * 1000)
    cut.write_bytes(CODES.read_bytes()[:-8192])
    no_length = write_lmdb(tmp_path / "a.lmdb", good, length=b"many")
    short = write_lmdb(tmp_path / "b.lmdb", good, length=b"4")
    out_of_range = write_lmdb(tmp_path / "c.lmdb", [*good, large])
    cases = [
        (nowhere, model, "nowhere.lmdb does not exist"),
        (text, model, "text.lmdb cannot be read as LMDB"),
        (cut, model, "cut.lmdb is cut off"),
        (no_length, model, "no number of rows under the key 'length'"),
        (short, model, "4 rows, but row 3 is not there"),
        (out_of_range, model, "row 3 has codes from 64 to 64, but"),
        (CODES, other, "row 0 has codes of the grids ((4, 4), (8, 8)), but"),
    ]
    for file, vqvae, sentence in cases:
        import_codes(file, vqvae, tmp_path / "codes", code=2)
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()
