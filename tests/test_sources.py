"""The same pictures from every kind of source; what cannot be taken as it is, is refused."""

import csv
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import write_images
from tests.images import (
    GREY,
    encoded,
    items_of,
    load,
    numbered_tars,
    png16,
    rows_of,
    spoil,
    write_tar,
)
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import save_image
from vqvae2.config import ImagesConfig, PrepareConfig, PreprocessingConfig
from vqvae2.data import BadImage, is_held_out, load_images, load_picture, prepare, to_images
from vqvae2.data.augmentation import no_change
from vqvae2.data.open_source import open_source
from vqvae2.data.prepared import prepare_command
from vqvae2.data.vectors import read_vectors
from vqvae2.data.work_parts import find_parts

__all__ = ["items_of", "load", "numbered_tars", "spoil"]  # for other tests


def pictures_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())


def write_table(path: Path, cells: Iterable[bytes], labels: Iterable[str | int]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": list(cells), "label": list(labels)}), path)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 60 pictures in the same order, in each form."""
    root = tmp_path_factory.mktemp("sources")
    paths = pictures_of(write_images(root / "folder", 60))
    names = [path.relative_to(root).as_posix() for path in paths]
    labels, cells = [path.parent.name for path in paths], [path.read_bytes() for path in paths]
    (root / "list.txt").write_text("\n".join(names))
    for name, separator in (("list.csv", ","), ("semicolons.csv", ";")):
        with open(root / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerows([["path", "label"], *zip(names, labels, strict=True)])
    rows = [{"file": name, "kind": label} for name, label in zip(names, labels, strict=True)]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_table(root / "one.parquet", cells, labels)
    for first in (0, 20, 40):
        part = slice(first, first + 20)
        write_table(root / "tables" / f"p{first}.parquet", cells[part], labels[part])
    images = np.stack([np.array(Image.open(path)) for path in paths])
    np.save(root / "stack.npy", images)
    np.savez(root / "stack.npz", images=images, labels=np.array(labels))
    datasets.Dataset.from_dict({"image": cells, "label": labels}).save_to_disk(root / "saved")
    return {path.name: path for path in root.iterdir()} | {"glob": root / "tables" / "p*.parquet"}


# The same pictures


@pytest.mark.parametrize(
    "name",
    [
        "list.csv",
        "semicolons.csv",
        "list.jsonl",
        "one.parquet",
        "tables",
        "stack.npz",
        "saved",
        "glob",
    ],
)
def test_every_source_gives_the_same_rows(name: str, sources: dict[str, Path]) -> None:
    expected, classes = rows_of(load(sources["folder"]))
    columns = {"image_column": "file", "label_column": "kind"} if name == "list.jsonl" else {}
    images, labels = rows_of(load(sources[name], **columns))
    assert torch.equal(images, expected)
    assert labels == classes


@pytest.mark.parametrize("name", ["stack.npy", "list.txt"])
def test_sources_without_labels_give_the_same_images(name: str, sources: dict[str, Path]) -> None:
    expected, _ = rows_of(load(sources["folder"]))
    assert torch.equal(load(sources[name]).train.pixel_rows(range(60)), expected)


def test_python_data_give_the_same_rows(sources: dict[str, Path]) -> None:
    expected, classes = rows_of(load(sources["folder"]))
    pairs = zip(expected[:, 0].numpy(), classes, strict=True)
    rows = ({"images": image, "labels": label} for image, label in pairs)
    for data in ({"images": expected, "labels": classes}, rows):
        images, labels = rows_of(load_images(data, GREY))
        assert torch.equal(images, expected)
        assert labels == classes


def test_links_are_followed_but_not_in_circles(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(sources["folder"] / "bag")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    ids = load(tmp_path / "photos").train.ids
    assert ids
    assert all(name.startswith("linked/") for name in ids)


def test_lists_and_tables_may_name_splits(tmp_path: Path, sources: dict[str, Path]) -> None:
    paths = pictures_of(sources["folder"])
    names = [os.path.relpath(path, tmp_path) for path in paths]
    lines = [f"{name}\t{'train' if i % 3 else 'test'}" for i, name in enumerate(names)]
    (tmp_path / "x.tsv").write_text("\n".join(["path\tsplit", *lines]))
    splits = load(tmp_path / "x.tsv")
    assert (len(splits.train), len(splits.validation)) == (40, 20)
    assert set(splits.validation.ids) == set(names[::3])

    features = datasets.Features(
        image=datasets.Image(),
        kind=datasets.ClassLabel(names=["cat", "dog"]),
        split=datasets.ClassLabel(names=["train", "test"]),
    )
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    rows = {"image": cells, "kind": [0, 1] * 30, "split": [0] * 50 + [1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "typed.parquet")
    splits = load(tmp_path / "typed.parquet")
    assert (len(splits.train), len(splits.validation)) == (50, 10)
    assert splits.class_names == ("cat", "dog")


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(1, 60),
    size=st.integers(1, 25),
    processes=st.integers(1, 5),
    fraction=st.floats(0, 0.6),
)
def test_parts_hold_every_image_once_in_order(
    number: int, size: int, processes: int, fraction: float
) -> None:
    """Whatever the parts' size and the number of processes that share them."""
    assume(not all(is_held_out(f"{i:09d}", fraction) for i in range(number)))
    config = replace(GREY, size=(2,), validation_fraction=fraction)
    images = np.arange(number, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(5, 2)
    data = {"images": images, "labels": np.arange(number)}
    splits = load_images(data, config)
    parts = find_parts(data, config, size).parts
    shared = [part for rank in range(processes) for part in parts[rank::processes]]
    assert sorted(map(id, shared)) == sorted(map(id, parts))
    for split, dataset in splits.items():
        of_split = sorted(
            (part for part in parts if split in part.splits), key=lambda part: part.number
        )
        items = [item for part in of_split for item in part.items()]
        assert [item.id for item in items] == dataset.ids
        shades = [int(item.pixels(no_change)[0, 0, 0]) for item in items]
        assert shades == [item.label for item in items] == [int(name) for name in dataset.ids]


# Pictures


def test_bands_bits_and_floats(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    five = generator.integers(0, 65536, (3, 16, 16, 5), dtype=np.uint16)
    config = replace(GREY, size=(16,), channels=5, value_range=(0, 65535))
    options = {"planarconfig": "contig", "photometric": "minisblack"}
    for i, array in enumerate(five):
        np.save(tmp_path / f"{i}.npy", array)
        tifffile.imwrite(tmp_path / f"{i}.tif", array, **options)
    images = load(tmp_path, config).train.pixel_rows(range(6))
    assert torch.equal(images[::2], images[1::2])
    expected = torch.from_numpy(five.astype(np.float64) / 65535 * 2 - 1).permute(0, 3, 1, 2)
    assert (images[::2] - expected).abs().max() < 1e-6

    # As samples are written; one band of 16 bits; floats.
    save_image(images[0], tmp_path / "again" / "x.tif", config.value_range)
    assert np.array_equal(tifffile.imread(tmp_path / "again" / "x.tif"), five[0])
    Image.fromarray(five[0, ..., 0]).save(tmp_path / "grey16.png")
    read = load_picture(str(tmp_path / "grey16.png"), replace(config, channels=1))
    assert (read[0, 0] - expected[0, 0]).abs().max() < 1e-6
    depth = generator.normal(size=(20, 12)).astype(np.float32)
    pixels = prepare(depth, PreprocessingConfig(size=(20, 12), channels=1, value_range=(-6, 6)))
    assert np.allclose(pixels[0] * 6, depth, atol=1e-5)


def test_values_that_do_not_fit_are_refused() -> None:
    sixteen = np.full((8, 8), 40_000, np.uint16)
    for picture, changes, message in (
        (sixteen, {}, "value-range"),
        (sixteen, {"value_range": (0, 4095)}, "outside of image.value_range"),
        (np.full((8, 8), np.nan, np.float32), {"value_range": (0, 1)}, "no real numbers"),
        (np.zeros((8, 8, 5), np.uint8), {}, "image.channels"),
        (np.zeros((8, 8), np.uint8), {"channels": 4}, "image.channels"),
        (np.zeros((0, 7), np.uint8), {}, "without a pixel"),
        (Image.new("L", (8, 8)), {"value_range": (0, 1)}, "8-bit picture"),
        (np.zeros((8, 8), np.uint8), {"value_range": (0, 65535)}, "end before"),
        (Image.new("RGB", (8, 8)), {"channels": 5}, "image.channels is 5"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(picture, replace(GREY, **changes))
    assert prepare(np.zeros((8, 8), np.uint8), replace(GREY, channels=3)).shape == (3, 28, 28)


def test_pictures_come_upright_and_uninverted(tmp_path: Path) -> None:
    wide = PreprocessingConfig(size=(20, 40), channels=1, fit="stretch", value_range=(0, 65535))
    sixteen = np.zeros((20, 40), np.uint16)
    sixteen[:, 20:] = 50_000
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(sixteen).save(tmp_path / "turned.png", exif=exif)
    upright = load_picture(str(tmp_path / "turned.png"), replace(wide, size=(40, 20)))[0, 0]
    assert upright[5, 10] < upright[35, 10]
    eight = (sixteen // 256).astype(np.uint8)
    tifffile.imwrite(tmp_path / "inverted.tif", eight, photometric="miniswhite")
    inverted = load_picture(str(tmp_path / "inverted.tif"), replace(wide, value_range=(0, 255)))
    assert np.array_equal(inverted[0, 0], 255 - eight)
    with tifffile.TiffWriter(tmp_path / "masked.tif") as file:
        file.write(eight)
        file.write(eight > 9, subfiletype=4)
    masked = load_picture(str(tmp_path / "masked.tif"), replace(wide, value_range=(0, 255)))
    assert np.array_equal(masked[0, 0], eight)


def test_files_of_which_something_would_be_lost_are_refused(tmp_path: Path) -> None:
    rows = [bytes([0]) + np.full((8, 3), 1000, ">u2").tobytes() for _ in range(8)]
    (tmp_path / "deep.png").write_bytes(png16(rows, 8, 8))
    (tmp_path / "deep.ppm").write_bytes(b"P6 # a comment\n2 1\n65535\n" + bytes(12))
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 99)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    array = np.zeros((5, 16, 16), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack")
    orientation = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "turned.tif", array[0].astype("u2"), extratags=orientation)
    with tifffile.TiffWriter(tmp_path / "preview.tif") as file:
        file.write(array[0, ::2, ::2], subfiletype=1)
        file.write(array[0])
    for name, message in (
        ("deep.png", "PNG with more than 8 bits in several channels"),
        ("deep.ppm", "PPM with more than 8 bits"),
        ("x.gif", "2 frames"),
        ("x.tif", "5 pages"),
        ("turned.tif", "save it upright"),
        ("preview.tif", "preview or a mask"),
    ):
        with pytest.raises(UserError, match=message):
            load_picture(str(tmp_path / name), replace(GREY, channels=3))


def test_bad_files_stop_or_are_skipped_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    good, bad = load(folder).train.ids, spoil(folder)
    message = r"(cut|text|empty|bomb)\.(png|jpg).*on-error skip|bomb.*claims"
    with pytest.raises(BadImage, match=message):
        load(folder)
    splits = load(folder, on_error="skip")
    assert {error.name for error in splits.skipped} == bad
    assert splits.train.ids == good
    expected, _ = rows_of(splits)
    unchecked = load_images(ImagesConfig(path=str(folder)), GREY, check=False)
    assert splits.facts() == unchecked.facts()  # skipped images belong to the run
    for name in bad:
        (folder / name).unlink()
    assert torch.equal(rows_of(load(folder))[0], expected)


def test_images_of_a_range_are_kept_as_they_are() -> None:
    assert to_images(torch.tensor([0.25])).item() == 0.25


# Held out


def test_no_picture_is_trained_on_and_held_out_by_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder, other = write_images(tmp_path / "folder", 20), write_images(tmp_path / "other", 20)
    names = [path.relative_to(tmp_path).as_posix() for path in pictures_of(folder)]
    (tmp_path / "a.txt").write_text("\n".join(names))
    (tmp_path / "b.txt").write_text("\n".join(f"./{name}" for name in names))
    pairs = [f"{name},train\n./{name[:-4]}x.png,val\n" for name in names[:3]]
    (tmp_path / "split.csv").write_text("path,split\n" + "".join(pairs))
    for name in names[:3]:
        (tmp_path / f"{name[:-4]}x.png").symlink_to(tmp_path / name)
    for path, held_out in (("a.txt", "folder"), ("a.txt", "b.txt"), ("split.csv", None)):
        with pytest.raises(UserError, match=r"all \d+ images are held out"):
            load(tmp_path / path, validation_path=held_out and str(tmp_path / held_out))

    # All names of a file are on one side; the others are trained on.
    splits = load(folder, replace(GREY, validation_fraction=0.5))
    sides = [{(folder / name).resolve() for name in dataset.ids} for _, dataset in splits.items()]
    assert all(sides)
    assert not sides[0] & sides[1]
    (other / "inside").symlink_to(folder)
    assert len(load(other, validation_path=str(folder)).train) == 20
    assert f"{other}: 23 images are held out under another name" in caplog.text
    root = tmp_path / "root"
    for name in ("train", "validation"):
        write_images(root / name, 9)
    assert len(load(root, validation_path=str(root / "validation")).train) == 9


def test_no_table_is_trained_on_and_held_out(sources: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 28, 28), np.uint8))
    os.link(tmp_path / "x.npy", tmp_path / "y.npy")
    table = pq.read_table(sources["one.parquet"])
    one_sided = table.append_column("split", pa.array(["train"] * len(table)))
    pq.write_table(one_sided, tmp_path / "split.parquet")
    for path, held_out in (("x.npy", "y.npy"), ("split.parquet", "split.parquet")):
        with pytest.raises(UserError, match="would be trained on"):
            load(tmp_path / path, validation_path=str(tmp_path / held_out))


# What is left out is said, what is common is not refused, what cannot be right is


def test_no_picture_vanishes(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mixed = shutil.copytree(sources["folder"], tmp_path / "mixed")
    (numbered_tars(tmp_path / "tars", shards=1, rows=1) / "000.tar").rename(mixed / "backup.tar")
    (mixed / "x.png").write_bytes(encoded())
    with pytest.raises(UserError, match=r"pictures and backup\.tar"):
        load(mixed)
    (mixed / "backup.tar").unlink()
    load(mixed)
    assert "x.png lies in no class folder" in caplog.text
    saved = datasets.load_from_disk(str(sources["saved"]))
    datasets.DatasetDict({"train": saved, "extra": saved}).save_to_disk(tmp_path / "splits")
    load(tmp_path / "splits")
    assert "not used: extra" in caplog.text
    for split in ("train", "val", "test"):
        write_images(tmp_path / "three" / split, 5)
    load(tmp_path / "three")
    assert "'val' is held out; not used: test" in caplog.text


def test_what_is_common_is_not_refused(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hub = shutil.copytree(sources["tables"], tmp_path / "hub")
    (hub / "banner.png").write_bytes(encoded())
    assert len(load(hub).train) == 60
    assert "banner.png, are not used" in caplog.text
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)}
    np.savez(tmp_path / "x.npz", **arrays, class_names=np.array(["a", "b"]))
    assert load(tmp_path / "x.npz").class_names == ("0", "1", "2", "3")


def test_labels_and_names_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 3)
    first, second = pictures_of(folder)[:2]
    (tmp_path / "x.csv").write_text(f"path,label\n{first},cat\n{second},\n")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), label=np.arange(2))
    (tmp_path / "x.jsonl").write_text("[" * 100_000)
    (tmp_path / "y.jsonl").write_text('{"path": "a.png"}\n\n{"path": b.png}\n')
    (tmp_path / "z.jsonl").write_text(f'{{"path": "{first}"}}\n{{"path": "{second}", "label": 1}}')
    for place, columns in enumerate(({}, {"label": [1]})):
        table = pa.table({"image": [encoded(place)], **columns})
        (tmp_path / "tables").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "tables" / f"{place}.parquet")
    np.save(tmp_path / "one.npy", np.uint8(7))
    (tmp_path / "twice.txt").write_text(f"{first}\n{folder}/../x/{first.relative_to(folder)}")
    for name, message in (
        ("x.csv", "does not give every row a class"),
        ("x.npz", r"\['images', 'label'\]"),
        ("x.jsonl", "cannot be read as a list"),
        ("y.jsonl", r"cannot be read as a list \(line 3, column 10: Expecting value\)"),
        ("z.jsonl", "a row has no 'label', but others have"),
        ("tables", '"label" does not exist'),
        ("one.npy", r"images of shape \(\)"),
        ("twice.txt", "more than once"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)
    shutil.copy(first, os.fsencode(folder) + b"/bag/\xff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        load(folder)


# Labels


def write_files(root: Path, *names: str) -> Path:
    """Pictures of these names; and lists, given as name: content."""
    for i, name in enumerate(names):
        path, _, content = name.partition(": ")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if content else encoded(i))
    return root


@pytest.mark.parametrize(
    ("path", "files", "classes"),
    [
        ("x.csv", ["a.png", "b.png", "x.csv: path, label\na.png, dog\nb.png ,cat \n"], "cat dog"),
        ("x.csv", ["a.png", "b.png", "x.csv: Path,Label\na.png,dog\nb.png,cat\n"], "cat dog"),
        ("", ["a.png", 'metadata.jsonl: {"file_name": "a.png", "label": "dog"}'], "dog"),
        ("", ["s/a.png", "t/b.png", *(f"{d}.csv: file_name,label\n{f},{c}" for d, f, c in (
            ("s/metadata", "a.png", "dog"), ("t/metadata", "b.png", "cat")))], "cat dog"),
        ("", ["s/a.png", "t/b.png", "s/metadata.csv: file_name,label\na.png,dog"], "s t"),
        ("", ["pets/dog/a.png", "pets/cat/b.png"], "cat dog"),
        ("", ["a/Training/dog/a.png", "a/Training/cat/a.png", "a/Testing/cat/b.png"], "cat dog"),
        ("", ["x_train/x_train/dog/a.png", "x_train/x_train/cat/a.png", "x_test/cat/b.png"],
            "cat dog"),
        ("", ["bullet_train/a.png", "car/b.png"], "bullet_train car"),
        ("", ["2/a.png", "10/b.png", "1/c.png"], "1 2 10"),
        ("", ["train/dog/a.png", "val/images/b.png"], "dog"),
        ("", ["train/dog/a.png", "val/b.png"], "dog"),
        ("", ["dog/train/a.png", "cat/train/c.png", "dog/test/b.png"], "cat dog"),
    ],
)  # fmt: skip
def test_classes_are_found_and_splits_are_none(
    path: str, files: list[str], classes: str, tmp_path: Path
) -> None:
    splits = load(write_files(tmp_path, *files) / path)
    assert splits.class_names == tuple(classes.split())
    words = ("val/", "Testing/", "test/")
    assert len(splits.validation) == sum(any(word in name for word in words) for name in files)
    assert load(tmp_path / path, label_column="none").class_names == ()


def test_a_metadata_table_is_read_and_names_files_of_its_folder_alone(tmp_path: Path) -> None:
    root = write_files(tmp_path / "x", "a.png", "b.png")
    for name, message in (("b.png", None), ("../c.png", "outside of its folder")):
        write_files(tmp_path, "c.png")
        rows = [{"file_name": "a.png", "label": "dog"}, {"file_name": name, "label": "cat"}]
        pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
        if message is None:
            assert load(root).class_names == ("cat", "dog")
            continue
        with pytest.raises(UserError, match=message):
            load(root)


@pytest.mark.parametrize(
    ("labels", "found"),
    [([True, False], ("False", "True")), ([1, -1], ("-1", "1")), ([0, -1], "found -1"),
     ([-1, -1], "found -1"), ([0.5, 1.0], "found 0.5"), ([[0], [1]], r"found \[0\]"),
     (["a\0", "b"], "no name"), (["x" * 9999, "b"], "no name")],
)  # fmt: skip
def test_values_that_are_no_classes_are_named(
    labels: list, found: str | tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [encoded()] * 2, "label": labels}), path)
    if isinstance(found, tuple):
        assert load(path).class_names == found
    else:
        with pytest.raises(UserError, match=found) as error:
            load(path)
        assert len(str(error.value)) < 400
    assert load(path, label_column="none").class_names == ()


