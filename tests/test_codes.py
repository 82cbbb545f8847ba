"""Codes on disk and back: small, the same bytes for the same rows, and nothing changed is read."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prior.manifest
import prior.shards
from prior.manifest import CodeDataset, Manifest, read_manifest, read_rows, write_manifest
from prior.shards import ShardRecord, content_hash, file_hash, flat_values, write_shard
from tests.conftest import command, edit_manifest, record_shard
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ShuffledLoader

PREPROCESSING = {"size": [64], "channels": 3}


Grids = tuple[tuple[int, int], ...]


def random_codes(rows: int, grids: Grids, sizes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, size, (rows, h * w)) for (h, w), size in zip(grids, sizes, strict=True)]


def write_dataset(
    folder: Path,
    *,
    rows: int = 50,
    shard_size: int = 20,
    grids: Grids = ((2, 3), (4, 6)),
    sizes: tuple[int, ...] = (17, 300),
    classes: int = 3,
    views: tuple[str, ...] = ("original",),
) -> tuple[list[np.ndarray], np.ndarray]:
    """A code dataset of random codes, all of it in train/, whose rows are of these views in turn;
    the codes and labels."""
    codes, labels = random_codes(rows, grids, sizes), np.arange(rows) % max(classes, 1)
    shards = []
    for number, first in enumerate(range(0, rows, shard_size)):
        part = slice(first, first + shard_size)
        shard = write_shard(
            folder / "train" / f"{number:05d}.parquet",
            ids=[f"{i:04d}.png" for i in range(rows)[part]],
            codes=[level[part] for level in codes],
            codebook_sizes=sizes,
            labels=labels[part] if classes else None,
            views=[views[i % len(views)] for i in range(rows)[part]],
        )
        shards.append(shard)
    manifest = Manifest(
        encoder_hash="e" * 64,
        grids=grids,
        codebook_sizes=sizes,
        class_names=tuple(map(str, range(classes))),
        rows_hash="",
        preprocessing=PREPROCESSING,
        train=tuple(shards),
        views=views,
    )
    write_manifest(folder, manifest)
    return codes, labels


def read_train(folder: Path) -> CodeDataset:
    return CodeDataset(folder, read_manifest(folder), "train")


def assert_holds(batch: dict, codes: list[np.ndarray], labels: np.ndarray) -> None:
    for read, written in zip(batch["codes"], codes, strict=True):
        assert np.array_equal(read.flatten(1), written)
    assert np.array_equal(batch["labels"], labels)


@pytest.mark.parametrize(("size", "rows"), [(256, 1000), (512, 1000), (1024, 1000), (8192, 8000)])
def test_code_columns_take_what_uniform_codes_need(tmp_path: Path, size: int, rows: int) -> None:
    """Within 5 % of ceil(log2 K) bits per code, even on small grids, where the rest weighs most."""
    codes = random_codes(rows, ((8, 8), (16, 16)), (size, size))
    path = tmp_path / "x.parquet"
    write_shard(path, ids=["x"] * rows, codes=codes, codebook_sizes=(size, size))
    file = pq.ParquetFile(path).metadata
    groups = [file.row_group(i) for i in range(file.num_row_groups)]
    for column, number in ((2, 64), (3, 256)):
        taken = sum(group.column(column).total_compressed_size for group in groups)
        assert taken * 8 <= 1.05 * rows * number * math.ceil(math.log2(size))


def test_the_same_rows_give_the_same_bytes_and_others_another_hash(tmp_path: Path) -> None:
    codes, labels = random_codes(30, ((2, 2), (4, 4)), (5, 300)), np.arange(30)
    ids = [str(i) for i in range(30)]
    rows = {"ids": ids, "codes": codes, "codebook_sizes": (5, 300), "labels": labels}
    rows["class_names"] = ids
    first = write_shard(tmp_path / "a.parquet", **rows)
    second = write_shard(tmp_path / "b.parquet", **rows)
    assert dataclasses.replace(second, name=first.name) == first
    changed = [level.copy() for level in codes]
    changed[1][7, 3] ^= 1
    hashes = {first.content_hash}
    changes = [{"codes": changed}, {"ids": ["0", *ids[:-1]]}, {"labels": labels + 1}]
    for change in [*changes, {"views": ["flip"] * 30}]:
        hashes.add(write_shard(tmp_path / "c.parquet", **{**rows, **change}).content_hash)
    assert len(hashes) == 5


def test_writing_a_shard_loads_no_library_that_is_slow_to_load(tmp_path: Path) -> None:
    program = """
import sys, numpy as np, prior.shards, pathlib
codes, labels = [np.ones((1, 4), np.uint16)], np.zeros(1, np.int64)
rows = dict(ids=["x"], codes=codes, codebook_sizes=(300,), labels=labels)
prior.shards.write_shard(pathlib.Path(sys.argv[1]), **rows)
assert not {"pandas", "torch", "datasets"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "x.parquet"], check=True)


