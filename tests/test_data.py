"""Images from the sources that users have, prepared as configured, split so that nothing leaks."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.conftest import PARQUET, write_images
from vqvae2.common.errors import UserError
from vqvae2.config import DataConfig, PreprocessingConfig
from vqvae2.data import ImageSplits, is_held_out, load_images, prepare, to_images

GREY = PreprocessingConfig(size=(32,), channels=1, fit="pad", background="black")


def load(
    path: Path, validation_path: Path | None = None, config: PreprocessingConfig = GREY
) -> ImageSplits:
    return load_images(
        DataConfig(
            path=str(path), validation_path=str(validation_path) if validation_path else None
        ),
        config,
        show_progress=False,
    )


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half dark, right half light."""
    image = Image.new("L", size, 50)
    image.paste(200, (size[0] // 2, 0, *size))
    return image.convert(mode)


def test_class_folders(photos: Path) -> None:
    splits = load(photos)
    assert splits.class_names == ("bag", "coat", "dress")
    assert len(splits.train) + len(splits.validation) == 150
    assert not set(splits.train.ids) & set(splits.validation.ids)
    for dataset in (splits.train, splits.validation):
        labels = dataset.__getitems__(range(len(dataset)))["labels"].tolist()
        assert [splits.class_names[label] for label in labels] == [
            name.split("/")[0] for name in dataset.ids
        ]


def test_flat_folder_one_class_and_own_split(tmp_path: Path, photos: Path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:30]):
        for target in (
            f"flat/{i}.png",
            f"one/thing/{i}.png",
            f"own/{'train' if i < 20 else 'test'}/{'ab'[i % 2]}/{i}.png",
        ):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / target).write_bytes(path.read_bytes())
    assert load(tmp_path / "flat").class_names == ()
    assert "labels" not in load(tmp_path / "flat").train.__getitems__([0])
    assert load(tmp_path / "one").class_names == ("thing",)
    own = load(tmp_path / "own")
    assert (len(own.train), len(own.validation), own.class_names) == (20, 10, ("a", "b"))


def test_the_split_does_not_move_when_images_are_added(tmp_path: Path) -> None:
    few, more = load(write_images(tmp_path / "few", 60)), load(write_images(tmp_path / "more", 120))
    assert set(few.validation.ids) <= set(more.validation.ids)
    assert set(few.train.ids) <= set(more.train.ids)
    share = sum(is_held_out(str(i), 0.1) for i in range(10_000)) / 10_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_explicit_held_out_set_wins_and_labels_agree_by_name(tmp_path: Path, photos: Path) -> None:
    held_out = write_images(tmp_path / "held", 20)
    (held_out / "bag").rename(
        tmp_path / "bag"
    )  # the held-out set lacks a class, so its own numbers would be others
    splits = load(photos, held_out)
    assert len(splits.train) == 150
    labels = splits.validation.__getitems__(range(len(splits.validation)))["labels"].tolist()
    assert [splits.class_names[label] for label in labels] == [
        name.split("/")[0] for name in splits.validation.ids
    ]
    (held_out / "coat").rename(held_out / "hat")
    with pytest.raises(UserError, match="hat"):
        load(photos, held_out)


