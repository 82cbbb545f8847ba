"""The same pictures, from every kind of source; augmentation; bad files; streams."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
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
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ShuffledLoader
from vqvae2.common.pictures import save_image
from vqvae2.config import AugmentationConfig, DataConfig, ImagesConfig, PreprocessingConfig
from vqvae2.data import (
    AugmentedImages,
    BadImage,
    ImageSplits,
    held_out_images,
    is_held_out,
    load_images,
    load_picture,
    open_source,
    prepare,
    to_images,
)
from vqvae2.data.augmentation import known_views, no_change, random_change, view_change
from vqvae2.data.open_source import expand_ranges
from vqvae2.data.stream import ImageStream, StreamedImages
from vqvae2.data.work_parts import Item, find_parts, read_items

GREY = PreprocessingConfig(size=(28,), channels=1, validation_fraction=0)
UNCHANGED = {"train": [no_change], "validation": [no_change]}


def load(path: Path | str, config: PreprocessingConfig = GREY, **options: object) -> ImageSplits:
    return load_images(ImagesConfig(path=str(path), **options), config, show_progress=False)  # type: ignore[arg-type]


def shards_at(path: Path | str) -> ImageStream:
    source = open_source(ImagesConfig(path=str(path), streaming=True), GREY).train
    assert isinstance(source, ImageStream)
    return source


def items_of(data: ImagesConfig, config: PreprocessingConfig = GREY) -> list[Item]:
    """What preparation and extraction read."""
    return [item for part in find_parts(data, config, 10).parts for item in part.items()]


def ids_of(data: ImagesConfig, split: str) -> list[str]:
    return [item.id for item in items_of(data) if item.split == split]


def rows_of(splits: ImageSplits) -> tuple[torch.Tensor, list[str]]:
    """All training pixels, and the class name of each."""
    batch = splits.train.__getitems__(range(len(splits.train)))
    return batch["images"], [splits.class_names[label] for label in batch["labels"]]


def write_tars(folder: Path, paths: list[Path], root: Path, per_shard: int = 17) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(paths), per_shard):
        with tarfile.open(folder / f"s{first // per_shard:03d}.tar", "w") as archive:
            for path in paths[first : first + per_shard]:
                for suffix, content in (
                    (".png", path.read_bytes()),
                    (".cls", path.parent.name.encode()),
                ):
                    member = tarfile.TarInfo(path.stem + suffix)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 60 pictures in the same order, in each form."""
    root = tmp_path_factory.mktemp("sources")
    folder = write_images(root / "folder", 60)
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    names = [path.relative_to(root).as_posix() for path in paths]
    labels = [path.parent.name for path in paths]
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *zip(names, labels, strict=True)])
    (root / "list.jsonl").write_text(
        "".join(
            json.dumps({"file": n, "kind": k}) + "\n" for n, k in zip(names, labels, strict=True)
        )
    )
    cells = [path.read_bytes() for path in paths]
    pq.write_table(pa.table({"image": cells, "label": labels}), root / "one.parquet")
    (root / "tables").mkdir()
    for part in range(3):
        pq.write_table(
            pa.table(
                {
                    "image": cells[part * 20 : part * 20 + 20],
                    "label": labels[part * 20 : part * 20 + 20],
                }
            ),
            root / "tables" / f"p{part}.parquet",
        )
    images = np.stack([np.array(Image.open(path)) for path in paths])
    np.savez(root / "stack.npz", images=images, labels=np.array(labels))
    import datasets

    datasets.Dataset.from_dict({"image": cells, "label": labels}).save_to_disk(root / "saved")
    write_tars(root / "tars", paths, folder)
    return {path.name: path for path in root.iterdir()} | {
        "glob": root / "tables" / "p*.parquet",
    }


