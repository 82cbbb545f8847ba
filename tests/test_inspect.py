"""What `vqvae2 inspect` reports is measured, and names what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import PARQUET, command, vqvae2
from tests.test_data import GREY, load
from tests.test_model import small_model
from vqvae2.codebook_stats import carriers, perplexity, usage, verdict
from vqvae2.data import ImageDataset, to_images
from vqvae2.inspection import code_patches, inspect, ssim


@pytest.fixture
def images() -> ImageDataset:
    return load(PARQUET, config=GREY).validation


def test_the_page_and_the_figures(run: Path, photos: Path, tmp_path: Path) -> None:
    report, model = tmp_path / "report", run / "vqvae"
    flags = ("--vqvae", model, "--data.path", photos, "--output-dir", report)
    printed = vqvae2("inspect", *flags).stdout
    assert {path.name for path in report.iterdir()} == {
        "index.html",
        "levels.png",
        "codes_top.png",
        "codes_bottom.png",
        "figures.json",
        "inspect_config.yaml",
    }
    figures = json.loads((report / "figures.json").read_text())
    page = (report / "index.html").read_text()

    assert figures["split"] == "held-out"

    # The error is that of the training's own validation, which may have been in bf16.
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    best = min(line["validation/mse"] for line in lines if "validation/mse" in line)
    assert figures["Reconstruction"]["all levels"]["MSE"] == pytest.approx(best, rel=0.03)

    # The page stands alone, and the terminal shows the same.
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    for sentence in figures["verdicts"]:
        assert sentence in printed


def test_the_split_finds_a_level_that_carries_nothing(images: ImageDataset) -> None:
    """A decoder that ignores the top: other top codes change nothing, other bottom codes do."""
    images.indices = images.indices[:40]
    model = small_model(image=GREY)
    model(torch.randn(16, 1, 32, 32))
    model.eval()
    with torch.no_grad():
        model.image_decoder[0].weight[:, :8] = 0
        model.image_decoder[0].weight *= 5
    found = inspect(model, images, torch.device("cpu"))
    split = found.split
    assert split.shuffled[0] == split.neutral[0] == pytest.approx(split.kept, rel=1e-6)
    assert split.shuffled[1] != pytest.approx(split.kept, rel=1e-5)
    assert split.alone[1] == pytest.approx(split.kept, rel=1e-6)
    assert [int(counts.sum()) for counts in found.counts] == [40 * 16, 40 * 64]

    # The quality, by hand.
    originals = to_images(images.__getitems__(range(40))["images"])
    with torch.no_grad():
        errors = (model(originals).reconstruction.clamp(-1, 1) - originals).square()
    per_image = errors.mean(dim=(1, 2, 3))
    assert split.kept == pytest.approx(per_image.mean().item(), rel=1e-5)
    assert found.psnr == pytest.approx((10 * torch.log10(4 / per_image)).mean().item(), rel=1e-5)


def test_codes_are_swapped_between_classes_though_images_come_class_by_class(
    images: ImageDataset,
) -> None:
    """Twenty of one image, then twenty of another: each is decoded with the other one's codes."""
    chosen = [images.indices[0]] * 20 + [images.indices[-1]] * 20
    images = ImageDataset(images.source, chosen, GREY)
    model = small_model(image=GREY)
    model(torch.randn(16, 1, 32, 32))
    model.eval()
    with torch.no_grad():
        model.image_decoder[0].weight *= 5
    both = to_images(images.__getitems__([0, 20])["images"])
    top, bottom = model.encode_images(both)
    with torch.no_grad():
        swapped = model.decode_codes([top, bottom.flip(0)]).clamp(-1, 1)
    expected = (swapped - both).square().mean().item()
    split = inspect(model, images, torch.device("cpu")).split
    assert split.shuffled[1] == pytest.approx(expected, rel=1e-5)
    assert split.shuffled[1] != pytest.approx(split.kept, rel=1e-5)


def test_ssim_is_its_closed_form() -> None:
    torch.manual_seed(0)
    flat, c1 = torch.full((1, 1, 24, 24), 0.25), 0.02**2
    # Constant images differ in luminance alone.
    expected = (2 * 1.25 * 1.75 + c1) / (1.25**2 + 1.75**2 + c1)
    assert ssim(flat, flat + 0.5).item() == pytest.approx(expected, rel=1e-4)
    noise = torch.randn(2, 3, 24, 24).clamp(-1, 1)
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert ssim(noise, -noise).max() < 0


def test_patches_are_the_cells_of_the_code(images: ImageDataset) -> None:
    codes = torch.zeros(len(images), 8, 8, dtype=torch.int64)
    codes[3, 2, 5] = 7
    patch = code_patches(images, codes, 7, number=4)
    assert patch.shape == (1, 1, 8, 8)
    pixels = images.pixels(3).float() / 127.5 - 1
    assert torch.equal(patch[0, 0, 2:6, 2:6], pixels[0, 8:12, 20:24])


def test_usage_in_numbers_and_words() -> None:
    counts = torch.tensor([950, 30, 20, 0])
    assert usage(counts) == 0.75
    assert carriers(counts) == 1
    assert carriers(torch.ones(100)) == 95
    assert perplexity(torch.ones(7)) == pytest.approx(7)
    assert perplexity(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    healthy, sentence = verdict("top", torch.ones(64) * 1000)
    assert healthy
    assert "61 of 64" in sentence
    collapsed = torch.zeros(512)
    collapsed[:3] = 10_000
    healthy, sentence = verdict("bottom", collapsed)
    assert not healthy
    assert "bottom: 3 of 512 codes carry 95 %" in sentence
    assert "revival_threshold" in sentence
    _, sentence = verdict("bottom", collapsed, 16)
    assert "only 16 features, too few images to fill it: use more images" in sentence


def test_other_images_are_not_called_held_out(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of the images, or they under other names: it may have seen what is held out here."""
    flags = ("--vqvae", run / "vqvae", "--data.path", photos / "bag", "--output-dir")
    command("inspect", *flags, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "figures.json").read_text())["split"] == "other"
    command("reconstruct", *flags, tmp_path / "out", "--held-out")
    assert capsys.readouterr().err.count("these are not the images that") == 2

    # So it is where nothing is known of the training, as of weights from elsewhere.
    shutil.copytree(run / "vqvae", tmp_path / "imported")
    (tmp_path / "imported" / "train_config.yaml").unlink()
    flags = ("--vqvae", tmp_path / "imported", "--data.path", photos, "--output-dir")
    command("inspect", *flags, tmp_path / "unknown")
    assert json.loads((tmp_path / "unknown" / "figures.json").read_text())["split"] == "other"
    assert "imported has no record of its training" in capsys.readouterr().err

    # Of held-out images, those that cannot be read are named.
    broken = shutil.copytree(photos / "bag", tmp_path / "broken")
    (broken / "0.png").write_text("no image")
    held_out = ("--data.validation-path", broken, "--data.on-error", "skip")
    command("inspect", *flags, tmp_path / "skipped", *held_out)
    assert (
        "left out of the held-out images, as they cannot be read: 0.png" in capsys.readouterr().err
    )
    one = ("--vqvae", run / "vqvae", "--data.path", next((photos / "bag").iterdir()))
    command("inspect", *one, "--output-dir", tmp_path / "one", code=2)
    assert "has 1 images to look at" in capsys.readouterr().err