def test_the_names_of_classes_are_in_the_files(run: Path) -> None:
    """As `datasets` shows them; the folder's README says how, and its code runs there."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (run / "codes" / "README.md").read_text(), re.DOTALL
    )
    found: dict[str, Any] = {}
    with contextlib.chdir(run / "codes"):
        exec(block, found)
    rows = found["codes"]
    assert rows.features["label"].names == ["bag", "coat", "dress"]
    assert rows.features["label"].int2str(rows[0]["label"]) == rows[0]["id"].split("/")[0]


def test_shards_with_labels_of_32_bits_and_without_names_are_read(tmp_path: Path) -> None:
    """As earlier versions wrote them, with the same hash of the same rows."""
    codes, labels = write_dataset(tmp_path, shard_size=50)
    manifest, path = read_manifest(tmp_path), tmp_path / "train" / "00000.parquet"
    table = pq.read_table(path)
    place = table.schema.names.index("label")
    older = table.set_column(place, "label", table["label"].cast(pa.int32()))
    pq.write_table(older.replace_schema_metadata(None), path)
    record = record_shard(path, manifest.schema)
    assert record.content_hash == manifest.train[0].content_hash == content_hash([older])
    edit_manifest(tmp_path, train=(record,))
    assert read_manifest(tmp_path).codes_hash == manifest.codes_hash
    assert_holds(read_train(tmp_path).__getitems__(range(50)), codes, labels)


def test_the_content_hash_does_not_know_the_files_layout(tmp_path: Path) -> None:
    write_dataset(tmp_path, rows=40, shard_size=40)
    manifest = read_manifest(tmp_path)
    table = pq.read_table(tmp_path / "train" / "00000.parquet")
    pq.write_table(table, tmp_path / "other.parquet", compression="gzip", row_group_size=7)
    again = record_shard(tmp_path / "other.parquet", manifest.schema)
    assert again.content_hash == manifest.train[0].content_hash == content_hash([table])
    assert again.sha256 == file_hash(tmp_path / "other.parquet") != manifest.train[0].sha256


@pytest.mark.parametrize("wrong", [-1, 16])
def test_codes_out_of_range_are_not_written(wrong: int, tmp_path: Path) -> None:
    rows = {"ids": ["x"], "codes": [np.array([[3, wrong]])], "codebook_sizes": (16,)}
    with pytest.raises(UserError, match=r"codes_0 is .*codes from 0 to 15"):
        write_shard(tmp_path / "x.parquet", **rows)
    assert not list(tmp_path.iterdir())


def test_anyone_can_open_it(tmp_path: Path) -> None:
    codes, labels = write_dataset(tmp_path)
    opened = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert list(opened) == ["train"]
    train = opened["train"].with_format("numpy")
    assert train.column_names == ["id", "view", "codes_0", "codes_1", "label"]
    assert train.features["codes_1"] == datasets.List(datasets.Value("uint16"), length=24)
    assert all(np.array_equal(train[f"codes_{level}"][:], codes[level]) for level in range(2))
    assert np.array_equal(train["label"][:], labels)
    assert set(train["view"][:]) == {"original"}


@pytest.mark.parametrize("name", ["../../etc.parquet", "a/b.parquet", "x.pkl"])
def test_a_manifest_names_files_of_its_folder_only(name: str) -> None:
    with pytest.raises(UserError, match="a file name"):
        ShardRecord(name=name, rows=1, sha256="", content_hash="")


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "source": "elsewhere", "versions": {}}))
    read_manifest(tmp_path)  # where the codes come from is not what they are
    changes = [
        {"grids": [[3, 2], [4, 6]]},
        {"class_names": ["1", "0", "2"]},
        {"codebook_sizes": [16, 300]},
        {"train": data["train"][::-1]},
    ]
    sentence = rf"was edited: it says codes_hash {data['codes_hash'][:12]}, but"
    for change in changes:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(UserError, match=sentence):
            read_manifest(tmp_path)


def test_an_edited_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    manifest, shard = read_manifest(tmp_path), tmp_path / "train" / "00001.parquet"
    before, recorded = shard.read_bytes(), manifest.train[1].sha256[:12]
    sentence = rf"1.parquet was changed: its SHA-256 is \w+, but the manifest says {recorded}"
    for after in (before[:-1], before[:100] + bytes([before[100] ^ 1]) + before[101:], b""):
        shard.write_bytes(after)
        with pytest.raises(UserError, match=sentence):
            CodeDataset(tmp_path, manifest, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.parquet is not there"):
        CodeDataset(tmp_path, manifest, "train")


def assert_same_stream(one: CodeDataset, other: CodeDataset, *, first: int, batches: int) -> None:
    streams = [ShuffledLoader(dataset, 8, seed=3).start_at(first) for dataset in (one, other)]
    for a, b in itertools.islice(zip(*streams, strict=True), batches):
        assert torch.equal(a["labels"], b["labels"])
        assert all(map(torch.equal, a["codes"], b["codes"]))
        assert {codes.dtype for codes in a["codes"] + b["codes"]} == {torch.int64}


def test_codes_larger_than_memory_are_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order from any position on, from a cache that is made once."""
    codes, labels = write_dataset(tmp_path / "codes")
    manifest = read_manifest(tmp_path / "codes")
    in_memory = CodeDataset(tmp_path / "codes", manifest, "train")
    monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", 0)
    mapped = CodeDataset(tmp_path / "codes", manifest, "train", cache_dir=tmp_path / "cache")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 3
    assert_same_stream(in_memory, mapped, first=0, batches=15)
    assert_same_stream(in_memory, mapped, first=9, batches=3)
    chosen = [49, 0, 7]
    assert_holds(mapped.__getitems__(chosen), [level[chosen] for level in codes], labels[chosen])
    shutil.rmtree(tmp_path / "codes" / "train")
    CodeDataset(tmp_path / "codes", manifest, "train", num_levels=1, cache_dir=tmp_path / "cache")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(CodeDataset(tmp_path / "codes", manifest, "validation")) == 0


