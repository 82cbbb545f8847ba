"""Codes on disk and back: as small as their entropy allows, the same bytes for the same rows, and nothing that was changed since is read."""

import dataclasses
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from prior.code_shards import ShardRecord, content_hash, file_hash, record_shard, write_shard
from prior.codes import CodeDataset, Manifest, read_manifest, write_manifest
from vqvae2.common.errors import UserError

PREPROCESSING = {"size": [64], "channels": 3}


def random_codes(rows: int, grids: tuple[tuple[int, int], ...], sizes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
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
        given = {"ids": [f"{i:04d}.png" for i in range(rows)[part]], "codes": [level[part] for level in codes], "labels": labels[part] if classes else None}
        shards.append(write_shard(folder / "train" / f"{number:05d}.parquet", codebook_sizes=sizes, **given))
    manifest = Manifest(
        encoder_hash="e" * 64, grids=grids, codebook_sizes=sizes, class_names=tuple(map(str, range(classes))), rows_hash="", preprocessing=PREPROCESSING,
        train=tuple(shards),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return codes, labels


@pytest.mark.parametrize(("size", "rows"), [(256, 1000), (512, 1000), (1024, 1000), (8192, 8000)])
def test_code_columns_take_what_uniform_codes_need(tmp_path: Path, size: int, rows: int) -> None:
    """Within 5 % of ceil(log2 K) bits per code, on the small grids where all that is not code weighs most."""
    write_shard(tmp_path / "x.parquet", ids=["x"] * rows, codes=random_codes(rows, ((8, 8), (16, 16)), (size, size)), codebook_sizes=(size, size))
    file = pq.ParquetFile(tmp_path / "x.parquet").metadata
    for column, codes in ((2, 64), (3, 256)):
        taken = sum(file.row_group(i).column(column).total_compressed_size for i in range(file.num_row_groups))
        assert taken * 8 <= 1.05 * rows * codes * math.ceil(math.log2(size))


def test_the_same_rows_give_the_same_bytes_and_others_another_hash(tmp_path: Path) -> None:
    codes, labels = random_codes(30, ((2, 2), (4, 4)), (5, 300)), np.arange(30)
    rows = {"ids": [str(i) for i in range(30)], "codes": codes, "codebook_sizes": (5, 300), "labels": labels}
    first = write_shard(tmp_path / "a.parquet", **rows)
    second = write_shard(tmp_path / "b.parquet", **rows)
    assert dataclasses.replace(second, name=first.name) == first
    changed = [level.copy() for level in codes]
    changed[1][7, 3] ^= 1
    others = [{**rows, "codes": changed}, {**rows, "ids": ["0", *rows["ids"][:-1]]}, {**rows, "labels": labels + 1}, {**rows, "views": ["flip"] * 30}]
    hashes = {write_shard(tmp_path / "c.parquet", **other).content_hash for other in others} | {first.content_hash}
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
            write_shard(tmp_path / "x.parquet", ids=["x"], codes=[np.array([[3, wrong]])], codebook_sizes=(16,))
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
    changes = [{"grids": [[3, 2], [4, 6]]}, {"class_names": ["1", "0", "2"]}, {"codebook_sizes": [16, 300]}, {"train": data["train"][::-1]}]
    for change in changes:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(UserError, match=rf"was edited: it says codes_hash {data['codes_hash'][:12]}, but"):
            read_manifest(tmp_path)


def test_an_edited_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    manifest, shard = read_manifest(tmp_path), tmp_path / "train" / "00001.parquet"
    bytes_before = shard.read_bytes()
    for bytes_after in (bytes_before[:-1], bytes_before[:100] + bytes([bytes_before[100] ^ 1]) + bytes_before[101:], b""):
        shard.write_bytes(bytes_after)
        with pytest.raises(UserError, match=rf"00001.parquet was changed: its SHA-256 is \w+, but the manifest says {manifest.train[1].sha256[:12]}"):
            CodeDataset(tmp_path, manifest, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.parquet is not there"):
        CodeDataset(tmp_path, manifest, "train")
