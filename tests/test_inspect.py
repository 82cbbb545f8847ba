"""What `vqvae2 inspect` says is measured, and names what is wrong."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import PARQUET, vqvae2
from tests.test_data import GREY, load
from vqvae2 import VQVAE2, VQVAE2Config
from vqvae2.codebook_stats import carriers, perplexity, usage, verdict
from vqvae2.inspection import code_patches, inspect, ssim


def test_the_page_and_the_figures(run: Path, photos: Path, tmp_path: Path) -> None:
    said = vqvae2(
        "inspect", "--vqvae", run / "vqvae", "--data.path", photos, "--output-dir", tmp_path / "report"
    ).stdout
    found = {path.name for path in (tmp_path / "report").iterdir()}
    assert found == {
        "index.html",
        "levels.png",
        "codes_top.png",
        "codes_bottom.png",
        "figures.json",
        "inspect_config.yaml",
    }
    figures = json.loads((tmp_path / "report" / "figures.json").read_text())
    last = [
        json.loads(line)
        for line in (run / "vqvae" / "metrics.jsonl").read_text().splitlines()
        if "validation/mse" in line
    ]
    assert figures["Reconstruction"]["all levels"]["MSE"] == pytest.approx(
        min(line["validation/mse"] for line in last), rel=0.03
    )  # bf16 there
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    for sentence in figures["verdicts"]:
        assert sentence in said


def test_the_split_tells_a_level_that_carries_nothing() -> None:
    """A model whose decoder is deaf to the top: shuffling the top changes nothing, shuffling the bottom does."""
    torch.manual_seed(0)
    images = load(PARQUET, config=GREY).validation
    images.indices = images.indices[:40]
    small = {
        "code_dims": (8,),
        "codebook_sizes": (16,),
        "hidden_channels": 16,
        "residual_channels": 8,
        "num_residual_blocks": 1,
    }
    model = VQVAE2(VQVAE2Config(image=GREY, **small))
    model(torch.randn(16, 1, 32, 32))
    model.eval()
    with torch.no_grad():
        model.image_decoder[0].weight[:, :8] = 0
        model.image_decoder[0].weight *= 5
    found = inspect(model, images, torch.device("cpu"), show_progress=False)
    assert (
        found.split.shuffled[0]
        == found.split.neutral[0]
        == pytest.approx(found.split.kept, rel=1e-6)
    )
    assert found.split.shuffled[1] != pytest.approx(found.split.kept, rel=1e-4)
    assert found.split.alone[1] == pytest.approx(found.split.kept, rel=1e-6)
    assert [int(counts.sum()) for counts in found.counts] == [40 * 16, 40 * 64]


def test_ssim_and_psnr_against_closed_forms() -> None:
    torch.manual_seed(0)
    flat = torch.full((1, 1, 24, 24), 0.25)
    c1 = 0.02**2
    expected = (2 * 1.25 * 1.75 + c1) / (
        1.25**2 + 1.75**2 + c1
    )  # constant images differ in luminance alone
    assert ssim(flat, flat + 0.5).item() == pytest.approx(expected, rel=1e-4)
    noise = torch.randn(2, 3, 24, 24).clamp(-1, 1)
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert ssim(noise, -noise).max() < 0
    assert 10 * math.log10(4 / 0.25) == pytest.approx(
        12.04, abs=0.01
    )  # an offset of half the unit range


def test_patches_are_the_cells_of_the_code() -> None:
    images = load(PARQUET, config=GREY).validation
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
    healthy, said = verdict("top", torch.ones(64) * 1000)
    assert healthy
    assert "61 of 64" in said
    collapsed = torch.zeros(512)
    collapsed[:3] = 10_000
    healthy, said = verdict("bottom", collapsed)
    assert not healthy
    assert "bottom: 3 of 512 codes carry 95 %" in said
    assert "revival_threshold" in said
