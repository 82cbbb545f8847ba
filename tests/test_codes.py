"""Codes on disk and back: as small as their entropy allows, the same bytes for the same rows, and nothing that was changed since is read."""

import dataclasses
import itertools
import json
import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prior.manifest
import prior.shards
from prior.manifest import CodeDataset, Manifest, read_manifest, read_rows, write_manifest
from prior.shards import ShardRecord, content_hash, file_hash, flat_values, write_shard
from tests.conftest import command, record_shard
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ShuffledLoader

PREPROCESSING = {"size": [64], "channels": 3}


def random_codes(
    rows: int, grids: tuple[tuple[int, int], ...], sizes: tuple[int, ...], seed: int = 0
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, size, (rows, h * w)) for (h, w), size in zip(grids, sizes, strict=True)]


def write_dataset(
    folder: Path,
    *,
    rows: int = 50,
    shard_size: int = 20,
    grids: tuple[tuple[int, int], ...] = ((2, 3), (4, 6)),
    sizes: tuple[int, ...] = (17, 300),
    classes: int = 3,
) -> tuple[list[np.ndarray], np.ndarray]:  # type: ignore[no-untyped-def]
    """A code dataset of random codes, all of it in train/; the codes and labels."""
    codes, labels = random_codes(rows, grids, sizes), np.arange(rows) % max(classes, 1)
    shards = []
    for number, first in enumerate(range(0, rows, shard_size)):
        part = slice(first, first + shard_size)
        given = {
            "ids": [f"{i:04d}.png" for i in range(rows)[part]],
            "codes": [level[part] for level in codes],
            "labels": labels[part] if classes else None,
        }
        shards.append(
            write_shard(folder / "train" / f"{number:05d}.parquet", codebook_sizes=sizes, **given)
        )
    manifest = Manifest(
        encoder_hash="e" * 64, grids=grids, codebook_sizes=sizes, class_names=tuple(map(str, range(classes))), rows_hash="", preprocessing=PREPROCESSING,
        train=tuple(shards),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return codes, labels


@pytest.mark.parametrize(("size", "rows"), [(256, 1000), (512, 1000), (1024, 1000), (8192, 8000)])
def test_code_columns_take_what_uniform_codes_need(tmp_path: Path, size: int, rows: int) -> None:
    """Within 5 % of ceil(log2 K) bits per code, on the small grids where all that is not code weighs most."""
    write_shard(
        tmp_path / "x.parquet",
        ids=["x"] * rows,
        codes=random_codes(rows, ((8, 8), (16, 16)), (size, size)),
        codebook_sizes=(size, size),
    )
    file = pq.ParquetFile(tmp_path / "x.parquet").metadata
    for column, codes in ((2, 64), (3, 256)):
        taken = sum(
            file.row_group(i).column(column).total_compressed_size
            for i in range(file.num_row_groups)
        )
        assert taken * 8 <= 1.05 * rows * codes * math.ceil(math.log2(size))


def test_the_same_rows_give_the_same_bytes_and_others_another_hash(tmp_path: Path) -> None:
    codes, labels = random_codes(30, ((2, 2), (4, 4)), (5, 300)), np.arange(30)
    rows = {
        "ids": [str(i) for i in range(30)],
        "codes": codes,
        "codebook_sizes": (5, 300),
        "labels": labels,
    }
    first = write_shard(tmp_path / "a.parquet", **rows)
    second = write_shard(tmp_path / "b.parquet", **rows)
    assert dataclasses.replace(second, name=first.name) == first
    changed = [level.copy() for level in codes]
    changed[1][7, 3] ^= 1
    others = [
        {**rows, "codes": changed},
        {**rows, "ids": ["0", *rows["ids"][:-1]]},
        {**rows, "labels": labels + 1},
        {**rows, "views": ["flip"] * 30},
    ]
    hashes = {write_shard(tmp_path / "c.parquet", **other).content_hash for other in others} | {
        first.content_hash
    }
    assert len(hashes) == 5


def test_the_content_hash_does_not_know_the_files_layout(tmp_path: Path) -> None:
    write_dataset(tmp_path, rows=40, shard_size=40)
    manifest = read_manifest(tmp_path)
    table = pq.read_table(tmp_path / "train" / "00000.parquet")
    pq.write_table(table, tmp_path / "other.parquet", compression="gzip", row_group_size=7)
    again = record_shard(tmp_path / "other.parquet", manifest.schema)
    assert again.content_hash == manifest.train[0].content_hash == content_hash([table])
    assert again.sha256 == file_hash(tmp_path / "other.parquet") != manifest.train[0].sha256


def test_codes_that_are_none_are_not_written(tmp_path: Path) -> None:
    for wrong in (-1, 16):
        with pytest.raises(UserError, match=r"codes_0 is .*codes from 0 to 15"):
            write_shard(
                tmp_path / "x.parquet",
                ids=["x"],
                codes=[np.array([[3, wrong]])],
                codebook_sizes=(16,),
            )
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
    for change in changes:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(
            UserError, match=rf"was edited: it says codes_hash {data['codes_hash'][:12]}, but"
        ):
            read_manifest(tmp_path)


def test_an_edited_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    manifest, shard = read_manifest(tmp_path), tmp_path / "train" / "00001.parquet"
    bytes_before = shard.read_bytes()
    for bytes_after in (
        bytes_before[:-1],
        bytes_before[:100] + bytes([bytes_before[100] ^ 1]) + bytes_before[101:],
        b"",
    ):
        shard.write_bytes(bytes_after)
        with pytest.raises(
            UserError,
            match=rf"00001.parquet was changed: its SHA-256 is \w+, but the manifest says {manifest.train[1].sha256[:12]}",
        ):
            CodeDataset(tmp_path, manifest, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.parquet is not there"):
        CodeDataset(tmp_path, manifest, "train")


def assert_same_stream(one: CodeDataset, other: CodeDataset, *, first: int, batches: int) -> None:
    streams = [ShuffledLoader(dataset, 8, seed=3).start_at(first) for dataset in (one, other)]
    for a, b in itertools.islice(zip(*streams, strict=True), batches):
        assert torch.equal(a["labels"], b["labels"])
        assert all(
            torch.equal(x, y) and x.dtype == torch.int64
            for x, y in zip(a["codes"], b["codes"], strict=True)
        )


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
    batch = mapped.__getitems__([49, 0, 7])
    assert all(
        np.array_equal(read.flatten(1), level[[49, 0, 7]])
        for read, level in zip(batch["codes"], codes, strict=True)
    )
    assert batch["labels"].tolist() == labels[[49, 0, 7]].tolist()
    shutil.rmtree(tmp_path / "codes" / "train")
    CodeDataset(tmp_path / "codes", manifest, "train", num_levels=1, cache_dir=tmp_path / "cache")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(CodeDataset(tmp_path / "codes", manifest, "validation")) == 0


def test_a_cache_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path)
    manifest, last = read_manifest(tmp_path), tmp_path / "train" / "00002.parquet"
    monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", 0)
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="is not there"):
        CodeDataset(tmp_path, manifest, "train")
    assert not [path for path in (tmp_path / ".decoded").rglob("*") if path.is_file()]
    last.write_bytes(kept)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(
            UserError, match=r"needs 0.0 GiB .* its disk has 0.0 GiB: set another codes_cache"
        ):
            CodeDataset(tmp_path, manifest, "train")
    CodeDataset(tmp_path, manifest, "train")
    (cached,) = (tmp_path / ".decoded").rglob("codes_1.npy")
    for broken in (cached.read_bytes()[:-8], b"", cached.with_name("codes_0.npy").read_bytes()):
        cached.write_bytes(broken)
        with pytest.raises(
            UserError, match=r"codes_1.npy is broken .* remove it, and it is made again"
        ):
            CodeDataset(tmp_path, manifest, "train")
    assert (
        datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"].num_rows
        == 50
    )  # the cache disturbs nobody


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    """Any number of levels, grids, codebooks and rows; rows in one shard or many, in one row group or many."""
    grids = tuple(
        data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    )
    sizes = tuple(data.draw(st.sampled_from([1, 2, 17, 256, 257, 65536, 65537])) for _ in grids)
    rows, shard_size, classes = (
        data.draw(st.integers(1, 60)),
        data.draw(st.integers(1, 60)),
        data.draw(st.integers(0, 3)),
    )
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior.shards, "ROW_GROUP_CODES", data.draw(st.integers(1, 2000)))
        codes, labels = write_dataset(
            Path(name), rows=rows, shard_size=shard_size, grids=grids, sizes=sizes, classes=classes
        )
        manifest = read_manifest(Path(name))
        assert [
            record_shard(Path(name, "train", shard.name), manifest.schema)
            for shard in manifest.train
        ] == list(manifest.train)
        batch = CodeDataset(Path(name), manifest, "train").__getitems__(range(rows))
        chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=5))
        table = read_rows(Path(name), manifest, "train", chosen)
    for level, (read, grid) in enumerate(zip(batch["codes"], grids, strict=True)):
        assert read.shape == (rows, *grid)
        assert np.array_equal(read.flatten(1), codes[level])
        assert np.array_equal(
            flat_values(table[f"codes_{level}"]), codes[level][chosen].reshape(-1)
        )
    assert ("labels" in batch) == bool(classes)
    assert not classes or np.array_equal(batch["labels"], labels)
    assert table["id"].to_pylist() == [f"{i:04d}.png" for i in chosen]


