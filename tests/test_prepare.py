"""Prepared folders hold what their sources give, whatever happens while they are written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import ROOT, command, kill_when, two_processes, write_images
from tests.images import items_of, load, numbered_tars, shell, spoil
from vqvae2.common.errors import UserError
from vqvae2.config import ImagesConfig, PrepareConfig, PreprocessingConfig
from vqvae2.data import ImageSplits
from vqvae2.data.augmentation import no_change
from vqvae2.data.prepared import prepare_command

IMAGE = PreprocessingConfig(size=(24, 32), channels=3, validation_fraction=0.2)
FLAGS = ["--image.size", "24", "32", "--image.validation-fraction", "0.2", "--shard-size", "16"]


def assert_same(one: ImageSplits, other: ImageSplits) -> None:
    for (_, mine), (_, theirs) in zip(one.items(), other.items(), strict=True):
        assert mine.ids == theirs.ids
        rows, expected = (dataset.__getitems__(range(len(dataset))) for dataset in (mine, theirs))
        assert all(torch.equal(rows[key], expected[key]) for key in expected)
    assert one.class_names == other.class_names


def files_of(folder: Path) -> dict[str, bytes]:
    shards = sorted(folder.rglob("*.parquet"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in shards}


def test_prepared_images_are_those_of_the_source(photos: Path, tmp_path: Path) -> None:
    command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
    assert_same(load(tmp_path / "x", IMAGE), load(photos, IMAGE))
    with mock.patch("datasets.load_dataset", None):  # which would copy them
        assert load(tmp_path / "x", IMAGE).train.prepared
    # Prepared once more in another size, for random crops.
    smaller = load(tmp_path / "x", replace(IMAGE, size=(16,)))
    assert smaller.train.pixels(0).shape == (3, 16, 16)
    image = ["--image.channels", 3, "--image.background", "white"]
    image += ["--image.validation-fraction", 0.2]
    shell(
        "train --config tiny",
        *image,
        "--data.path",
        tmp_path / "x",
        "--data.augmentation.crop",
        "random",
        "--num-steps",
        2,
        "--output-dir",
        tmp_path / "run",
    )


def test_preparation_is_the_same_when_killed_and_on_two_processes(
    photos: Path, tmp_path: Path
) -> None:
    command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
    shards = tmp_path / "killed" / "train"
    arguments = ["prepare", "--data.path", photos, "--output-dir", tmp_path / "killed", *FLAGS]
    kill_when(lambda: len(list(shards.glob("*.parquet"))) >= 2, *arguments)
    times = {path: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    done = [pq.read_metadata(path).num_rows for path in shards.parent.glob("*/[0-9]*.parquet")]
    first, other = two_processes(ROOT / "scripts" / "prepare.py", *arguments[1:])
    left = 150 - sum(done)  # which both of them have seen, and one counts
    if left:  # the first process may have been faster than its killer
        assert f"{left} of {left} pictures are grey: --image.channels 1" in first.stderr
    assert "grey" not in other.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "x")


def test_broken_images_are_skipped_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 40)
    clean = shutil.copytree(folder, tmp_path / "clean")
    bad = spoil(folder)
    command("prepare", "--data.path", folder, "--output-dir", tmp_path / "x", *FLAGS, code=2)
    assert not (tmp_path / "x" / "prepared.json").exists()
    shell(
        f"prepare --data.path {folder} --output-dir {tmp_path / 'y'}",
        *FLAGS,
        "--data.on-error",
        "skip",
    )
    listed = (tmp_path / "y" / "skipped.jsonl").read_text()
    assert len(listed.splitlines()) == len(bad)
    assert all(name in listed for name in bad)
    assert_same(load(tmp_path / "y", IMAGE), load(clean, IMAGE))

    # A class of which nothing can be read is no empty class.
    again = ["prepare", "--data.path", folder, "--data.on-error", "skip", *FLAGS, "--output-dir"]
    for path in (folder / "bag").iterdir():
        path.write_bytes(b"")
    command(*again, tmp_path / "z", code=2)
    assert not (tmp_path / "z" / "prepared.json").exists()
    with pytest.raises(UserError, match="no image of the class 'bag' can be read"):
        load(folder, IMAGE, on_error="skip")


def test_streams_and_floats_are_prepared(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=3, rows=20)
    image = PreprocessingConfig(size=(28,), channels=1, validation_fraction=0.2)
    flags = ["--image.size", 28, "--image.channels", 1, "--image.validation-fraction", "0.2"]
    shell(
        f"prepare --data.path {tars / '{000..002}.tar'} --data.streaming "
        f"--output-dir {tmp_path / 'x'}",
        *flags,
    )
    prepared = load(tmp_path / "x", image)
    assert prepared.class_names == tuple(map(str, range(60)))
    for split, images in prepared.items():
        every = items_of(ImagesConfig(path=str(tars)), image)
        items = [item for item in every if item.split == split]
        batch = images.__getitems__(range(len(images)))
        assert images.ids == [item.id for item in items]
        assert batch["labels"].tolist() == [item.label for item in items]
        pixels = np.stack([item.pixels(no_change) for item in items])
        assert np.array_equal(batch["images"], pixels)
    depth = np.random.default_rng(0).normal(size=(20, 28, 28)).astype(np.float32)
    np.save(tmp_path / "depth.npy", depth)
    floats = replace(image, value_range=(-8, 8))
    shell(
        f"prepare --data.path {tmp_path / 'depth.npy'} --output-dir {tmp_path / 'z'}",
        *flags,
        "--image.value-range",
        -8,
        8,
    )
    assert_same(load(tmp_path / "z", floats), load(tmp_path / "depth.npy", floats))
    smaller = replace(floats, size=(14,))
    again = load(tmp_path / "z", smaller).train.pixel_rows(range(8))
    straight = load(tmp_path / "depth.npy", smaller).train.pixel_rows(range(8))
    assert (again - straight).abs().max() < 1e-5
    for other in (replace(floats, value_range=(-9, 8)), replace(floats, validation_fraction=0.5)):
        with pytest.raises(UserError, match="prepare the images again"):
            load(tmp_path / "z", other)


def test_held_out_images_may_be_prepared_apart(photos: Path, tmp_path: Path) -> None:
    image = replace(IMAGE, validation_fraction=0)
    for name, part in (("train", "bag"), ("held_out", "coat")):
        shell(
            f"prepare --data.path {photos / part} --output-dir {tmp_path / name}",
            *FLAGS,
            "--image.validation-fraction",
            0,
        )
    splits = load(tmp_path / "train", image, validation_path=str(tmp_path / "held_out"))
    numbers = [len(list((photos / part).iterdir())) for part in ("bag", "coat")]
    assert [len(dataset) for _, dataset in splits.items()] == numbers


def test_labels_of_some_images_only_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=2, rows=5)
    others = numbered_tars(tmp_path / "others", shards=1, rows=5, labelled=False)
    shutil.copy(others / "000.tar", tars / "002.tar")
    shell(
        f"prepare --data.path {tars} --data.streaming --output-dir {tmp_path / 'x'} "
        "--image.size 28",
        code=2,
    )
    assert "label all images, or none" in capsys.readouterr().err
    assert not (tmp_path / "x" / "prepared.json").exists()


def test_a_truncated_prepared_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
    shard = next((tmp_path / "x" / "train").glob("*.parquet"))
    shard.unlink()
    with pytest.raises(UserError, match="run vqvae2 prepare again"):
        load(tmp_path / "x", IMAGE)
    command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
    whole, manifest = shard.read_bytes(), tmp_path / "x" / "prepared.json"
    held_out = next((tmp_path / "x" / "validation").glob("*.parquet")).read_bytes()
    flipped = bytes([*whole[:900], whole[900] ^ 1, *whole[901:]])
    (shard.parent / ".00007.json").write_text("{")  # left by a killed run
    for content in (whole[:500], held_out, b"", flipped):
        shard.write_bytes(content)
        with pytest.raises(UserError, match="run vqvae2 prepare again"):
            load(tmp_path / "x", IMAGE)
        command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
        assert shard.read_bytes() == whole
    assert not list((tmp_path / "x").rglob(".*.*"))
    (tmp_path / "x" / "train" / "stray.parquet").write_bytes(held_out)  # is not read
    assert len(load(tmp_path / "x", IMAGE).train) == len(load(photos, IMAGE).train)
    for broken in (manifest.read_text().replace("bag", "bat"), "{"):
        manifest.write_text(broken)
        with pytest.raises(UserError, match=r"prepared\.json"):
            load(tmp_path / "x", IMAGE)
        command("prepare", "--data.path", photos, "--output-dir", tmp_path / "x", *FLAGS)
        assert_same(load(tmp_path / "x", IMAGE), load(photos, IMAGE))
    record = json.loads(manifest.read_text())
    image = {**record["image"], "channels": 4}
    for change in ({"class_names": ["bag"]}, {"image": image}, {"num_train": 7}):
        manifest.write_text(json.dumps({**record, **change}))
        channels = change.get("image", record["image"])["channels"]
        with pytest.raises(UserError):
            load(tmp_path / "x", replace(IMAGE, channels=channels))
    manifest.unlink()
    with pytest.raises(UserError, match="unfinished prepared images"):
        load(tmp_path / "x", IMAGE)


def test_prepared_pictures_are_padded_like_their_source(photos: Path, tmp_path: Path) -> None:
    image = PreprocessingConfig(size=(16,), channels=1, background="white")
    data = ImagesConfig(path=str(photos))
    prepare_command(PrepareConfig(data=data, image=image, output_dir=str(tmp_path / "x")))
    wide = replace(image, size=(16, 32), fit="pad")
    (first, *_) = load(tmp_path / "x", wide).train.pixel_rows(range(1))
    assert first[0, 0, 0] == 255
