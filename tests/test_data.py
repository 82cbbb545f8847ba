"""Images from the sources that users have, prepared as configured, split so that nothing leaks."""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.conftest import PARQUET, write_images
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_text
from vqvae2.config import DataConfig, PreprocessingConfig
from vqvae2.data import (
    ImageDataset,
    ImageSplits,
    as_images,
    is_held_out,
    load_images,
    prepare,
    to_images,
)
from vqvae2.data.survey import Survey

GREY = PreprocessingConfig(size=(32,), channels=1, fit="pad", background="black")


def load(
    path: Path, validation_path: Path | None = None, config: PreprocessingConfig = GREY
) -> ImageSplits:
    held_out = str(validation_path) if validation_path else None
    data = DataConfig(path=str(path), validation_path=held_out)
    return load_images(data, config)


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half dark, right half light."""
    image = Image.new("L", size, 50)
    image.paste(200, (size[0] // 2, 0, *size))
    return image.convert(mode)


def assert_labelled_by_folder(splits: ImageSplits, dataset: ImageDataset) -> None:
    labels = dataset.__getitems__(range(len(dataset)))["labels"].tolist()
    folders = [name.split("/")[0] for name in dataset.ids]
    assert [splits.class_names[label] for label in labels] == folders


def encoded() -> bytes:
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


def copy_to(folder: Path, photos: Path, *targets: Callable[[int], str]) -> None:
    """Copies of 30 pictures, each at every target."""
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:30]):
        for target in targets:
            copy = folder / target(i)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_pictures_from_python_are_prepared_as_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Paths, PIL images and arrays, one or several; prepared images pass."""
    path = tmp_path / "a.png"
    picture("RGBA").save(path)
    expected = to_images(torch.from_numpy(prepare(picture(), GREY)))[None]
    grey = np.asarray(picture("L"))
    for given in (path, str(path), picture("RGB"), Image.open(path), [path], grey, grey[..., None]):
        assert torch.equal(as_images(given, GREY), expected)
    for given in ([path, picture("L")], expected.repeat(2, 1, 1, 1), [expected[0], expected]):
        assert torch.equal(as_images(given, GREY), expected.repeat(2, 1, 1, 1))
    assert torch.equal(as_images(expected.double().numpy(), GREY), expected)
    assert torch.equal(as_images(torch.from_numpy(prepare(picture(), GREY)), GREY), expected)
    assert not caplog.text
    as_images((expected + 1) / 2, GREY)  # as other libraries have them
    assert "no value of these images is below 0" in caplog.text