def test_the_embedded_images() -> None:
    splits = load(PARQUET)
    assert (len(splits.train), len(splits.validation), len(splits.class_names)) == (
        10_000,
        2_000,
        10,
    )
    for dataset in (splits.train, splits.validation):
        counts = torch.bincount(torch.tensor(dataset.source.labels))
        assert (counts == len(dataset) // 10).all()
    assert PARQUET.stat().st_size < 6_000_000
    assert "MIT" in PARQUET.with_name("NOTICE").read_text()


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    cells = []
    for _ in range(4):
        file = io.BytesIO()
        picture().save(file, "PNG")
        cells.append(file.getvalue())
    pq.write_table(
        pa.table({"image": cells, "label": ["b", "a", "b", "a"]}), tmp_path / "x.parquet"
    )
    splits = load(tmp_path / "x.parquet")
    assert splits.class_names == ("a", "b")
    assert splits.train.__getitems__([0, 1])["labels"].tolist() == [1, 0]


def test_the_hub_is_asked_for_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real = datasets.load_dataset

    def fake(name: str, **options):  # type: ignore[no-untyped-def]
        assert name in ("someone/images", "parquet")
        return (
            real("parquet", data_files={"train": str(PARQUET)})
            if name == "someone/images"
            else real(name, **options)
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(load(Path("someone/images")).train) == 10_000


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (2, "LA")])
@pytest.mark.parametrize("source", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_modes_become_the_configured_channels(channels: int, mode: str, source: str) -> None:
    pixels = prepare(picture(source), PreprocessingConfig(size=(20, 40), channels=channels))
    assert pixels.shape == (channels, 20, 40)
    assert pixels[0, 10, 5] < pixels[0, 10, 35]


def test_fit() -> None:
    for fit, expected in {"crop": (50, 200), "stretch": (50, 200), "pad": (255, 255)}.items():
        pixels = prepare(picture("RGB"), PreprocessingConfig(size=(16,), fit=fit))
        assert pixels.shape == (3, 16, 16)
        assert (
            abs(int(pixels[0, 1, 1]) - expected[0]),
            abs(int(pixels[0, 1, 14]) - expected[1]),
        ) <= (3, 3)
    small = prepare(picture("L", (8, 8)), GREY)
    assert np.array_equal(
        small[0, 12:20, 12:20], np.array(picture("L", (8, 8)))
    )  # padding changes no pixel
    assert small.sum() == small[0, 12:20, 12:20].sum()


def test_transparency_lands_on_the_background_and_exif_is_honoured() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert prepare(clear, PreprocessingConfig(size=(4,), background="#0000ff"))[
        :, 0, 0
    ].tolist() == [0, 0, 255]
    image, exif = picture("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    upright = prepare(Image.open(file), PreprocessingConfig(size=(40, 20), fit="stretch"))
    assert upright[0, 5, 10] < upright[0, 35, 10]


def test_pixels_are_cached_and_come_back_the_same(photos: Path) -> None:
    dataset = load(photos).train
    assert dataset.cached.all()
    cached = dataset.pixels(3).clone()
    dataset.cached.zero_()
    assert torch.equal(dataset.pixels(3), cached)
    images = to_images(cached)
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(((images + 1) * 127.5).round().byte(), cached)


def test_bad_sources_are_named(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.xyz").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "none.parquet")
    for name, message in {
        "empty": "holds no image",
        "file.xyz": "unknown kind",
        "no/where/at/all": "does not exist",
        "broken.parquet": "cannot be read as a dataset",
        "none.parquet": "none of images",
    }.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)
    broken = write_images(tmp_path / "broken", 10)
    (broken / "bag" / "bad.png").write_bytes(
        (broken / "bag").glob("*.png").__next__().read_bytes()[:100]
    )
    with pytest.raises(UserError, match=r"bag/bad.png: it cannot be read as an image"):
        load(broken)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(broken / "bag" / "bad.png")
    with pytest.raises(UserError, match=r"bag/bad.png.*not 8-bit pixels"):
        load(broken)
    with pytest.raises(UserError, match="background"):
        load(photos, config=PreprocessingConfig(background="blurple"))


def test_held_out_folders_are_never_trained_on(tmp_path: Path, photos: Path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:30]):
        for target in (
            f"three/{('train', 'val', 'test')[i % 3]}/{i}.png",
            f"odd/{('train', 'other')[i % 2]}/{i}.png",
            f"nested/{'val/' * (i % 2)}{i}.png",
        ):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / target).write_bytes(path.read_bytes())
    three = load(tmp_path / "three")
    assert (len(three.train), len(three.validation)) == (10, 10)
    assert three.validation.source.name.endswith("val")
    with pytest.raises(UserError, match="'train' is no class"):
        load(tmp_path / "odd")
    with pytest.raises(UserError, match="would be trained on"):
        load(tmp_path / "nested", tmp_path / "nested" / "val")


@pytest.mark.parametrize("labels", [[0, 1, None, 1], [0, 1, -1, 1]])
def test_rows_without_a_class_are_refused(labels: list, tmp_path: Path) -> None:
    import datasets

    file = io.BytesIO()
    picture().save(file, "PNG")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.getvalue(), "path": None}] * 4, "label": labels},
        features=features,
    )
    table.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="does not give every row a class"):
        load(tmp_path / "x.parquet")


def test_datasets_can_be_sent_to_spawned_processes(photos: Path) -> None:
    for splits in (load(photos), load(PARQUET)):
        again = pickle.loads(pickle.dumps(splits.train))
        again.cached.zero_()
        assert torch.equal(again.pixels(5), splits.train.pixels(5))


def test_names_hash_tells_other_images_apart(tmp_path: Path, photos: Path) -> None:
    few, same, more = (
        write_images(tmp_path / "few", 60),
        write_images(tmp_path / "same", 60),
        write_images(tmp_path / "more", 61),
    )
    hashes = [load(folder).facts()["image_names_hash"] for folder in (few, same, more)]
    assert hashes[0] == hashes[1] != hashes[2]