def test_what_might_be_classes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table = {"jpg": [encoded()] * 2, "cls": [0, 1], "__key__": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "wds.parquet")
    assert load(tmp_path / "wds.parquet").class_names == ("0", "1")
    list_of_one = "class.csv: filename,url,class\n01000/a.png,u,dog\n"
    folder = write_files(tmp_path / "x", "00000/a.png", "01000/a.png", list_of_one)
    load(folder / "class.csv")
    assert "no classes: the columns class, url are not used (--data.label-column class," in (
        caplog.text
    )
    load(folder)
    assert "are the folders 00000, 01000 classes?" in caplog.text
    write_files(tmp_path / "y", *(f"train/{i}/a.png" for i in range(20)), "val/a.png")
    load(tmp_path / "y")
    assert "held out without labels: it has none; the training's are 0, 1, 2, 3, 4, ... (20)" in (
        caplog.text
    )
    with pytest.raises(UserError, match="has no labels for the classes"):
        items_of(ImagesConfig(path=str(tmp_path / "y")))
    write_files(tmp_path / "z", "val/a.png", "test/a.png")
    with pytest.raises(UserError, match="none is to be trained on"):
        load(tmp_path / "z")


def test_names_are_the_same_however_their_accents_are_composed(tmp_path: Path) -> None:
    root = write_files(tmp_path, "cafe\u0301/a.png", "x.csv: path\ncaf\xe9/a.png\n")
    assert load(root / "x.csv").train.ids == ["caf\xe9/a.png"]
    assert load(root / "caf\xe9").train.ids == ["a.png"]
    held_out = write_files(tmp_path / "held", "caf\xe9/a.png")
    (root / "x.csv").unlink()
    shutil.move(held_out, tmp_path.with_name("held"))
    splits = load(root, validation_path=str(tmp_path.with_name("held")))
    assert splits.validation.source.labels == [0]


