"""Streams: every row once an epoch, from any position; nothing held out is trained on; no member
of a tar vanishes."""

import gzip
import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.images import (
    GREY,
    UNCHANGED,
    encoded,
    ids_of,
    items_of,
    load,
    numbered_tars,
    shades,
    shards_at,
    stream,
    write_members,
    write_tar,
)
from vqvae2.common.errors import UserError
from vqvae2.config import DataConfig, ImagesConfig
from vqvae2.data import BadImage, held_out_images, open_source
from vqvae2.data.paths import expand_ranges
from vqvae2.data.work_parts import find_parts, read_items


def write_table(path: Path, shade: int = 0, **columns: list) -> Path:
    """A Parquet file of six pictures."""
    cells = [encoded(shade + i) for i in range(6)]
    pq.write_table(pa.table({"image": cells, **columns}), path)
    return path


# Order


def test_a_stream_gives_every_row_once_an_epoch_and_starts_anywhere(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=4, rows=12)
    seen = shades(stream(tars, shuffle_buffer=12).start_at(0), 12)
    assert sorted(seen[:48]) == list(range(48)) == sorted(seen[48:])
    assert seen[:48] != sorted(seen[:48])
    assert seen[:48] != seen[48:]
    for index in (1, 3, 5, 7, 11):
        later = shades(stream(tars, shuffle_buffer=12).start_at(index), 1)
        assert later == seen[index * 8 : index * 8 + 8]

    # The same for any number of processes, and wherever the shards are.
    for processes in (2, 4, 8):
        rows: list[int] = []
        for rank in range(processes):
            place = {"num_processes": processes, "process_index": rank}
            rows += shades(stream(tars, shuffle_buffer=12, **place).start_at(2), 1)
        assert rows == seen[16:24]
    moved = tars.rename(tmp_path / "other")
    assert shades(stream(moved, shuffle_buffer=12).start_at(0), 12) == seen