def test_training_rows_say_which_view_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ("flip", "original", "top_left", "flip_top_left")
    write_dataset(tmp_path, views=views)
    for memory in (prior.manifest.MEMORY_BYTES, 0):
        monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", memory)
        batch = read_train(tmp_path).__getitems__([0, 1, 2, 3, 45, 46])
        assert batch["views"].tolist() == [1, 0, 2, 3, 0, 2]
    edit_manifest(tmp_path, views=("original", "flip", "top_left"))
    with pytest.raises(UserError, match="holds rows of the view 'flip_top_left', not original, f"):
        read_train(tmp_path)
    edit_manifest(tmp_path, views=("flip", "top_left", "flip_top_left"))  # no original to sample
    assert "views" not in read_train(tmp_path).__getitems__([0, 1])


def test_a_cache_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path)
    monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", 0)

    # Not with a shard missing, nor on a full disk.
    last = tmp_path / "train" / "00002.parquet"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="is not there"):
        read_train(tmp_path)
    assert not [path for path in (tmp_path / ".decoded").rglob("*") if path.is_file()]
    last.write_bytes(content)
    sentence = r"needs 0.0 GiB .* its disk has 0.0 GiB: set another codes_cache"
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(UserError, match=sentence):
            read_train(tmp_path)

    # It is read through only where it was written to; a broken file is named; and `datasets` does
    # not see any of it.
    read_train(tmp_path)
    with mock.patch("prior.manifest.file_hash", side_effect=AssertionError):
        read_train(tmp_path)
    for file in (tmp_path / ".decoded").rglob("*.npy"):  # as copied
        os.utime(file, ns=(1, 1))
    read_train(tmp_path)
    (cached,) = (tmp_path / ".decoded").rglob("codes_1.npy")
    sentence = r"codes_1.npy is broken .* remove it, and it is made again"
    whole, other = cached.read_bytes(), cached.with_name("codes_0.npy").read_bytes()
    for broken in (whole[:-8], b"", other, bytes([*whole[:-1], whole[-1] ^ 1])):
        cached.write_bytes(broken)
        with pytest.raises(UserError, match=sentence):
            read_train(tmp_path)
    opened = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert opened["train"].num_rows == 50


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    """Any levels, grids, codebooks and rows; in one shard or many, in one row group or many."""
    sides = st.integers(1, 6)
    grids = tuple(data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3)))
    sizes = tuple(data.draw(st.sampled_from([1, 2, 17, 256, 257, 65536, 65537])) for _ in grids)
    rows, shard_size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    classes = data.draw(st.integers(0, 3))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior.shards, "ROW_GROUP_CODES", data.draw(st.integers(1, 2000)))
        codes, labels = write_dataset(
            Path(name), rows=rows, shard_size=shard_size, grids=grids, sizes=sizes, classes=classes
        )
        manifest = read_manifest(Path(name))
        for shard in manifest.train:
            assert record_shard(Path(name, "train", shard.name), manifest.schema) == shard
        batch = CodeDataset(Path(name), manifest, "train").__getitems__(range(rows))
        chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=5))
        table = read_rows(Path(name), manifest, "train", chosen)
    for level, (read, grid) in enumerate(zip(batch["codes"], grids, strict=True)):
        assert read.shape == (rows, *grid)
        assert np.array_equal(read.flatten(1), codes[level])
        values = flat_values(table[f"codes_{level}"])
        assert np.array_equal(values, codes[level][chosen].reshape(-1))
    assert ("labels" in batch) == bool(classes)
    assert not classes or np.array_equal(batch["labels"], labels)
    assert table["id"].to_pylist() == [f"{i:04d}.png" for i in chosen]