# Files


@pytest.mark.parametrize("name", ["data [2024]", "a::b", "{0..1}", "x*", "q?"])
def test_a_path_that_exists_is_no_pattern(name: str, tmp_path: Path) -> None:
    root = write_files(tmp_path / name, "p/a.png", "x.csv: path\np/a.png\n")
    for number in (0, 1):
        write_table(root / "t" / f"{number}.parquet", [encoded()] * 2, [0, 1])
        numbered_tars(root / "w", shards=2, rows=2)
    for path in ("t", "t/*.parquet", "t/{0..1}.parquet", "t/[0-9].parquet", "**/*.parquet"):
        assert len(load(root / path).train) == 4
    assert len(load(root / "t" / "1.parquet").train) == 2
    assert load(root / "x.csv").train.ids == ["p/a.png"]
    for path in ("w", "w/{000..001}.tar", "w/*.tar", "t"):
        assert len(items_of(ImagesConfig(path=str(root / path), streaming=True))) == 4
    with pytest.raises(UserError, match=r"w/002\.tar is no file"):
        load(root / "w/{000..002}.tar")
    with pytest.raises(UserError, match="more than 1,000,000"):
        load(root / "{0..99}{0..99}{0..99}{0..99}{0..99}{0..99}.tar")


def test_a_table_is_read_where_it_lies_and_shows_no_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(datasets, "load_dataset", None)  # which would copy it
    folder = write_files(tmp_path / "x", "sub/a.png", "../b.png")
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    path = folder / "x.parquet"

    def write(name: str | None) -> None:
        cells = [{"bytes": encoded(), "path": "a.png"}] * 5 + [{"bytes": None, "path": name}]
        pq.write_table(pa.table({"image": cells}), path, row_group_size=2)

    sink = pa.OSFile(str(tmp_path / "x.arrow"), "wb")
    with pa.ipc.new_file(sink, (table := pa.table({"image": [encoded()] * 3})).schema) as writer:
        writer.write_table(table)
    sink.close()
    assert len(load(tmp_path / "x.arrow").train) == 3
    write("sub/a.png")
    monkeypatch.setattr(sys.modules["vqvae2.data.table"], "ROWS_BYTES", 1)
    assert len(load(path).train) == 6
    assert "x.parquet: slow, as a row is read with all" in caplog.text
    with pytest.raises(BadImage, match="only files below a local table are read"):
        [i.pixels(no_change) for i in items_of(ImagesConfig(path=str(path), streaming=True))]
    for name in ("../b.png", str(tmp_path / "b.png"), "link.png", "a\0b", "x" * 99_999):
        write(name)
        with pytest.raises(BadImage, match="only files below a local table are read") as error:
            load(path)
        assert len(str(error.value)) < 500


