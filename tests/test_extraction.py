"""Codes on disk: a row per image, in order, the same however made; readable by anyone."""

import errno
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image

from pipelines.cli import parse
from pipelines.commands import extract as extracting
from pipelines.commands.extract import extract
from pipelines.encoding import encode_lanes
from prior.manifest import CodeDataset, read_manifest
from prior.shards import smallest_type
from tests.conftest import (
    ROOT,
    command,
    edit_manifest,
    edit_shard,
    kill_when,
    two_processes,
    vqvae2,
    write_images,
)
from tests.images import numbered_tars, shell, spoil, write_tar
from vqvae2 import VQVAE2
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import read_note
from vqvae2.common.threads import set_threads
from vqvae2.config import DataConfig
from vqvae2.data import ImageSplits, load_images, to_images
from vqvae2.training import train


def extract_command(run: Path, photos: Path, output_dir: Path, *more: object) -> list[object]:
    line = f"extract --vqvae {run / 'vqvae'} --data.path {photos} --output-dir {output_dir}"
    return [*line.split(), *more]


def extract_on_two(run: Path, photos: Path, output_dir: Path, *more: object) -> None:
    """Extraction on two processes."""
    _, *arguments = extract_command(run, photos, output_dir, *more)
    two_processes(ROOT / "scripts" / "extract.py", *arguments)


def load_splits(model: VQVAE2, photos: Path) -> ImageSplits:
    return load_images(DataConfig(path=str(photos)), model.config.image)


def assert_same_codes(one: Path, other: Path) -> None:
    """The same shards with the same rows in the same order, and the same manifest."""
    files, others = (sorted(p.relative_to(x) for p in x.rglob("*.parquet")) for x in (one, other))
    assert files == others
    assert all(pq.read_table(one / f).equals(pq.read_table(other / f)) for f in files)
    manifest, expected = (json.loads((x / "manifest.json").read_text()) for x in (one, other))
    assert manifest == expected


def test_rows_are_the_images_in_order_and_codes_those_of_the_model(run: Path, photos: Path) -> None:
    model = VQVAE2.from_pretrained(run / "vqvae")
    manifest = read_manifest(run / "codes")
    assert manifest.encoder_hash == model.content_hash()
    assert (manifest.grids, manifest.codebook_sizes) == (((2, 2), (4, 4)), (16, 32))
    for split, images in load_splits(model, photos).items():
        table = pq.read_table(run / "codes" / split)
        assert table["id"].to_pylist() == images.ids
        batch = images.__getitems__(range(len(images)))
        assert table["label"].to_pylist() == batch["labels"].tolist()
        read = CodeDataset(run / "codes", manifest, split).__getitems__(range(len(images)))
        with torch.no_grad():
            levels = model.encode(to_images(batch["images"]))
        for codes, level in zip(read["codes"], levels, strict=True):
            # In a batch of another size near ties may fall differently.
            assert (codes != level.codes).float().mean() < 0.001
        assert torch.equal(read["labels"], batch["labels"])