def test_shards_without_rows(tmp_path: Path) -> None:
    """A shard of a stream may hold no image of a split."""
    write_dataset(tmp_path, rows=30)
    manifest, path = read_manifest(tmp_path), tmp_path / "train" / "empty.parquet"
    codes = [np.zeros((0, 6), np.int64), np.zeros((0, 24), np.int64)]
    labels = np.zeros(0, np.int64)
    record = write_shard(path, ids=[], codes=codes, codebook_sizes=(17, 300), labels=labels)
    assert record_shard(path, manifest.schema) == record
    write_manifest(tmp_path, dataclasses.replace(manifest, train=(record, *manifest.train)))
    assert len(read_train(tmp_path)) == 30


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_dataset_is_refused_or_the_same(data: st.DataObject) -> None:
    """Whatever becomes of a file's bytes: a sentence, or the very rows that were written."""
    with tempfile.TemporaryDirectory() as name:
        codes, labels = write_dataset(Path(name))
        path = Path(name) / data.draw(st.sampled_from(["manifest.json", "train/00001.parquet"]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        length = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:length] if data.draw(st.booleans()) else content)
        refusal, batch = None, {}
        try:
            batch = read_train(Path(name)).__getitems__(range(len(labels)))
        except UserError as error:
            refusal = str(error)
    if refusal is None:
        assert_holds(batch, codes, labels)
        return
    assert "\n" not in refusal
    assert str(path) in refusal or f"{name}/train" in refusal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_manifest_of_other_values_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_dataset(Path(name), rows=5)
        path = Path(name) / "manifest.json"
        content = json.loads(path.read_text())
        keys = [key for key in content if key not in ("source", "versions")]
        key = data.draw(st.sampled_from(keys))
        changed = data.draw(JSON.filter(lambda value: value != content[key]))
        path.write_text(json.dumps({**content, key: changed}))
        with pytest.raises(UserError, match=r"^[^\n]*manifest\.json"):
            read_manifest(Path(name))


COLUMNS = r"00000.parquet is broken .it has the columns .*, not "
OTHER_MEANINGS = [
    ({"grids": ((3, 3), (4, 6))}, COLUMNS),
    ({"codebook_sizes": (17, 200)}, COLUMNS),
    ({"codebook_sizes": (17, 257)}, r"codes_1 ranges from 0 to 29\d, but there are 257 codes"),
    ({"class_names": ()}, COLUMNS),
    ({"class_names": ("a", "b")}, r"label ranges from 0 to 2, but there are 2 classes"),
]


@pytest.mark.parametrize(("meaning", "sentence"), OTHER_MEANINGS)
def test_a_manifest_of_another_meaning_is_refused(
    meaning: dict, sentence: str, tmp_path: Path
) -> None:
    """Even if whoever changed it renewed its hash: the shards say something else."""
    write_dataset(tmp_path)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), **meaning))
    with pytest.raises(UserError, match=sentence):
        read_train(tmp_path)


def test_codes_without_rows_to_train_on_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "codes")
    edit_manifest(tmp_path / "codes", train=())
    words = ("--codes", tmp_path / "codes", "--level", "top", "--output-dir", tmp_path / "out")
    command("train-prior", *words, code=2)
    assert "holds no rows to train on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("image", [3, {}, {"channels": 3}, {"channels": "3", "size": [8]}])
def test_what_the_images_were_is_known_or_null(image: object, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.values_per_image == 3 * 64 * 64
    assert dataclasses.replace(manifest, preprocessing=None).values_per_image == 0
    with pytest.raises(UserError, match=r"preprocessing is .*, but must be null, or a mapping"):
        dataclasses.replace(manifest, preprocessing=image)


def test_a_prior_learns_the_same_from_codes_larger_than_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train-prior", "--config", "tiny", "--codes", run / "codes", "--level", "bottom")
    train += ("--vqvae", run / "vqvae", "--picture-every", 5, "--num-steps", 5, "--output-dir")
    command(*train, tmp_path / "in_memory")
    monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", 0)
    command(*train, tmp_path / "mapped", "--codes-cache", tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6
    assert not (run / "codes" / ".decoded").exists()
    weights = Path("checkpoints", "step_00000005", "model.safetensors")
    in_memory, mapped = (tmp_path / name / weights for name in ("in_memory", "mapped"))
    assert in_memory.read_bytes() == mapped.read_bytes()