def test_parquet_and_urls_stream_too(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for number in range(3):
        file = write_table(tmp_path / "x.parquet", number * 6)
        system.pipe(f"/bucket/p{number}.parquet", file.read_bytes())
    for path in ("memory://bucket/p*.parquet", "memory://bucket/p{0..2}.parquet"):
        assert sorted(shades(stream(path, 6).start_at(0), 3)) == list(range(18))
    with pytest.raises(UserError, match=r"add --data\.streaming"):
        load("memory://bucket/p0.parquet")
    with pytest.raises(UserError, match="cannot be opened"):
        next(stream("memory://bucket/none.tar").start_at(0))


def test_a_stream_of_tables_starts_anywhere_with_some_rows_held_out(tmp_path: Path) -> None:
    for number in range(5):
        write_table(tmp_path / f"{number}.parquet", number * 6)
    config = replace(GREY, validation_fraction=0.3)
    seen = shades(stream(tmp_path, 4, config, shuffle_buffer=12).start_at(0), 15)
    assert 12 < len(set(seen)) < 28
    for index in range(1, 15):
        later = shades(stream(tmp_path, 4, config, shuffle_buffer=12).start_at(index), 1)
        assert later == seen[index * 4 : index * 4 + 4]


def test_a_stream_of_a_hub_id_is_its_parquet_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def listing(urls: list[str]) -> tuple[object, str, list[str]]:
        asked.extend(urls)
        return fsspec.filesystem("memory"), "", []

    monkeypatch.setattr(fsspec, "get_fs_token_paths", listing)
    with pytest.raises(UserError, match=r"holds no .tar or .parquet shard"):
        shards_at("someone/photos")
    assert asked == ["hf://datasets/someone/photos/**/*.parquet"]


def test_patterns(tmp_path: Path) -> None:
    assert expand_ranges("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert len(expand_ranges("{0..1}{0..1}")) == 4
    tars = numbered_tars(tmp_path / "x", shards=2, rows=1)
    assert shards_at(f"{tars}/*{{0..1}}*.tar").urls == shards_at(f"{tars}/*.tar").urls  # each once


# Held out, labels


def test_streams_hold_out_and_skip(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=40)
    config, data = replace(GREY, validation_fraction=0.2), DataConfig(path=str(tars))
    held_out, _ = held_out_images(data, config)
    assert not len(held_out_images(data, GREY)[0])
    trained = set(shades(stream(tars, config=config).start_at(0), 60))
    kept = set(held_out.pixel_rows(range(len(held_out)))[:, 0, 0, 0].tolist())
    assert 10 < len(kept) < 40
    assert not trained & kept
    assert trained | kept == set(range(120))

    # A broken image stops, or is skipped: every process has as many rows.
    write_tar(tars / "003.tar", {"bad.png": b""})
    with pytest.raises(BadImage, match="003/bad"):
        shades(stream(tars).start_at(0), 20)
    skipped: list[str] = []
    skip = {"on_error": "skip", "on_skipped": lambda name, reason: skipped.append(name)}
    batches = islice(stream(tars, **skip).start_at(0), 20)
    assert {len(batch["images"]) for batch in batches} == {8}
    assert skipped == ["003/bad"]
    (tars / "003.tar").write_bytes((tars / "002.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"003\.tar cannot be read as a tar shard"):
        shades(stream(tars, on_error="skip").start_at(0), 30)


def test_shards_of_held_out_splits_are_never_trained_on(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=4, rows=3)
    for i, shard in enumerate(sorted(tars.iterdir())):
        target = tmp_path / "split" / ("val" if i == 3 else "train") / shard.name
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(shard, target)
    data = DataConfig(path=str(tmp_path / "split"))
    for split, expected in (("train", {"000", "001", "002"}), ("validation", {"003"})):
        assert {name.split("/")[0] for name in ids_of(data, split)} == expected
    assert held_out_images(data, GREY)[0].ids == ["003/0000", "003/0001", "003/0002"]
    assert len(shards_at(tmp_path / "split" / "val")) == 1


def test_no_shard_is_trained_on_and_held_out(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=2)
    (tmp_path / "link").symlink_to(tars)
    for path, held_out in (
        (tars / "*.tar", tars / "002.tar"),
        (tars, tars / "{001..002}.tar"),
        (tars / "000.tar", tmp_path / "link"),
        (tars / "000.tar", tmp_path / "link" / "000.tar"),
        (f"file://{tars}/000.tar", tars / "000.tar"),
    ):
        data = ImagesConfig(path=str(path), validation_path=str(held_out), streaming=True)
        with pytest.raises(UserError, match="would be trained on"):
            open_source(data, GREY)
    apart = ImagesConfig(path=f"{tars}/{{000..001}}.tar", validation_path=f"{tars}/002.tar")
    assert ids_of(apart, "validation") == ["002/0000", "002/0001"]
    alone = replace(apart, validation_path=None)
    assert find_parts(apart, GREY, 10).facts != find_parts(alone, GREY, 10).facts


def test_held_out_labels_of_a_stream_are_its_numbers(photos: Path, tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=4)
    train, held_out = f"{tars}/{{000..001}}.tar", f"{tars}/002.tar"
    data = ImagesConfig(path=train, validation_path=held_out, streaming=True)
    assert [item.label for item in items_of(data)] == list(range(12))
    unlabelled = numbered_tars(tmp_path / "y", shards=1, rows=2, labelled=False)
    for other, message in (
        (unlabelled, "y has no label, but the first has one"),
        (photos, "photos has no label"),
    ):
        with pytest.raises(UserError, match=message):
            find_parts(replace(data, validation_path=str(other)), GREY, 10)


def test_columns_of_a_stream_are_those_of_a_table(tmp_path: Path) -> None:
    # Classes by the type that `datasets` wrote.
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    cells = [{"bytes": encoded(), "path": None}] * 6
    table = datasets.Dataset.from_dict({"image": cells, "kind": [0, 1] * 3}, features=features)
    table.to_parquet(tmp_path / "typed.parquet")
    assert {row.label for row in shards_at(tmp_path / "typed.parquet").all_rows()} == {0, 1}
    with pytest.raises(UserError, match=r"correct --data\.label-column"):
        next(stream(tmp_path / "typed.parquet", label_column="knid").start_at(0))

    # What a stream cannot keep apart is refused.
    for columns, message in (
        ({"id": ["a"] * 6}, "'a' twice"),
        ({"split": ["train", "test"] * 3}, "column 'split'"),
    ):
        path = write_table(tmp_path / "x.parquet", **columns)
        with pytest.raises(UserError, match=message):
            next(stream(path, batch_size=2).start_at(0))


def test_labels_of_a_stream_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    junk = ["__MACOSX/cat/x.png", "@eaDir/x.png", "cat/._a.png"]
    tar = write_members(tmp_path / "x.tar", ["cat/a.png", "dog/b.png", *junk])
    table = write_table(tmp_path / "x.parquet", **{"class": [0] * 6})
    for path, message in ((tar, "the folders cat, dog"), (table, "the columns class")):
        data = ImagesConfig(path=str(path), streaming=True)
        assert {item.label for item in items_of(data)} == {None}
        assert f"no classes: {message} are not used" in caplog.text
    assert len(items_of(ImagesConfig(path=str(tar)))) == 2
    path = write_table(tmp_path / "y.parquet", label=[True, False] * 3)
    assert [row.label for row in shards_at(path).all_rows()] == [1, 0] * 3
    path = write_table(tmp_path / "z.parquet", label=["x" * 9999] * 6)
    with pytest.raises(UserError, match="label-column none") as error:
        list(shards_at(path).all_rows())
    assert len(str(error.value)) < 400
    data = ImagesConfig(path=str(path), streaming=True, label_column="none")
    assert {item.label for item in items_of(data)} == {None}


# Members of tars


def read(*members: str, path: Path, skip: bool = False) -> list[tuple[str, int | None]]:
    write_members(path, list(members))
    rows = read_items(items_of(ImagesConfig(path=str(path))), UNCHANGED, skip=skip, num_threads=2)
    return [(row.item.id, row.item.label) for row in rows if not row.error]


def test_no_member_of_a_tar_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    labelled = read("a.png", "a.cls", "d/b.png", "d/b.cls", path=path)
    assert labelled == [("x/a", 3), ("x/d/b", 3)]
    assert read("a.image.png", "b.image.png", path=path) == [("x/a", None), ("x/b", None)]
    with pytest.raises(UserError, match=r"a\.cls comes apart from the row 'a'"):
        read("a.png", "b.png", "a.cls", path=path)
    for names, fault in (
        (["a.png", "b.svg"], "only b.svg"),
        (["b.1.png", "b.2.png"], "2 pictures"),
    ):
        with pytest.raises(BadImage, match=rf"x/b: .*{fault}"):
            read(*names, path=path)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("caf\xe9.png"))
    with pytest.raises(UserError, match=r"x\.tar holds .*, which is not UTF-8: rename it"):
        list(shards_at(path).rows(0, contents=True))
    members = ["a.png", "a.cls", "b.svg", "c.png", "c.cls"]
    assert read(*members, path=path, skip=True) == [("x/a", 3), ("x/c", 3)]


def test_links_in_a_tar_are_named_or_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "links.tar", {"a.png": encoded(), "b.png": "a.png"})
    with pytest.raises(UserError, match=r"b\.png, a link"):
        list(read_items(items_of(ImagesConfig(path=str(path))), UNCHANGED, skip=False))
    members = {"README.txt": b"x", "a.png": encoded(), "a.cls": b"3", "latest": "a.png"}
    path = write_tar(tmp_path / "x.tar", members)
    held_out = numbered_tars(tmp_path / "held_out", shards=1, rows=2)
    data = ImagesConfig(path=str(path), validation_path=str(held_out), on_error="skip")
    assert ids_of(data, "train") == ["x/README", "x/a"]


def test_tars_that_were_joined_with_cat_are_refused(tmp_path: Path) -> None:
    first, second = (write_members(tmp_path / f"{n}.tar", [f"{n}.png"]) for n in "pq")
    path = tmp_path / "cat.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    for contents in (True, False):
        with pytest.raises(UserError, match="after the mark of its end"):
            list(shards_at(path).rows(0, contents=contents))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_that_is_cut_off_anywhere_is_refused(suffix: str, tmp_path: Path) -> None:
    content = (numbered_tars(tmp_path / "x", shards=1, rows=6) / "000.tar").read_bytes()
    content = content if suffix == ".tar" else gzip.compress(content)
    path = tmp_path / f"cut{suffix}"
    for contents in (True, False):  # read whole, or from header to header
        path.write_bytes(content)
        assert len(list(shards_at(path).rows(0, contents=contents))) == 6
        end = len(content) if suffix == ".tar.gz" else len(content.rstrip(b"\0"))
        for size in [*range(700, end - 600, 512), *range(1000, end - 600, 777)]:
            path.write_bytes(content[:size])
            with pytest.raises(UserError, match="cannot be read as a tar shard"):
                list(shards_at(path).rows(0, contents=contents))


def test_lists_among_the_features_of_a_table_stream(tmp_path: Path) -> None:
    tags = {"tags": [{"dtype": "int64", "_type": "Value"}]}
    features = {**tags, "label": {"_type": "ClassLabel", "names": ["a"]}}
    written = pa.table({"image": [encoded()] * 8})
    noted = written.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(noted, tmp_path / "x.parquet")
    assert len(next(stream(tmp_path / "x.parquet").start_at(0))["images"]) == 8