@pytest.mark.parametrize(
    "name",
    [
        "list.csv",
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
    images, found = rows_of(load(sources[name], **columns))
    assert torch.equal(images, expected)
    assert found == classes


def test_npy_lists_and_python_data(tmp_path: Path, sources: dict[str, Path]) -> None:
    expected, classes = rows_of(load(sources["folder"]))
    array = expected[:, 0].numpy()
    np.save(tmp_path / "x.npy", array)
    assert torch.equal(load(tmp_path / "x.npy").train.__getitems__(range(60))["images"], expected)
    (sources["folder"].parent / "list.txt").write_text(
        "\n".join(f"folder/{name}" for name in load(sources["folder"]).train.ids)
    )
    assert torch.equal(
        load(sources["folder"].parent / "list.txt").train.__getitems__(range(60))["images"],
        expected,
    )
    for data in (
        {"images": expected, "labels": classes},
        ({"images": row, "labels": label} for row, label in zip(array, classes, strict=True)),
    ):
        images, found = rows_of(load_images(data, GREY, show_progress=False))
        assert torch.equal(images, expected)
        assert found == classes


def test_links_and_lists_with_a_split(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(sources["folder"] / "bag")
    (tmp_path / "photos" / "linked" / "again").unlink(missing_ok=True)
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    assert all(name.startswith("linked/") for name in load(tmp_path / "photos").train.ids)
    names = [
        os.path.relpath(sources["folder"] / name, tmp_path)
        for name in load(sources["folder"]).train.ids
    ]
    lines = [
        "path\tsplit",
        *(f"{name}\t{'train' if i % 3 else 'test'}" for i, name in enumerate(names)),
    ]
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    splits = load(tmp_path / "x.tsv")
    assert (len(splits.train), len(splits.validation)) == (40, 20)
    assert set(splits.validation.ids) == set(names[::3])


def test_bands_bits_and_floats(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    five = generator.integers(0, 65536, (3, 16, 16, 5), dtype=np.uint16)
    config = PreprocessingConfig(
        size=(16,), channels=5, value_range=(0, 65535), validation_fraction=0
    )
    for i, array in enumerate(five):
        np.save(tmp_path / f"{i}.npy", array)
        tifffile.imwrite(
            tmp_path / f"{i}.tif", array, planarconfig="contig", photometric="minisblack"
        )
    images = load(tmp_path, config).train.__getitems__(range(6))["images"]
    assert torch.equal(images[::2], images[1::2])
    expected = torch.from_numpy(five.astype(np.float64) / 65535 * 2 - 1).permute(0, 3, 1, 2)
    assert (images[::2] - expected).abs().max() < 1e-6
    save_image(
        images[0], tmp_path / "again" / "x.tif", config.value_range
    )  # what samples are written as
    assert np.array_equal(tifffile.imread(tmp_path / "again" / "x.tif"), five[0])
    grey = Image.fromarray(five[0, ..., 0])
    grey.save(tmp_path / "grey16.png")
    read = load_picture(str(tmp_path / "grey16.png"), replace(config, channels=1))
    assert (read[0, 0] - expected[0, 0]).abs().max() < 1e-6
    depth = generator.normal(size=(20, 12)).astype(np.float32)
    pixels = prepare(depth, PreprocessingConfig(size=(20, 12), channels=1, value_range=(-6, 6)))
    assert np.allclose(pixels[0] * 6, depth, atol=1e-5)


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sixteen = np.full((8, 8), 40_000, np.uint16)
    for picture, config, message in (
        (sixteen, GREY, "value-range"),
        (sixteen, replace(GREY, value_range=(0, 4095)), "outside of image.value_range"),
        (np.full((8, 8), np.nan, np.float32), replace(GREY, value_range=(0, 1)), "outside"),
        (np.zeros((8, 8, 5), np.uint8), GREY, "image.channels"),
        (Image.new("L", (8, 8)), replace(GREY, value_range=(0, 1)), "8-bit picture"),
        (np.zeros((8, 8), np.uint8), replace(GREY, value_range=(0, 65535)), "end before"),
        (Image.new("RGB", (8, 8)), replace(GREY, channels=5), "image.channels is 5"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(picture, config)
    rows = [bytes([0]) + np.full((8, 3), 1000, ">u2").tobytes() for _ in range(8)]
    (tmp_path / "deep.png").write_bytes(png16(rows, 8, 8))
    with pytest.raises(UserError, match="16 bits in several channels"):
        load_picture(str(tmp_path / "deep.png"), replace(GREY, channels=3))


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


def png16(rows: list[bytes], width: int, height: int) -> bytes:
    """An RGB PNG with 16 bits per channel."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


def test_pictures_come_upright_and_uninverted_or_not_at_all(tmp_path: Path) -> None:
    grey = PreprocessingConfig(size=(40, 20), channels=1, fit="stretch", value_range=(0, 65535))
    sixteen = np.zeros((20, 40), np.uint16)
    sixteen[:, 20:] = 50_000
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(sixteen).save(tmp_path / "turned.png", exif=exif)
    upright = load_picture(str(tmp_path / "turned.png"), grey)[0, 0]
    assert upright.shape == (40, 20)
    assert upright[5, 10] < upright[35, 10]
    tifffile.imwrite(tmp_path / "turned.tif", sixteen, extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(UserError, match="save it upright"):
        load_picture(str(tmp_path / "turned.tif"), grey)
    eight = (sixteen // 256).astype(np.uint8)
    tifffile.imwrite(tmp_path / "inverted.tif", eight, photometric="miniswhite")
    inverted = load_picture(
        str(tmp_path / "inverted.tif"), replace(grey, size=(20, 40), value_range=(0, 255))
    )[0, 0]
    assert np.array_equal(inverted, 255 - eight)
    (tmp_path / "deep.ppm").write_bytes(b"P6 # a comment\n2 1\n65535\n" + bytes(12))
    with pytest.raises(UserError, match="PPM with 16 bits"):
        load_picture(str(tmp_path / "deep.ppm"), replace(GREY, channels=3))
    with pytest.raises(UserError, match=r"image\.channels"):
        prepare(eight, replace(GREY, channels=4))
    assert prepare(eight, replace(GREY, channels=3)).shape == (3, 28, 28)


def spoil(folder: Path) -> set[str]:
    """Plant broken files among pictures."""
    some = next((folder / "bag").glob("*.png")).read_bytes()
    (folder / "bag" / "cut.png").write_bytes(some[:100])
    (folder / "bag" / "text.jpg").write_text("no picture")
    (folder / "coat" / "empty.png").write_bytes(b"")
    (folder / "coat" / "bomb.png").write_bytes(png16([b""], 60_000, 60_000))
    return {"bag/cut.png", "bag/text.jpg", "coat/empty.png", "coat/bomb.png"}


def test_bad_files_stop_or_are_skipped_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    good = load(folder).train.ids
    bad = spoil(folder)
    with pytest.raises(
        BadImage, match=r"(cut|text|empty|bomb)\.(png|jpg).*on-error skip|bomb.*claims"
    ):
        load(folder)
    splits = load(folder, on_error="skip")
    assert {error.name for error in splits.skipped} == bad
    assert splits.train.ids == good
    expected, _ = rows_of(splits)
    for name in bad:
        (folder / name).unlink()
    assert torch.equal(rows_of(load(folder))[0], expected)


def test_shards_of_held_out_splits_are_never_trained_on(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=4, rows=3)
    for i, shard in enumerate(sorted(tars.iterdir())):
        target = tmp_path / "split" / ("val" if i == 3 else "train") / shard.name
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(shard, target)
    data = DataConfig(path=str(tmp_path / "split"))
    for split, expected in (("train", {"000", "001", "002"}), ("validation", {"003"})):
        assert {name.split("/")[0] for name in ids_of(data, split)} == expected
    assert held_out_images(data, GREY).ids == ["003/0000", "003/0001", "003/0002"]
    assert len(shards_at(tmp_path / "split" / "val")) == 1


def test_no_shard_is_trained_on_and_held_out(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=2)
    (tmp_path / "link").symlink_to(tars)
    for path, held_out in (
        ("x/*.tar", "x/002.tar"),
        ("x", "x/{001..002}.tar"),
        ("x/000.tar", "link"),
        ("x/000.tar", "link/000.tar"),
    ):
        data = ImagesConfig(path=str(tmp_path / path), validation_path=str(tmp_path / held_out))
        with pytest.raises(UserError, match="would be trained on"):
            open_source(data, GREY)
    train, held_out = str(tars / "{000..001}.tar"), str(tars / "002.tar")
    apart = ImagesConfig(path=train, validation_path=held_out)
    assert ids_of(apart, "validation") == ["002/0000", "002/0001"]
    alone = replace(apart, validation_path=None)
    assert find_parts(apart, GREY, 10).facts != find_parts(alone, GREY, 10).facts


def test_no_picture_is_trained_on_and_held_out_by_another_name(tmp_path: Path) -> None:
    folder, other = write_images(tmp_path / "folder", 20), write_images(tmp_path / "other", 20)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.png"))
    np.save(tmp_path / "x.npy", np.zeros((9, 28, 28), np.uint8))
    os.link(tmp_path / "x.npy", tmp_path / "y.npy")
    (tmp_path / "a.txt").write_text("\n".join(names))
    (tmp_path / "b.txt").write_text("\n".join(f"./{name}" for name in names))
    (tmp_path / "split.csv").write_text(
        "path,split\n" + "".join(f"{name},train\n./{name[:-4]}x.png,val\n" for name in names[:3])
    )
    for name in names[:3]:
        (tmp_path / f"{name[:-4]}x.png").symlink_to(tmp_path / name)
    (other / "inside").symlink_to(folder)
    for path, held_out in (
        ("a.txt", "folder"),
        ("a.txt", "b.txt"),
        ("other", "folder"),
        ("x.npy", "y.npy"),
        ("split.csv", None),
    ):
        with pytest.raises(UserError, match="would be trained on"):
            load(tmp_path / path, validation_path=held_out and str(tmp_path / held_out))
    splits = load(
        folder, replace(GREY, validation_fraction=0.5)
    )  # all names of a file are on one side
    sides = [{(folder / name).resolve() for name in dataset.ids} for _, dataset in splits.items()]
    assert all(sides)
    assert not sides[0] & sides[1]
    (other / "inside").unlink()
    (other / "bag" / "twin.png").symlink_to(next(folder.rglob("*.png")).resolve())
    assert len(load(other, validation_path=str(folder)).train) == 20
    tars = numbered_tars(tmp_path / "tars", shards=1, rows=2)
    with pytest.raises(UserError, match="would be trained on"):
        find_parts(
            ImagesConfig(
                path=f"file://{tars}/000.tar", validation_path=str(tars / "000.tar"), streaming=True
            ),
            GREY,
            10,
        )
    root = tmp_path / "root"
    write_images(root / "train", 9)
    write_images(root / "validation", 9)
    assert len(load(root, validation_path=str(root / "validation")).train) == 9


def test_no_picture_vanishes(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mixed = shutil.copytree(sources["folder"], tmp_path / "mixed")
    shutil.copy(next(sources["tars"].iterdir()), mixed / "backup.tar")
    shutil.copy(next(mixed.rglob("*.png")), mixed / "x.png")
    with pytest.raises(UserError, match=r"pictures and backup\.tar"):
        load(mixed)
    (mixed / "backup.tar").unlink()
    load(mixed)
    assert "x.png lies in no class folder" in caplog.text
    first, second = (
        write_members(tmp_path / f"{name}.tar", [f"{name}.png"]).read_bytes() for name in "pq"
    )
    (tmp_path / "cat.tar").write_bytes(first + second)
    with tarfile.open(write_members(tmp_path / "links.tar", ["a.png"]), "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)

    for name, message in (
        ("cat.tar", "after the mark of its end"),
        ("links.tar", r"b\.png, a link"),
    ):
        with pytest.raises(UserError, match=message):
            list(
                read_items(
                    items_of(ImagesConfig(path=str(tmp_path / name))),
                    UNCHANGED,
                    skip=False,
                    num_threads=1,
                )
            )
    data = datasets.load_from_disk(str(sources["saved"]))
    datasets.DatasetDict({"train": data, "extra": data}).save_to_disk(tmp_path / "splits")
    load(tmp_path / "splits")
    assert "not used: extra" in caplog.text
    for part in ("train", "val", "test"):
        write_images(tmp_path / "three" / part, 5)
    load(tmp_path / "three")
    assert "'val' is held out; not used: test" in caplog.text
    twice = shards_at(f"{sources['tars']}/*{{0..1}}*.tar").urls
    assert twice == shards_at(f"{sources['tars']}/*.tar").urls
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 99)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 16, 16), np.uint8), photometric="minisblack")
    for name, message in (("x.gif", "2 frames"), ("x.tif", "5 pages")):
        with pytest.raises(UserError, match=message):
            load_picture(str(tmp_path / name), GREY)


def test_labels_are_those_of_the_data_or_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    cells = [
        {"bytes": path.read_bytes(), "path": None}
        for path in sorted(sources["folder"].rglob("*.png"))
    ]
    kinds = {
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "split": datasets.ClassLabel(names=["train", "test"]),
    }
    features = datasets.Features({"image": datasets.Image(), **kinds})
    rows = {"image": cells, "kind": [0, 1] * 30, "split": [0] * 50 + [1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "typed.parquet")
    splits = load(tmp_path / "typed.parquet")
    assert (len(splits.train), len(splits.validation), splits.class_names) == (
        50,
        10,
        ("cat", "dog"),
    )
    datasets.Dataset.from_dict(rows, features=features).remove_columns("split").to_parquet(
        tmp_path / "streamed.parquet"
    )
    assert {row.label for row in shards_at(tmp_path / "streamed.parquet").all_rows()} == {0, 1}
    with pytest.raises(UserError, match=r"correct --data\.label-column"):
        next(stream(tmp_path / "streamed.parquet", label_column="knid").start_at(0))
    pq.write_table(
        pa.table({"image": [cells[0]["bytes"]] * 2, "id": ["a", "a"]}), tmp_path / "twice.parquet"
    )
    with pytest.raises(UserError, match="'a' twice"):
        next(stream(tmp_path / "twice.parquet", batch_size=2).start_at(0))
    name = next(sources["folder"].rglob("*.png"))
    (tmp_path / "x.csv").write_text(
        f"path,label\n{name},cat\n{name.parent.parent / name.parent.name / '..' / name.parent.name / name.name}x,\n"
    )
    shutil.copy(name, f"{name}x")
    with pytest.raises(UserError, match="does not give every row a class"):
        load(tmp_path / "x.csv")
    os.remove(f"{name}x")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), label=np.arange(2))
    with pytest.raises(UserError, match=r"\['images', 'label'\]"):
        load(tmp_path / "x.npz")


def test_what_is_common_is_not_refused(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hub = shutil.copytree(sources["tables"], tmp_path / "hub")
    shutil.copy(next(sources["folder"].rglob("*.png")), hub / "banner.png")
    assert len(load(hub).train)
    assert "banner.png, are not used" in caplog.text
    table = pq.read_table(sources["one.parquet"])
    lists = {
        "info": {
            "features": {
                "tags": [{"dtype": "int64", "_type": "Value"}],
                "label": {"_type": "ClassLabel", "names": ["a"]},
            }
        }
    }
    pq.write_table(
        table.drop(["label"]).replace_schema_metadata({"huggingface": json.dumps(lists)}),
        tmp_path / "lists.parquet",
    )
    assert (
        len(next(stream(tmp_path / "lists.parquet", label_column=None).start_at(0))["images"]) == 8
    )
    with tarfile.open(
        write_members(tmp_path / "x.tar", ["README.txt", "a.png", "a.cls"]), "a"
    ) as archive:
        link = tarfile.TarInfo("latest")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    held_out = numbered_tars(tmp_path / "held_out", shards=1, rows=2)
    data = ImagesConfig(
        path=str(tmp_path / "x.tar"), validation_path=str(held_out), streaming=True, on_error="skip"
    )
    assert ids_of(data, "train") == ["x/README", "x/a"]
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with tifffile.TiffWriter(tmp_path / "masked.tif") as file:
        file.write(picture)
        file.write(picture > 9, subfiletype=4)
    with tifffile.TiffWriter(tmp_path / "preview.tif") as file:
        file.write(picture[::2, ::2], subfiletype=1)
        file.write(picture)
    assert np.array_equal(
        load_picture(str(tmp_path / "masked.tif"), replace(GREY, size=(8,))).squeeze(), picture
    )
    with pytest.raises(UserError, match="preview or a mask"):
        load_picture(str(tmp_path / "preview.tif"), GREY)
    np.savez(
        tmp_path / "x.npz",
        images=np.zeros((4, 8, 8), np.uint8),
        labels=np.arange(4),
        class_names=np.array(["a", "b"]),
    )
    assert load(tmp_path / "x.npz").class_names == ("0", "1", "2", "3")
    one_sided = table.append_column("split", pa.array(["train"] * len(table)))
    pq.write_table(one_sided, tmp_path / "split.parquet")
    with pytest.raises(UserError, match="would be trained on"):
        load(tmp_path / "split.parquet", validation_path=str(tmp_path / "split.parquet"))


def test_strange_names_and_notes_are_a_sentence(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 3)
    shutil.copy(next(folder.rglob("*.png")), os.fsencode(folder) + b"/bag/\xff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        load(folder)
    (tmp_path / "x.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as a list"):
        load(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="without a pixel"):
        prepare(np.zeros((0, 7), np.uint8), GREY)


def test_a_stream_of_a_table_with_a_split_is_refused(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    table = pq.read_table(sources["one.parquet"]).drop(["label"])
    pq.write_table(
        table.append_column("split", pa.array(["train", "test"] * 30)), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match="column 'split'"):
        next(stream(tmp_path / "x.parquet").start_at(0))


def test_patterns() -> None:
    assert expand_ranges("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert len(expand_ranges("{0..1}{0..1}")) == 4


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
    config = replace(GREY, size=(2,), validation_fraction=fraction)
    data = {
        "images": np.arange(number, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2),
        "labels": np.arange(number),
    }
    assume(not all(is_held_out(f"{i:09d}", fraction) for i in range(number)))
    splits = load_images(data, config, show_progress=False)
    parts = find_parts(data, config, size).parts
    shared = [part for rank in range(processes) for part in parts[rank::processes]]
    assert sorted(map(id, shared)) == sorted(map(id, parts))
    for split, images in splits.items():
        items = [
            item
            for part in sorted(parts, key=lambda part: part.number)
            if split in part.splits
            for item in part.items()
        ]
        assert [item.id for item in items] == images.ids
        assert (
            [int(item.pixels(no_change)[0, 0, 0]) for item in items]
            == [item.label for item in items]
            == [int(name) for name in images.ids]
        )


def test_a_stream_of_a_hub_id_is_its_parquet_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    asked: list[str] = []

    def listing(urls: list[str]) -> tuple[object, str, list[str]]:
        asked.extend(urls)
        return fsspec.filesystem("memory"), "", []

    monkeypatch.setattr(fsspec, "get_fs_token_paths", listing)
    with pytest.raises(UserError, match="holds no .tar or .parquet shard"):
        shards_at("someone/photos")
    assert asked == ["hf://datasets/someone/photos/**/*.parquet"]


# Augmentation


@pytest.mark.parametrize("crop", ["off", "random", "random_resized"])
def test_changes_are_a_function_of_seed_epoch_and_image(
    crop: str, sources: dict[str, Path]
) -> None:
    images = load(sources["folder"], replace(GREY, size=(16, 24))).train
    config = AugmentationConfig(horizontal_flip=True, crop=crop)  # type: ignore[arg-type]
    augmented = AugmentedImages(images, config, seed=1)
    batch = augmented.__getitems__([3, 60 + 3, 120 + 3, 4])["images"]
    for place, i in enumerate([3, 60 + 3, 120 + 3, 4]):  # whatever else is asked for
        assert torch.equal(
            AugmentedImages(images, config, seed=1).__getitems__([i])["images"][0], batch[place]
        )
    epochs = AugmentedImages(images, config, seed=1).__getitems__([3 + 60 * e for e in range(8)])[
        "images"
    ]
    assert len({image.numpy().tobytes() for image in epochs}) >= (2 if crop == "off" else 4)
    one = [row for _, row in zip(range(6), ShuffledLoader(augmented, 8).start_at(0), strict=False)]
    later = next(ShuffledLoader(augmented, 8).start_at(5))
    assert torch.equal(one[5]["images"], later["images"])
    halves = [
        next(ShuffledLoader(augmented, 8, num_processes=2, process_index=r).start_at(5))["images"]
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), later["images"])


def test_windows_lie_in_the_picture_and_have_its_ratio() -> None:
    image = PreprocessingConfig(size=(32, 64))
    shares = []
    for epoch in range(200):
        change = random_change(
            AugmentationConfig(crop="random_resized", crop_area=(0.3, 1)),
            image,
            (200, 90),
            seed=0,
            epoch=epoch,
            name="a",
        )
        left, top, right, bottom = change.window or (0, 0, 0, 0)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 90
        assert 2 * 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 2 * 4 / 3 + 1e-6
        shares.append((right - left) * (bottom - top) / (200 * 90))
    assert 0.29 < min(shares) < 0.45
    assert max(shares) > 0.8
    flipped = view_change("flip", image, (200, 90)).apply(
        np.arange(32 * 64, dtype=np.uint8).reshape(32, 64) % 251, replace(image, channels=1)
    )
    assert np.array_equal(
        flipped[0, :, ::-1], np.arange(32 * 64).reshape(32, 64).astype(np.uint8) % 251
    )
    assert {view_change(view, image, (200, 90)) for view in known_views()}.__len__() == 10
    with pytest.raises(UserError, match="upside_down"):
        view_change("upside_down", image, (200, 90))


# Streams


def stream(
    path: Path | str, batch_size: int = 8, config: PreprocessingConfig = GREY, **options: object
) -> StreamedImages:
    names = ("num_processes", "process_index", "on_skipped")
    place = {name: options.pop(name) for name in names if name in options}
    on_skipped = place.pop("on_skipped", lambda name, reason: None)
    data = DataConfig(path=str(path), streaming=True, **options)  # type: ignore[arg-type]
    source = open_source(data, config).train
    share = config.validation_fraction
    return StreamedImages(source, data, config, batch_size, share, on_skipped, **place)  # type: ignore[arg-type]


def numbered_tars(folder: Path, shards: int, rows: int, *, labelled: bool = True) -> Path:
    """Row i of shard s is a picture of one shade, with the class s * rows + i."""
    folder.mkdir()
    for s in range(shards):
        with tarfile.open(folder / f"{s:03d}.tar", "w") as archive:
            for i in range(rows):
                file = io.BytesIO()
                Image.new("L", (28, 28), (s * rows + i) % 256).save(file, "PNG")
                for suffix, content in (
                    (".png", file.getvalue()),
                    (".cls", str(s * rows + i).encode()),
                )[: 1 + labelled]:
                    member = tarfile.TarInfo(f"{i:04d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def shades(batches: Iterator[dict[str, torch.Tensor]], number: int) -> list[int]:
    """Which rows of `numbered_tars` these batches hold."""
    return [int(image[0, 0, 0]) for batch in islice(batches, number) for image in batch["images"]]


def test_a_stream_gives_every_row_once_an_epoch_and_starts_anywhere(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=4, rows=12)
    seen = shades(stream(tars, shuffle_buffer=12).start_at(0), 12)
    assert sorted(seen[:48]) == list(range(48)) == sorted(seen[48:])
    assert seen[:48] != sorted(seen[:48])
    assert seen[:48] != seen[48:]
    for index in (1, 3, 5, 7, 11):
        assert (
            shades(stream(tars, shuffle_buffer=12).start_at(index), 1)
            == seen[index * 8 : index * 8 + 8]
        )
    for processes in (2, 4, 8):
        parts = [
            shades(
                stream(tars, shuffle_buffer=12, num_processes=processes, process_index=r).start_at(
                    2
                ),
                1,
            )
            for r in range(processes)
        ]
        assert [label for part in parts for label in part] == seen[16:24]
    (tmp_path / "other").mkdir()
    for path in tars.iterdir():
        path.rename(tmp_path / "other" / path.name)  # moved shards keep their order
    assert shades(stream(tmp_path / "other", shuffle_buffer=12).start_at(0), 12) == seen


def test_parquet_and_urls_stream_too(sources: dict[str, Path]) -> None:
    import fsspec

    expected, _ = rows_of(load(sources["folder"]))
    system = fsspec.filesystem("memory")
    for part in range(3):
        table = pq.read_table(sources["tables"] / f"p{part}.parquet").drop(["label"])
        with system.open(f"/bucket/p{part}.parquet", "wb") as file:
            pq.write_table(table, file)
    for path in ("memory://bucket/p*.parquet", "memory://bucket/p{0..2}.parquet"):
        images = torch.cat([batch["images"] for batch in islice(stream(path, 6).start_at(0), 10)])
        assert {image.numpy().tobytes() for image in images} == {
            image.numpy().tobytes() for image in expected
        }
    with pytest.raises(UserError, match=r"add --data\.streaming"):
        load("memory://bucket/p0.parquet")
    with pytest.raises(UserError, match="cannot be opened"):
        next(stream("memory://bucket/none.tar").start_at(0))


def test_streams_hold_out_and_skip(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=40)
    config = replace(GREY, validation_fraction=0.2)
    data = DataConfig(path=str(tars), streaming=True)
    held_out = held_out_images(data, config)
    assert not len(held_out_images(data, replace(config, validation_fraction=0)))
    trained = set(shades(stream(tars, config=config).start_at(0), 60))
    kept = set(held_out.__getitems__(range(len(held_out)))["images"][:, 0, 0, 0].tolist())
    assert 10 < len(kept) < 40
    assert not trained & kept
    assert trained | kept == set(range(120))
    with tarfile.open(tars / "003.tar", "w") as archive:
        member = tarfile.TarInfo("bad.png")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(BadImage, match="003/bad"):
        shades(stream(tars).start_at(0), 20)
    told: list[str] = []
    batches = list(
        islice(
            stream(
                tars, on_error="skip", on_skipped=lambda name, reason: told.append(name)
            ).start_at(0),
            20,
        )
    )
    assert {len(batch["images"]) for batch in batches} == {8}  # as many on every process
    assert set(told) == {"003/bad"}
    (tars / "003.tar").write_bytes((tars / "002.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"003\.tar cannot be read as a tar shard"):
        shades(stream(tars, on_error="skip").start_at(0), 30)


def test_held_out_labels_of_a_stream_are_its_numbers(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    tars = numbered_tars(tmp_path / "x", shards=3, rows=4)
    paths = {
        "path": str(tars / "{000..001}.tar"),
        "validation_path": str(tars / "002.tar"),
        "streaming": True,
    }
    assert [item.label for item in items_of(ImagesConfig(**paths))] == list(range(12))
    unlabelled = numbered_tars(tmp_path / "y", shards=1, rows=2, labelled=False)
    with pytest.raises(UserError, match="y has no label, but the first has one"):
        find_parts(ImagesConfig(**{**paths, "validation_path": str(unlabelled)}), GREY, 10)
    with pytest.raises(UserError, match="number them alike"):
        find_parts(ImagesConfig(**{**paths, "validation_path": str(sources["folder"])}), GREY, 10)


def write_members(path: Path, names: list[str]) -> Path:
    buffer = io.BytesIO()
    Image.new("L", (28, 28), 100).save(buffer, "PNG")
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = b"3" if name.endswith(".cls") else buffer.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_no_member_of_a_tar_vanishes(tmp_path: Path) -> None:
    def read(*names: str, on_error: str = "stop") -> list[tuple[str, int | None]]:
        path = write_members(tmp_path / "x.tar", list(names))
        items = items_of(ImagesConfig(path=str(path)))
        rows = read_items(items, UNCHANGED, skip=on_error == "skip", num_threads=2)
        return [(row.item.id, row.item.label) for row in rows if not row.error]

    assert [name for name, _ in read("a.png", "a.cls", "d/b.png", "d/b.cls")] == ["x/a", "x/d/b"]
    assert [name for name, _ in read("a.image.png", "b.image.png")] == ["x/a", "x/b"]
    with pytest.raises(UserError, match=r"a\.cls comes apart from the row 'a'"):
        read("a.png", "b.png", "a.cls")
    for names, fault in {
        ("a.png", "b.svg"): "only b.svg",
        ("b.1.png", "b.2.png"): "2 pictures",
    }.items():
        with pytest.raises(BadImage, match=rf"x/b: .*{fault}"):
            read(*names)
    assert [
        name for name, _ in read("a.png", "a.cls", "b.svg", "c.png", "c.cls", on_error="skip")
    ] == ["x/a", "x/c"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_shard_that_is_cut_off_anywhere_is_refused(suffix: str, tmp_path: Path) -> None:
    content = (numbered_tars(tmp_path / "x", shards=1, rows=6) / "000.tar").read_bytes()
    content = content if suffix == ".tar" else gzip.compress(content)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content)
    for contents in (True, False):  # read whole, or from header to header
        path.write_bytes(content)
        assert len(list(shards_at(path).rows(0, contents=contents))) == 6
        end = len(content) if suffix == ".tar.gz" else len(content.rstrip(b"\0"))
        for size in [*range(700, end - 600, 512), *range(1000, end - 600, 777)]:
            path.write_bytes(content[:size])
            with pytest.raises(UserError, match="cannot be read as a tar shard"):
                list(shards_at(path).rows(0, contents=contents))


def test_images_of_a_range_are_kept_as_they_are() -> None:
    assert to_images(torch.tensor([0.25])).item() == 0.25