def test_what_is_no_image_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded()[:60])
    ones = torch.ones(2, 1, 32, 32)
    for given, sentence in (
        (tmp_path / "none.png", "none.png cannot be read"),
        ([picture(), tmp_path], "image 1: .*: it is a folder"),
        ([picture(), Image.open(tmp_path / "cut.png")], "image 1: .*truncated"),
        ([], "there is no image"),
        ({"a": 1}, "of type dict, but must be a PIL image, a path, an array or a tensor"),
        (np.ones((4, 4, 2), np.uint8), r"shape \(4, 4, 2\), but expected \(H, W, 1\)"),
        (ones[..., :31], r"must be \(B, 1, 32, 32\)"),
        (ones[:0], "shape is"),
        (ones * 255, "largest value is 255.0, but must be at most 1"),
        (ones * torch.nan, "largest value is nan"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            as_images(given, GREY)
        assert "\n" not in str(error.value)


def test_class_folders(photos: Path) -> None:
    splits = load(photos)
    assert splits.class_names == ("bag", "coat", "dress")
    assert len(splits.train) + len(splits.validation) == 150
    assert not set(splits.train.ids) & set(splits.validation.ids)
    assert_labelled_by_folder(splits, splits.train)
    assert_labelled_by_folder(splits, splits.validation)


def test_flat_folder_one_class_and_own_split(tmp_path: Path, photos: Path) -> None:
    copy_to(
        tmp_path,
        photos,
        lambda i: f"flat/{i}.png",
        lambda i: f"one/thing/{i}.png",
        lambda i: f"own/{'train' if i < 20 else 'test'}/{'ab'[i % 2]}/{i}.png",
    )
    assert load(tmp_path / "flat").class_names == ()
    assert "labels" not in load(tmp_path / "flat").train.__getitems__([0])
    assert load(tmp_path / "one").class_names == ("thing",)
    own = load(tmp_path / "own")
    assert (len(own.train), len(own.validation), own.class_names) == (20, 10, ("a", "b"))


def test_the_split_does_not_move_when_images_are_added(tmp_path: Path) -> None:
    few, more = load(write_images(tmp_path / "few", 60)), load(write_images(tmp_path / "more", 120))
    assert set(few.validation.ids) <= set(more.validation.ids)
    assert set(few.train.ids) <= set(more.train.ids)
    assert [i for i in range(100) if is_held_out(f"{i}.png", 0.05)] == [
        6,
        33,
        40,
        68,
    ]  # in all versions
    share = sum(is_held_out(str(i), 0.1) for i in range(10_000)) / 10_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_explicit_held_out_set_wins_and_labels_agree_by_name(tmp_path: Path, photos: Path) -> None:
    held_out = write_images(tmp_path / "held", 20)
    (held_out / "bag").rename(tmp_path / "bag")  # so its own numbers would be others
    splits = load(photos, held_out)
    assert len(splits.train) == 150
    assert_labelled_by_folder(splits, splits.validation)
    (held_out / "coat").rename(held_out / "hat")
    validation = load(photos, held_out).validation  # its classes are others: held out all the same
    assert validation.source.labels is None
    assert len(validation) == 13


def test_the_embedded_images() -> None:
    splits = load(PARQUET)
    assert (len(splits.train), len(splits.validation)) == (10_000, 2_000)
    assert len(splits.class_names) == 10
    for dataset in (splits.train, splits.validation):
        counts = torch.bincount(torch.tensor(dataset.source.labels))
        assert (counts == len(dataset) // 10).all()
    assert PARQUET.stat().st_size < 6_000_000
    assert "MIT" in PARQUET.with_name("NOTICE").read_text()


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded()] * 4, "label": ["b", "a", "b", "a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    splits = load(tmp_path / "x.parquet")
    assert splits.class_names == ("a", "b")
    assert splits.train.__getitems__([0, 1])["labels"].tolist() == [1, 0]


def test_the_hub_is_asked_for_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    real = datasets.load_dataset

    def fake(name: str, **options):  # type: ignore[no-untyped-def]
        assert name in ("someone/images", "parquet")
        if name == "someone/images":
            return real("parquet", data_files={"train": str(PARQUET)})
        return real(name, **options)

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
        assert pixels[0, 1, [1, 14]].tolist() == pytest.approx(expected, abs=3)
    small = prepare(picture("L", (8, 8)), GREY)  # padding changes no pixel
    assert np.array_equal(small[0, 12:20, 12:20], np.array(picture("L", (8, 8))))
    assert small.sum() == small[0, 12:20, 12:20].sum()


def test_transparency_lands_on_the_background_and_exif_is_honoured() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    blue = PreprocessingConfig(size=(4,), background="#0000ff")
    assert prepare(clear, blue)[:, 0, 0].tolist() == [0, 0, 255]
    image, exif = picture("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    upright = prepare(Image.open(file), PreprocessingConfig(size=(40, 20), fit="stretch"))
    assert upright[0, 5, 10] < upright[0, 35, 10]


def drawing(number: int) -> Image.Image:
    """White on nothing."""
    image = Image.new("RGBA", (64, 64))
    image.paste("white", (10, 10 + number, 40, 40))
    return image


def photo(number: int, *size: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise)


PHOTOS = [photo(i, 64, 64) for i in range(16)]


@pytest.mark.parametrize(
    ("pictures", "change", "said"),
    [
        (PHOTOS, {}, None),
        ([photo(16, 80, 64), *PHOTOS], {"background": "black", "channels": 1}, None),
        ([photo(i, 90, 64) for i in range(2)] + PHOTOS, {}, "2 of 18 .* cropping: --image.fit pad"),
        ([photo(i, 90, 64) for i in range(2)] + PHOTOS, {"fit": "pad"}, None),
        ([drawing(0), *PHOTOS], {}, "1 of 17 .* on white: set --image.background black, or --ima"),
        ([drawing(0), *PHOTOS], {"background": "black"}, None),
        ([drawing(0), *PHOTOS], {"channels": 4}, None),
        ([Image.new("RGB", (64, 64), "navy")] * 2 + PHOTOS, {}, "2 of 18 .* of one colour"),
        ([Image.new("RGBA", (64, 64))] * 2 + PHOTOS, {}, "2 of 18 .* of one colour"),
        ([photo(0, 16, 16)] * 2 + PHOTOS[2:], {}, "2 of 16 .* enlarged .* to 64 x 64 pixels"),
        (PHOTOS[:1] * 3 + PHOTOS[1:], {}, "2 of 18 pictures are copies of others"),
        ([image.convert("L") for image in PHOTOS], {}, "16 of 16 .* grey: --image.channels 1"),
    ],
)
def test_what_is_lost_in_pictures_is_said_with_the_flag_that_helps(
    pictures: list, change: dict, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = PreprocessingConfig(size=(64,), **change)
    survey = Survey(config)
    for image in pictures:
        pixels = survey.choose(image.size).apply(image, config)
        assert np.array_equal(pixels, prepare(image, config))
    survey.report("photos")
    if said is None:
        assert not caplog.messages
    else:
        (line,) = caplog.messages
        assert re.search(f"^photos: {said}", line)


def test_pixels_are_cached_and_come_back_the_same(photos: Path) -> None:
    dataset = load(photos).train
    cached = dataset.pixels(3)
    assert dataset.cache is not None
    dataset.cache = None
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
    whole = next((broken / "bag").glob("*.png")).read_bytes()
    (broken / "bag" / "bad.png").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"bag/bad.png: it cannot be read as an image"):
        load(broken)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(broken / "bag" / "bad.png")
    with pytest.raises(UserError, match=r"bag/bad.png.*not 8-bit pixels"):
        load(broken)
    with pytest.raises(UserError, match="background"):
        load(photos, config=PreprocessingConfig(background="blurple"))


def test_held_out_folders_are_never_trained_on(tmp_path: Path, photos: Path) -> None:
    copy_to(
        tmp_path,
        photos,
        lambda i: f"three/{('train', 'val', 'test')[i % 3]}/{i}.png",
        lambda i: f"odd/{('train', 'other')[i % 2]}/{i}.png",
        lambda i: f"nested/{'val/' * (i % 2)}{i}.png",
    )
    three = load(tmp_path / "three")
    assert (len(three.train), len(three.validation)) == (10, 10)
    assert three.validation.source.name.endswith("val")
    with pytest.raises(UserError, match="'train' is no class"):
        load(tmp_path / "odd")
    nested = load(tmp_path / "nested", tmp_path / "nested" / "val")
    assert (len(nested.train), len(nested.validation)) == (15, 15)


@pytest.mark.parametrize("labels", [[0, 1, None, 1], [0, 1, -1, 1]])
def test_rows_without_a_class_are_refused(labels: list, tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features(image=datasets.Image(), label=classes)
    rows = {"image": [{"bytes": encoded(), "path": None}] * 4, "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="does not give every row a class"):
        load(tmp_path / "x.parquet")


def test_datasets_can_be_sent_to_spawned_processes(photos: Path) -> None:
    for splits in (load(photos), load(PARQUET)):
        again = pickle.loads(pickle.dumps(splits.train))
        again.cache = None
        assert torch.equal(again.pixels(5), splits.train.pixels(5))


def test_a_small_dev_shm_costs_time_and_no_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    splits = load_images(DataConfig(path=str(photos)), GREY, check=False)
    splits.train.check(shared=True)
    assert splits.train.cache is None
    assert "pixels are decoded anew in every epoch: unable to allocate" in caplog.text
    assert torch.equal(splits.train.pixels(5), load(photos).train.pixels(5))


def test_names_hash_tells_other_images_apart(tmp_path: Path, photos: Path) -> None:
    numbers = {"few": 60, "same": 60, "more": 61}
    folders = [write_images(tmp_path / name, number) for name, number in numbers.items()]
    few, same, more = (load(folder).facts()["image_names_hash"] for folder in folders)
    assert few == same != more


def test_several_broken_pictures_are_named_at_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 30)
    broken = sorted(folder.rglob("*.png"))[3:6]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError) as refused:
        load_images(DataConfig(path=str(folder)), GREY)
    first, *others = [file.relative_to(folder).as_posix() for file in broken]
    assert f"{first}: it cannot be read" in str(refused.value)
    assert str(refused.value).endswith(f"; besides, {', '.join(others)} cannot be used")


def test_columns_that_nothing_could_be_read_from_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", 6)
    images, labels = np.zeros((40, 16, 16), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", frames=images, y=labels)
    pattern = f"{next(folder.rglob('*.png')).parent}/*.png"
    wrong = {"label_column": "lable", "image_column": "imgs"}
    for path in (folder, tmp_path / "a.npz", pattern):
        for name, column in wrong.items():
            with pytest.raises(UserError, match=f"no {name[:5]} column '{column}'"):
                load_images(DataConfig(path=str(path), **{name: column}), GREY)  # type: ignore[arg-type]
    data = DataConfig(path=str(tmp_path / "a.npz"), image_column="frames", label_column="y")
    assert load_images(data, GREY).class_names == ("0", "1")


def test_one_picture_is_not_taken_for_a_stack_of_narrow_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((40, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"that is one image; give \(1, 40, 48, 3\)"):
        load_images(DataConfig(path=str(tmp_path / "one.npy")), GREY)


def test_a_mistyped_file_is_not_looked_for_on_the_hub() -> None:
    for name in ("there/none.npz", "there/none.png", "there/none.csv"):
        with pytest.raises(UserError, match="does not exist"):
            load_images(DataConfig(path=name), GREY)


def test_files_of_the_longest_names_are_written(tmp_path: Path) -> None:
    name = "é" * 125 + ".png"
    write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