def test_a_table_of_the_hub_shows_pictures_of_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "cache/a.png", "b.png")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, is_read in (("cache/a.png", True), ("b.png", False)):
        features = datasets.Features(image=datasets.Image())
        rows = {"image": [{"bytes": None, "path": str(tmp_path / name)}]}
        table = datasets.Dataset.from_dict(rows, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda path, table=table: table)
        if is_read:
            assert len(load("someone/images").train) == 1
            continue
        with pytest.raises(BadImage, match="only files below a local table"):
            load("someone/images")

    # What lies at the bottom of an error is said.
    def fail(path: str) -> None:
        raise ValueError("generating failed") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"No space left on device.*HF_HOME"):
        load("someone/images")


def test_only_regular_files_are_read_and_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    names = ("a/a.png", "#recycle/b.png", "x.csv: path\np.png\n", "y.csv: path\n" + "n" * 99_999)
    root = write_files(tmp_path, *names)
    os.mkfifo(root / "p.png")
    os.mkfifo(root / "p.parquet")
    (root / "link.png").symlink_to("p.png")
    assert load(root).train.ids == ["a/a.png"]
    for name in ("p.png", "p.parquet", "link.png"):
        assert f"{name} is not used: it is no regular file" in caplog.text
    for path in ("x.csv", "p.parquet", "p.png"):
        with pytest.raises(UserError, match="no regular file"):
            load(root / path)
    for path in (root / "y.csv", root / ("x" * 9999)):
        with pytest.raises(UserError) as error:
            load(path)
        assert len(str(error.value)) < 500

    # A folder that cannot be read is not left out.
    real = os.scandir

    def scandir(folder: Path | str) -> object:
        if str(folder).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in (root, root / "*" / "*.tar"):
        with pytest.raises(PermissionError, match="/a"):
            load(pattern)