def test_shards_without_rows(tmp_path: Path) -> None:
    """A part of a stream may hold no image of a split."""
    write_dataset(tmp_path, rows=30)
    manifest = read_manifest(tmp_path)
    empty = [np.zeros((0, 6), np.int64), np.zeros((0, 24), np.int64)]
    record = write_shard(
        tmp_path / "train" / "empty.parquet",
        ids=[],
        codes=empty,
        codebook_sizes=(17, 300),
        labels=np.zeros(0, np.int64),
    )
    assert record_shard(tmp_path / "train" / "empty.parquet", manifest.schema) == record
    write_manifest(tmp_path, dataclasses.replace(manifest, train=(record, *manifest.train)))
    assert len(CodeDataset(tmp_path, read_manifest(tmp_path), "train")) == 30


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_dataset_is_refused_or_the_same(data: st.DataObject) -> None:
    """Whatever becomes of the manifest's or a shard's bytes: a sentence, or the very rows that were written."""
    with tempfile.TemporaryDirectory() as name:
        codes, labels = write_dataset(Path(name))
        path = Path(name) / data.draw(st.sampled_from(["manifest.json", "train/00001.parquet"]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(
            content[: data.draw(st.integers(0, len(content)))]
            if data.draw(st.booleans())
            else content
        )
        said = None
        try:
            batch = CodeDataset(Path(name), read_manifest(Path(name)), "train").__getitems__(
                range(len(labels))
            )
        except UserError as error:
            said = str(error)
    if said is not None:
        assert "\n" not in said
        assert str(path) in said or f"{name}/train" in said
        return
    assert all(
        np.array_equal(read.flatten(1), level)
        for read, level in zip(batch["codes"], codes, strict=True)
    )
    assert np.array_equal(batch["labels"], labels)


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
        key = data.draw(
            st.sampled_from([key for key in content if key not in ("source", "versions")])
        )
        changed = data.draw(JSON.filter(lambda value: value != content[key]))
        path.write_text(json.dumps({**content, key: changed}))
        with pytest.raises(UserError, match=r"^[^\n]*manifest\.json"):
            read_manifest(Path(name))


@pytest.mark.parametrize(
    ("meaning", "sentence"),
    [
        ({"grids": ((3, 3), (4, 6))}, r"00000.parquet is broken .it has the columns .*, not "),
        ({"codebook_sizes": (17, 200)}, r"00000.parquet is broken .it has the columns"),
        (
            {"codebook_sizes": (17, 257)},
            r"00000.parquet: codes_1 reaches from 0 to 29\d, but there are 257 codes",
        ),
        ({"class_names": ()}, r"00000.parquet is broken .it has the columns"),
        (
            {"class_names": ("a", "b")},
            r"00000.parquet: label reaches from 0 to 2, but there are 2 classes",
        ),
    ],
)
def test_a_manifest_of_another_meaning_is_refused(
    meaning: dict, sentence: str, tmp_path: Path
) -> None:
    """Even if whoever changed it made its hash anew: the shards say something else."""
    write_dataset(tmp_path)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), **meaning))
    with pytest.raises(UserError, match=sentence):
        CodeDataset(tmp_path, read_manifest(tmp_path), "train")


def test_a_prior_learns_the_same_from_codes_larger_than_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = (
        "train-prior",
        "--config",
        "tiny",
        "--codes",
        run / "codes",
        "--level",
        "bottom",
        "--picture-every",
        0,
        "--output-dir",
    )
    command(*train, tmp_path / "in_memory", "--num-steps", 5)
    monkeypatch.setattr(prior.manifest, "MEMORY_BYTES", 0)
    command(*train, tmp_path / "mapped", "--codes-cache", tmp_path / "cache", "--num-steps", 5)
    weights = [
        tmp_path / name / "checkpoints" / "step_00000005" / "model.safetensors"
        for name in ("in_memory", "mapped")
    ]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6
    assert not (run / "codes" / ".decoded").exists()
    assert weights[0].exists()
    assert weights[0].read_bytes() == weights[1].read_bytes()