def test_anyone_can_open_it(run: Path) -> None:
    opened = datasets.load_dataset(str(run / "codes"))
    manifest = read_manifest(run / "codes")
    numbers = {"train": manifest.num_train, "validation": manifest.num_validation}
    assert {name: len(split) for name, split in opened.items()} == numbers
    assert opened["train"].features["codes_1"] == datasets.List(datasets.Value("uint8"), length=16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_codes_take_the_smallest_type(size: int, expected: str) -> None:
    assert smallest_type(size) == np.dtype(expected)


def test_two_processes_give_every_row_once_and_the_same_codes(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    command(*extract_command(run, photos, tmp_path / "one", "--shard-size", 20))
    extract_on_two(run, photos, tmp_path / "two", "--shard-size", 20)
    assert_same_codes(tmp_path / "one", tmp_path / "two")
    ids: list[str] = []
    for split in ("train", "validation"):
        ids += pq.read_table(tmp_path / "two" / split)["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 150


def test_killed_and_continued_is_uninterrupted(run: Path, photos: Path, tmp_path: Path) -> None:
    command(*extract_command(run, photos, tmp_path / "whole", "--shard-size", 2))
    killed = tmp_path / "killed"
    again = extract_command(run, photos, killed, "--shard-size", 2)
    code = kill_when(lambda: len(list(killed.glob("train/[0-9]*.parquet"))) > 5, *again)
    if code == -signal.SIGKILL:
        assert not (killed / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in killed.rglob("[0-9]*.parquet")}
    extract_on_two(run, photos, killed, "--shard-size", 2)  # another number of processes
    assert_same_codes(tmp_path / "whole", killed)  # and finished shards are not made again
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_lanes_do_not_know_their_neighbours(run: Path, photos: Path) -> None:
    model = VQVAE2.from_pretrained(run / "vqvae")
    pixels = load_splits(model, photos).train.pixel_rows(range(32))
    whole = encode_lanes(model, pixels)
    for number in (1, 3, 8):
        pairs = zip(encode_lanes(model, pixels[:number]), whole, strict=True)
        assert all(torch.equal(some, codes[:number]) for some, codes in pairs)
    assert not any(codes.requires_grad for codes in whole)


def test_small_images_are_encoded_on_several_threads_and_codes_do_not_show_it(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[tuple[int, int]]] = {"apart": set(), "together": set()}
    second = threading.Event()

    def encode(*arguments: object, **options: object) -> object:
        threads[name].add((threading.get_ident(), torch.get_num_threads()))
        if len(threads["apart"]) > 1:
            second.set()
        assert second.wait(timeout=60)  # the first one is at work until there is a second
        return encode_lanes(*arguments, **options)

    monkeypatch.setattr(extracting, "encode_lanes", encode)
    for name, most_pixels in (("apart", 1 << 14), ("together", 0)):
        monkeypatch.setattr(extracting, "MOST_PIXELS_APART", most_pixels)
        command(*extract_command(run, photos, tmp_path / name, "--num-threads", 2))
    set_threads(0)
    assert_same_codes(tmp_path / "apart", tmp_path / "together")
    assert {number for _, number in threads["apart"]} == {1}  # a pool per shard: two or more
    assert threads["together"] == {(threading.get_ident(), 2)}


def test_features_that_are_no_numbers_have_no_codes(run: Path) -> None:
    model = VQVAE2.from_pretrained(run / "vqvae")
    with torch.no_grad():
        next(model.parameters()).fill_(1e38)  # overflows
    with pytest.raises(UserError, match="features are not finite"):
        encode_lanes(model, torch.zeros((1, 1, 16, 16), dtype=torch.uint8))


def test_other_images_are_not_mixed_in(run: Path, photos: Path, tmp_path: Path) -> None:
    """Going on after the folder changed would repeat some rows and lose others."""
    mine = shutil.copytree(photos, tmp_path / "photos")
    again = extract_command(run, mine, tmp_path / "codes", "--shard-size", 20)
    command(*again)
    (tmp_path / "codes" / "manifest.json").unlink()
    (tmp_path / "codes" / "train" / "00003.parquet").unlink()
    (mine / "bag" / "0000a.png").write_bytes(next((mine / "bag").glob("*.png")).read_bytes())
    refused = vqvae2(*again, check=False)
    assert refused.returncode == 2
    assert "image_names_hash" in refused.stderr
    (mine / "bag" / "0000a.png").unlink()
    command(*again)
    assert_same_columns(tmp_path / "codes", run / "codes")


def assert_same_columns(one: Path, other: Path) -> None:
    for split in ("train", "validation"):
        assert pq.read_table(one / split).equals(pq.read_table(other / split))


def test_a_missing_shard_is_made_again(run: Path, photos: Path, tmp_path: Path) -> None:
    again = extract_command(run, photos, tmp_path / "codes", "--shard-size", 50)
    command(*again)
    assert "extracted already" in vqvae2(*again).stdout
    shard = tmp_path / "codes" / "train" / "00001.parquet"
    before = shard.read_bytes()
    shard.unlink()
    # An edited shard must not become one of the dataset's because another is missing.
    edited, record = shard.with_name("00000.parquet"), tmp_path / "codes" / "manifest.json"
    untouched, manifest = edited.read_bytes(), record.read_bytes()
    table = pq.read_table(edited)
    pq.write_table(table.set_column(0, "id", table["id"].take(list(range(50))[::-1])), edited)
    command(*again)
    assert (shard.read_bytes(), edited.read_bytes()) == (before, untouched)
    assert record.read_bytes() == manifest
    assert not list((tmp_path / "codes").rglob(".*"))
    for damaged in (before[:900], bytes([*before[:900], before[900] ^ 1, *before[901:]])):
        shard.write_bytes(damaged)
        (shard.parent / ".00001.json").write_text("{")  # left by a killed run
        command(*again)
        assert shard.read_bytes() == before
        assert record.read_bytes() == manifest
    (shard.parent / ".00001.json").write_text("{")
    command(*again)
    assert not list((tmp_path / "codes").rglob(".*"))


def test_added_images_are_not_said_to_be_extracted(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = shutil.copytree(photos, tmp_path / "photos")
    again = extract_command(run, mine, tmp_path / "codes")
    command(*again)
    (mine / "bag" / "0000a.png").write_bytes(next((mine / "bag").glob("*.png")).read_bytes())
    command(*again, code=2)
    assert "image_names_hash" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npy", "folder", "stream"])
def test_other_images_of_the_same_names_are_not_mixed_in(
    kind: str, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rows of a stack have numbers for names; a folder may be exported anew."""
    paths = []
    for name, shade in (("a", 0), ("b", 9)):
        files = sorted(photos.rglob("*.png"))[:40]
        arrays = [np.array(Image.open(path)) // (1 + shade) for path in files]
        (tmp_path / name).mkdir()
        if kind == "npy":
            paths.append(tmp_path / name / "x.npy")
            np.save(paths[-1], np.stack(arrays))
            continue
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
        paths.append(tmp_path / name)
        if kind == "stream":
            paths[-1] = tmp_path / name / "x.tar"
            members = [f"{i}.png" for i in range(40 - shade)]
            write_tar(paths[-1], {m: (tmp_path / name / m).read_bytes() for m in members})
    flags = ["--data.streaming"] if kind == "stream" else []
    command(*extract_command(run, paths[0], tmp_path / "codes", *flags))
    shell(
        f"codes view --codes {tmp_path / 'codes'} --vqvae {run / 'vqvae'} --rows 0 "
        f"--output-dir {tmp_path}",
    )
    for begun in (False, True):
        if begun:
            (tmp_path / "codes" / "manifest.json").unlink()
        capsys.readouterr()
        command(*extract_command(run, paths[1], tmp_path / "codes", *flags), code=2)
        assert "though they have the same names" in capsys.readouterr().err
    prepare = ["prepare", "--output-dir", tmp_path / "prepared", "--image.size", 16, *flags]
    command(*prepare, "--data.path", paths[0])
    command(*prepare, "--data.path", paths[1], code=2)


def test_who_cannot_be_sure_that_the_split_is_the_training_s_is_warned(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image = ["--image.size", 16, "--image.channels", 1, "--image.background", "black"]
    command("prepare", "--data.path", photos, *image, "--output-dir", tmp_path / "prepared")
    apart = write_images(tmp_path / "apart", 10)
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "bag" / "broken.png").write_bytes(b"")
    skip = ["--data.on-error", "skip"]
    shell(
        f"train --config tiny --num-steps 1 --data.path {folder}",
        *skip,
        "--output-dir",
        tmp_path / "vqvae",
    )
    for number, (vqvae, path, warned) in enumerate([
        (run / "vqvae", photos, False),
        (run / "vqvae", tmp_path / "prepared", False),
        (run / "vqvae", photos / "bag", True),
        (tmp_path / "vqvae", folder, False),  # a training is bound to skipped images too
    ]):  # fmt: skip
        capsys.readouterr()
        shell(
            f"extract --vqvae {vqvae} --data.path {path}",
            *skip,
            "--output-dir",
            tmp_path / f"codes_{number}",
        )
        assert ("may have been trained on any" in capsys.readouterr().err) is warned
    same = extract_command(run, photos / "bag" / "..", tmp_path / "no")
    command(*same, "--data.validation-path", apart, code=2)
    assert "trained with None" in capsys.readouterr().err


def test_a_prior_does_not_continue_on_other_rows(copy_of_run: Path, tmp_path: Path) -> None:
    edit_manifest(copy_of_run / "codes", rows_hash="0")
    again = f"train-prior --config tiny --codes {copy_of_run / 'codes'} --level top "
    again += f"--output-dir {copy_of_run / 'prior_0'} --num-steps 20"
    refused = vqvae2(*again.split(), check=False)
    assert refused.returncode == 2
    assert "rows_hash" in refused.stderr


def rows_of(codes: Path, split: str = "train") -> dict[tuple[str, str], dict]:
    """The rows by id and view."""
    rows = pq.read_table(codes / split).to_pylist()
    found = {(row.pop("id"), row.pop("view")): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_views_are_rows_of_changed_images(run: Path, photos: Path, tmp_path: Path) -> None:
    views = ["--views", "original", "flip", "top_left"]
    command(*extract_command(run, photos, tmp_path / "codes", *views))
    manifest, original = read_manifest(tmp_path / "codes"), rows_of(run / "codes")
    found = rows_of(tmp_path / "codes")
    assert [key for key in found if key[1] == "original"] == list(original)
    assert len(found) == manifest.num_train == 3 * len(original)
    assert all(found[key] == row for key, row in original.items())
    first, _ = next(iter(original))
    assert list(found)[:3] == [(first, view) for view in ("original", "flip", "top_left")]
    held_out = (rows_of(codes, "validation") for codes in (tmp_path / "codes", run / "codes"))
    assert next(held_out) == next(held_out)  # never changed
    model = VQVAE2.from_pretrained(run / "vqvae")
    images = load_splits(model, photos).train
    mirrored = encode_lanes(model, images.pixel_rows(range(20)).flip(-1))
    assert [found[name, "flip"]["codes_1"] for name in images.ids[:20]] == mirrored[1].tolist()
    sideways = extract_command(run, photos, tmp_path / "no", "--views", "sideways")
    assert vqvae2(*sideways, check=False).returncode == 2
    command(*extract_command(run, photos, tmp_path / "flips", "--views", "flip"))
    for codes in ("codes", "flips"):
        command("codes", "verify", "--codes", tmp_path / codes)

    def drop_a_flip(columns: dict[str, list]) -> None:
        for values in columns.values():
            del values[1]

    edit_shard(tmp_path / "codes" / "train" / "00000.parquet", drop_a_flip)
    command("codes", "verify", "--codes", tmp_path / "codes", code=1)


def test_streamed_codes_are_those_of_the_same_images_read_at_once(
    run: Path, tmp_path: Path
) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=5, rows=30)
    command(*extract_command(run, tars, tmp_path / "whole", "--shard-size", 40))
    extract_on_two(run, tars, tmp_path / "stream", "--data.streaming")
    for split in ("train", "validation"):
        assert rows_of(tmp_path / "stream", split) == rows_of(tmp_path / "whole", split)
        assert list(rows_of(tmp_path / "stream", split)) == list(rows_of(tmp_path / "whole", split))
    assert read_manifest(tmp_path / "stream").class_names == tuple(map(str, range(150)))
    assert not list((tmp_path / "stream").rglob(".*.json"))
    shell(
        f"train-prior --config tiny --codes {tmp_path / 'stream'} --level top --num-steps 2 "
        f"--output-dir {tmp_path / 'prior'}",
    )


def test_broken_images_are_named_or_skipped(run: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 60)
    command(*extract_command(run, folder, tmp_path / "clean"))
    bad = spoil(folder)
    stopped = extract_command(run, folder, tmp_path / "stopped")
    mended = extract_command(run, folder, tmp_path / "mended")
    for begun in (stopped, mended):
        command(*begun, code=2)
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    command(*stopped, "--data.on-error", "skip")  # as the message says
    skip = ["--data.on-error", "skip", "--shard-size", 20]
    output = vqvae2(*extract_command(run, folder, tmp_path / "codes", *skip)).stdout
    assert f"{len(bad)} images could not be read" in output
    lines = (tmp_path / "codes" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["image"] for line in lines} == bad
    for split in ("train", "validation"):
        clean = rows_of(tmp_path / "clean", split)
        assert rows_of(tmp_path / "codes", split) == clean
        assert rows_of(tmp_path / "stopped", split) == clean
    good = next((folder / "dress").glob("*.png"))
    for name in bad:
        shutil.copy(good, folder / name)
    command(*mended)  # goes on when broken images were replaced, though their lengths changed
    manifest = read_manifest(tmp_path / "mended")
    assert manifest.num_train + manifest.num_validation == 60 + len(bad)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_without_rows_have_the_labels_of_the_others(
    streaming: bool, run: Path, tmp_path: Path
) -> None:
    tars = numbered_tars(tmp_path / "tars", shards=2, rows=20)
    broken: dict[str, bytes | str] = {}
    for i in range(20):
        broken |= {f"{i}.png": b"", f"{i}.cls": b"1"}
    write_tar(tars / "002.tar", broken)
    write_tar(tars / "003.tar", {})
    flags = ["--data.on-error", "skip", "--shard-size", 5, *["--data.streaming"] * streaming]
    command(*extract_command(run, tars, tmp_path / "codes", *flags))
    command("codes", "verify", "--codes", tmp_path / "codes")
    opened = datasets.load_dataset(str(tmp_path / "codes"))
    assert len(opened["train"]) + len(opened["validation"]) == 40
    unlabelled = numbered_tars(tmp_path / "others", shards=1, rows=20, labelled=False) / "000.tar"
    shutil.copy(unlabelled, tars / "003.tar")
    command(*extract_command(run, tars, tmp_path / "mixed", *flags), code=2)


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    real, calls = os.fsync, iter(range(1000))

    def full(file: int) -> None:
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    again = extract_command(run, photos, tmp_path / "codes", "--shard-size", 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        command(*again, code=2)
    assert "No space left on device" in capsys.readouterr().err
    kept = sorted((tmp_path / "codes").rglob("[0-9]*.parquet"))
    assert kept
    assert not list((tmp_path / "codes").rglob("*.partial"))
    command(*again)
    assert_same_columns(tmp_path / "codes", run / "codes")


def test_bf16_says_how_many_codes_it_changes(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command(*extract_command(run, photos, tmp_path / "codes", "--mixed-precision", "bf16"))
    shares = [float(share) for share in re.findall(r"([0-9.]+)% of level", capsys.readouterr().out)]
    one, other = rows_of(tmp_path / "codes"), rows_of(run / "codes")
    for level, share in enumerate(shares):
        pairs = list(zip(one.values(), other.values(), strict=True))[:128]
        codes = np.array([[row[f"codes_{level}"] for row in pair] for pair in pairs])
        different = codes[:, 0] != codes[:, 1]
        assert different.mean() * 100 == pytest.approx(share, abs=0.01)
    assert len(shares) == 2


def test_data_of_python_code_goes_all_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five bands of floats, from memory to samples."""
    bands = np.random.default_rng(0).normal(size=(48, 5, 16, 16)).clip(-3, 3).astype(np.float32)
    data = {"images": bands, "labels": ["sea", "land"] * 24}
    flags = "--config tiny --image.channels 5 --image.value-range -3 3 "
    flags += f"--image.validation-fraction 0.2 --output-dir {tmp_path / 'vqvae'}"
    train(parse("train", [*flags.split(), "--data.path", "memory"]), images=data)
    flags = f"--vqvae {tmp_path / 'vqvae'} --output-dir {tmp_path / 'codes'}"
    extract(parse("extract", [*flags.split(), "--data.path", "memory"]), images=data)
    stack = bands.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "stack.npz", images=stack, labels=np.array(data["labels"]))
    shell(
        f"extract --vqvae {tmp_path / 'vqvae'} --data.path {tmp_path / 'stack.npz'} "
        f"--output-dir {tmp_path / 'same'}",
    )
    assert_same_columns(tmp_path / "codes", tmp_path / "same")
    command("doctor", "--vqvae", tmp_path / "vqvae", "--codes", tmp_path / "same")
    for level in (0, 1):
        shell(
            f"train-prior --config tiny --codes {tmp_path / 'codes'} --level {level} "
            f"--output-dir {tmp_path / f'prior_{level}'}",
        )
    priors = ["--priors", tmp_path / "prior_0", tmp_path / "prior_1"]
    shell(
        f"sample --vqvae {tmp_path / 'vqvae'}",
        *priors,
        "--num-images",
        3,
        "--npz",
        "--output-dir",
        tmp_path / "out",
    )
    files = sorted((tmp_path / "out" / "images").glob("*.tif"))
    sampled = np.stack([tifffile.imread(path) for path in files])
    assert (sampled.shape, sampled.dtype) == ((3, 16, 16, 5), np.float32)
    assert -3 <= sampled.min() <= sampled.max() <= 3
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], sampled)

    # Each file holds the receipt by which it is drawn again.
    verify = ("verify", tmp_path / "out", "--vqvae", tmp_path / "vqvae", *priors)
    command(*verify)
    note = read_note(sampled[1], files[1])
    sampled[1, 2, 3, 4] += 1.5
    how = {"photometric": "minisblack", "planarconfig": "contig", "description": note}
    tifffile.imwrite(files[1], sampled[1], **how)
    capsys.readouterr()
    command(*verify, code=1)
    shown = capsys.readouterr().out
    assert "000001.tif: no: 1 of 256 pixels differ, by at most 1.5 of 6.\nno: 2 of 3" in shown
    shell(
        f"reconstruct --vqvae {tmp_path / 'vqvae'} --data.path {tmp_path / 'stack.npz'} "
        "--num-images 2 "
        f"--output-dir {tmp_path / 'again'}",
    )
    assert len(list((tmp_path / "again" / "images").glob("*.tif"))) == 2


def test_doctor_knows_views(copy_of_run: Path, photos: Path) -> None:
    codes, views = copy_of_run / "codes", ["--views", "original", "flip_top_left"]
    shutil.rmtree(codes)
    command(*extract_command(copy_of_run, photos, codes, *views))
    command("doctor", "--vqvae", copy_of_run / "vqvae", "--codes", copy_of_run / "codes")