def test_tables_without_pictures_are_notes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tars = numbered_tars(tmp_path / "x", shards=2, rows=3)
    pq.write_table(pa.table({"url": ["u"], "key": ["k"]}), tars / "000.parquet")
    for streaming in (False, True):
        assert len(items_of(ImagesConfig(path=str(tars), streaming=streaming))) == 6
    assert "files beside 000.tar, such as 000.parquet, are not used" in caplog.text
    for tar in tars.glob("*.tar"):
        tar.unlink()
    write_files(tars, "d/a.png", "c/b.png")
    odd = pa.table({"image": [[("k", 1)]]}, pa.schema({"image": pa.map_(pa.string(), pa.int64())}))
    pq.write_table(odd.rename_columns(["notes"]), tars / "001.parquet")
    (tars / "002.parquet").write_bytes(b"")
    assert load(tars).class_names == ("c", "d")


def test_columns_of_any_type_and_tables_of_any_format_are_read(tmp_path: Path) -> None:
    cells = {"image": [encoded(i) for i in range(3)], "label": [0, 1, 1]}
    odd = pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({**cells, "odd": odd}), tmp_path / "odd.parquet")
    table = datasets.Dataset.from_dict({**cells, "id": [4, 5, 6]})
    for name in ("torch", "numpy"):
        table.with_format(name).save_to_disk(str(tmp_path / name))
    table.save_to_disk(str(tmp_path / "cafe\N{COMBINING ACUTE ACCENT}"))
    for name in ("odd.parquet", "torch", "numpy", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"):
        found = load(tmp_path / name)
        assert (len(found.train), found.class_names) == (3, ("0", "1"))
    arrays = {"x": np.zeros((3, 8, 8), np.uint8), "y": np.arange(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    data = ImagesConfig(path=str(tmp_path / "x.npz"), image_column="x", label_column="none")
    assert open_source(data, GREY).train.class_names == ()
    with pytest.raises(UserError, match=r"the arrays \['x', 'y'\], of which 'y' is unknown"):
        open_source(replace(data, label_column=None), GREY)


# Python


def test_data_of_python_code_that_does_not_fit_is_refused() -> None:
    image = np.zeros((8, 8), np.uint8)
    for data, message in (
        ([{"images": image}, {"images": image[:4]}], "several shapes"),
        ({"images": [image, image[:4]]}, "several shapes"),
        ({"pictures": image[None]}, r"\['pictures'\], but 'images'"),
        ([{"picture": image}], "'images'"),
        ([{"images": image}, {"images": image, "labels": 1}], "row 0 has no 'labels'"),
        ([{"images": image, "labels": 1}, {"labels": 1}], "row 1 has no 'images'"),
        ({"images": [[1, 2]]}, "images of shape"),
        ({"images": image[None], "labels": [1, 2]}, "one for each"),
    ):
        with pytest.raises(UserError, match=message):
            load_images(data, GREY)


def test_conditions_come_from_every_kind_of_table(sources: dict[str, Path], tmp_path: Path) -> None:
    files, image = [str(path) for path in pictures_of(sources["folder"])[:3]], PreprocessingConfig()
    cells = [Path(file).read_bytes() for file in files]
    for column in ([[0.5, 1], [2, -1.0], [0, 0.0]], [["b", "a"], [], ["b"]], [3.5, 4, 5]):
        texts = list(map(json.dumps, column))
        if isinstance(column[0], list) and column[0] == ["b", "a"]:
            texts[0] = "b; a"
        rows = [{"path": f, "x": value} for f, value in zip(files, column, strict=True)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with open(tmp_path / "a.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "x"], *zip(files, texts, strict=True)])
        pq.write_table(pa.table({"image": cells, "x": column}), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.csv", "a.parquet"):
            data = ImagesConfig(path=str(tmp_path / name), condition_column="x")
            vectors = open_source(data, image).train.vectors
            if column[0] == ["b", "a"]:
                assert vectors.names == ("a", "b")
                assert vectors.values.tolist() == [[1, 1], [0, 0], [0, 1]]
            else:
                assert vectors.names == ()
                assert vectors.values.tolist() == np.reshape(column, (3, -1)).tolist()
    pixels = np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, x=np.eye(2, dtype=np.int64))
    data = ImagesConfig(path=str(tmp_path / "a.npz"), condition_column="x")
    assert open_source(data, image).train.vectors.values.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ([[0.5], [1.5, 2]], r"but \[1.5, 2\] in row 1"),
        ([[], [0.5]], r"nothing in row 0, but \[0.5\] in row 1"),
        ([[0.5], None], "None in row 1"),
        ([[0.5], [float("nan")]], "not finite in row 1"),
        ([["a"], [1]], "names and numbers"),
        ([[], []], "no name in any row"),
        ([[1, 0, 1], [0, 1, 1]], r"\[1, 0, 1\] in row 0: as attributes, one is twice"),
    ],
)
def test_conditions_that_cannot_be_right_are_refused(column: list, reason: str) -> None:
    data = {"images": np.zeros((2, 8, 8), np.uint8), "conditions": column}
    with pytest.raises(UserError, match=reason):
        load_images(data, PreprocessingConfig())


def test_streams_have_vectors_of_one_length_from_members_and_columns(tmp_path: Path) -> None:
    image, vectors = PreprocessingConfig(validation_fraction=0), [[0.5, 1], [2, -1.0], [0, 3.5]]
    members: dict[str, bytes | str] = {}
    for i, vector in enumerate(vectors):
        file = io.BytesIO()
        np.save(file, np.array(vector))
        given = (".npy", file.getvalue()), (".json", json.dumps({"x": vector}).encode())
        members[f"{i}.png"] = encoded()
        suffix, content = given[i % 2]
        members[f"{i}.x{suffix}" if suffix == ".npy" else f"{i}{suffix}"] = content
    write_tar(tmp_path / "tar" / "a.tar", members)
    pq.write_table(pa.table({"image": [encoded()] * 3, "x": vectors}), tmp_path / "a.parquet")
    for path, streaming in ((tmp_path / "tar", False), (tmp_path / "a.parquet", True)):
        data = ImagesConfig(path=str(path), condition_column="x", streaming=streaming)
        found = find_parts(data, image, 10)
        items = [item for part in found.parts for item in part.items()]
        assert (found.vector_size, found.vector_names) == (2, ())
        assert [item.vector.tolist() for item in items if item.vector is not None] == vectors
        assert all(isinstance(item.pixels(no_change), torch.Tensor) for item in items)

    # One of another length, and names.
    for wrong, reason in (
        ([1.5], "1 values, but others have 2"),
        (["a"], r"\['a'\]: of a stream it must"),
    ):
        members["1.json"] = json.dumps({"x": wrong}).encode()
        write_tar(tmp_path / "tar" / "a.tar", members)
        data = ImagesConfig(path=str(tmp_path / "tar"), condition_column="x")
        first, bad, _ = find_parts(data, image, 10).parts[0].items()
        assert isinstance(first.pixels(no_change), torch.Tensor)
        with pytest.raises(BadImage, match=reason):  # which may be skipped
            bad.pixels(no_change)

    # Training reads names alone at times, and no vectors; without the column they are no pictures.
    for column in ("x", None):
        data = ImagesConfig(path=str(tmp_path / "tar"), condition_column=column)
        stream = open_source(data, image).train
        assert [row.id for row in stream.rows(0, contents=False)] == ["a/0", "a/1", "a/2"]
        assert not any(isinstance(row.cell, Exception) for row in stream.rows(0))


def test_columns_that_name_something_else_are_refused(tmp_path: Path) -> None:
    image = PreprocessingConfig(size=(8,), channels=1)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), conditions=np.eye(2))
    data = ImagesConfig(path=str(tmp_path / "a.npz"), condition_column="conditions")
    assert open_source(data, image).train.vectors.size == 2
    folder = str(tmp_path / "prepared")
    prepare_command(PrepareConfig(data=data, image=image, output_dir=folder))
    for path in (data.path, folder):
        with pytest.raises(UserError, match="typo"):
            open_source(ImagesConfig(path=path, condition_column="typo"), image)


def test_pictures_of_any_name_are_found_and_wrong_columns_of_shards_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_files(tmp_path / "a", "@ann.png", "$5.png", "bob.png", "@eaDir/thumb.png")
    assert len(open_source(ImagesConfig(path=str(tmp_path / "a")), GREY).train) == 3
    table = pa.table({"photo": [encoded()]})
    pq.write_table(table, tmp_path / "a" / "train-0.parquet")
    assert len(open_source(ImagesConfig(path=str(tmp_path / "a")), GREY).train) == 3
    assert "train-0.parquet is not used: " in caplog.text
    with pytest.raises(UserError, match="no 'foto'"):
        open_source(ImagesConfig(path=str(tmp_path / "a"), image_column="foto"), GREY)


def test_a_bad_image_survives_another_process() -> None:
    error = BadImage.of("photos", "a.png", ValueError("odd"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.name, again.reason) == (str(error), "a.png", "odd")
    trace = f"Caught BadImage in DataLoader worker process 0.\n  File x\nx.BadImage: {error}\n"
    assert str(BadImage(trace)) == str(error)


def test_whole_numbers_in_arrays_are_values_and_text_between_semicolons_is_names() -> None:
    rows, data = [[1, 0, 1], [0, 0, 1]], {"images": np.zeros((2, 8, 8), np.uint8)}
    for own in (np.array(rows), torch.tensor(rows), [*torch.tensor(rows)], [*np.array(rows)]):
        vectors = open_source({**data, "conditions": own}, PreprocessingConfig()).train.vectors
        assert (vectors.names, vectors.values.tolist()) == ((), rows)
    vectors = read_vectors(["3;5", "3", "true; 7", '["7"]'], "a.csv")
    assert vectors.names == ("3", "5", "7", "true")
    assert vectors.values.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]
    with pytest.raises(UserError):
        read_vectors([10**400], "a.jsonl")


def test_conditions_that_are_not_there_are_named_and_attributes_keep_their_places(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    image, folder = PreprocessingConfig(), str(sources["folder"])
    tars = str(numbered_tars(tmp_path / "tars", 1, 2))
    for path, reason in ((folder, "no condition column 'x'"), (tars, "000/0000 has no condition")):
        with pytest.raises(UserError, match=reason):
            find_parts(ImagesConfig(path=path, condition_column="x"), image, 10)
    files = [str(path) for path in pictures_of(sources["folder"])[:4]]
    for name, values in {"a": ["a", "c"], "b": ["c", "new"]}.items():
        rows = zip(files[2 * (name == "b") :], values, strict=False)
        lines = [json.dumps({"path": file, "x": [value]}) for file, value in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = {"path": str(tmp_path / "a.jsonl"), "validation_path": str(tmp_path / "b.jsonl")}
    held_out = open_source(ImagesConfig(**paths, condition_column="x"), image).held_out
    assert held_out.vectors.names == ("a", "c")
    assert held_out.vectors.values.tolist() == [[0, 1], [0, 0]]
