"""Sampling as a whole: an image is a function of (seed, index, label), a set can be continued, and what is known is kept."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import VQVAE2Pipeline
from pipelines.editing import keep_levels, known_outside, repeat_known
from prior import (
    Known,
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    PriorConfig,
    load_prior,
    make_prior,
)
from tests.conftest import command as run_here
from tests.conftest import kill_when, vqvae2
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import to_pil
from vqvae2.data import load_picture, to_images


def test_an_image_is_a_function_of_seed_index_and_label(run: Path) -> None:
    """The same bits whatever is asked for with it: alone, in threes, in eights, from the middle of a chunk, across chunks."""
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    options = {
        "seed": 3,
        "guidance_scale": [1.0, 2.0],
        "min_p": 0.01,
        "lanes": 4,
        "output_type": "pt",
    }
    whole = pipeline(11, **options)
    for first, number in ((0, 1), (5, 1), (0, 3), (2, 3), (3, 8), (10, 1)):
        part = pipeline(number, first_index=first, **options)
        assert torch.equal(part.images, whole.images[first : first + number])
        assert all(
            torch.equal(a, b[first : first + number])
            for a, b in zip(part.codes, whole.codes, strict=True)
        )
    same_label = pipeline(11, labels=[0, 1, 2], **options)
    other_label = pipeline(11, labels=[0, 2, 1], **options)
    assert torch.equal(whole.images, same_label.images)
    assert torch.equal(whole.images[::3], other_label.images[::3])  # their own labels are the same
    assert not torch.equal(whole.images, other_label.images)


def test_a_set_of_samples_is_continued_and_extended(run: Path, tmp_path: Path) -> None:
    command = ("sample", "--pipeline", run / "pipeline", "--lanes", 4, "--output-dir")
    run_here(*command, tmp_path / "whole", "--num-images", 30, "--npz")
    kill_when(
        (tmp_path / "parts" / "000005.png").exists, *command, tmp_path / "parts", "--num-images", 18
    )
    run_here(*command, tmp_path / "parts", "--num-images", 30, "--npz")
    names = [f"{i:06d}.png" for i in range(30)]
    assert all(
        (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
        for name in names
    )
    with np.load(tmp_path / "parts" / "samples.npz") as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((30, 16, 16, 1), np.uint8)
        assert arrays["arr_1"].tolist() == [0, 1, 2] * 10
        assert np.array_equal(
            arrays["arr_0"][7, ..., 0], np.asarray(Image.open(tmp_path / "whole" / names[7]))
        )


def test_editing_keeps_what_is_known(run: Path, photos: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    picture = sorted(photos.rglob("*.png"))[0]
    images = to_images(load_picture(str(picture), pipeline.vqvae.config.image)).repeat(3, 1, 1, 1)
    codes = [level.codes for level in pipeline.vqvae.encode(images)]

    variations = pipeline(3, known=keep_levels(pipeline.vqvae, images, 1), labels="none")
    assert torch.equal(variations.codes[0], codes[0])
    assert not torch.equal(variations.codes[1], codes[1])

    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, :5, :3] = True  # touches cells (0..1, 0) of the 4 x 4 grid, and (0, 0) of the 2 x 2
    repainted = pipeline(
        3, known=known_outside(pipeline.vqvae, images, mask), labels="none", first_index=1
    )
    for level, cells in ((0, [(0, 0)]), (1, [(0, 0), (1, 0)])):
        drawn = torch.ones_like(codes[level], dtype=torch.bool)
        for row, column in cells:
            drawn[:, row, column] = False
        assert torch.equal(repainted.codes[level][drawn], codes[level][drawn])
    assert not torch.equal(repainted.codes[1], codes[1])

    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    edit = ("sample", "--pipeline", run / "pipeline", "--init-image", picture, "--num-images", 2)
    run_here(
        *edit, "--mask", tmp_path / "black.png", "--output-dir", tmp_path / "same"
    )  # nothing to repaint: the reconstruction
    (expected,) = to_pil(pipeline.vqvae(images[:1]).reconstruction)
    assert Image.open(tmp_path / "same" / "000001.png").tobytes() == expected.tobytes()
    run_here(*edit, "--output-dir", tmp_path / "varied")
    refused = vqvae2(
        *edit, "--mask", tmp_path / "none.png", "--output-dir", tmp_path / "x", check=False
    )
    assert (
        refused.returncode,
        "none.png cannot be read" in refused.stderr,
        (tmp_path / "x").exists(),
    ) == (2, True, False)


def test_another_model_does_not_continue_a_set(copy_of_run: Path, tmp_path: Path) -> None:
    """The same encoder, another prior: its images do not belong into the same folder."""
    command = (
        "sample",
        "--pipeline",
        copy_of_run / "pipeline",
        "--output-dir",
        tmp_path / "out",
        "--num-images",
    )
    run_here(*command, 4)
    prior = load_prior(copy_of_run / "pipeline" / "prior_1")
    torch.nn.init.normal_(prior.head.bias)
    prior.save_pretrained(copy_of_run / "pipeline" / "prior_1")
    refused = vqvae2(*command, 8, check=False)
    assert (refused.returncode, "prior_1_hash" in refused.stderr) == (2, True)


def test_known_codes_that_do_not_fit_are_refused(run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    known = keep_levels(pipeline.vqvae, torch.zeros(1, 1, 16, 16), 1)
    assert torch.equal(
        pipeline(3, known=repeat_known(known, 3)).codes[0], known[0].codes.repeat(3, 1, 1)
    )
    with pytest.raises(UserError, match="one grid per image"):
        pipeline(3, known=known)
    with pytest.raises(UserError, match="give one per level"):
        pipeline(1, known=known[:1])
    with pytest.raises(UserError, match="from 0 to 15"):
        pipeline(1, known=[Known(known[0].codes + 16, known[0].mask), None])


def test_weights_that_are_no_numbers_are_a_sentence(run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    top = pipeline.priors[0].config
    facts = {field.name: getattr(top, field.name) for field in dataclasses.fields(PriorConfig)}
    snail = make_prior(
        PixelSNAILPriorConfig(
            **facts, network=PixelSNAILConfig(width=16, residual_channels=8, num_heads=2)
        )
    )
    for broken in (pipeline.priors[0], snail):
        torch.nn.init.constant_(list(broken.parameters())[-1], torch.nan)
        with pytest.raises(UserError, match="not finite"):
            VQVAE2Pipeline(pipeline.vqvae, [broken, pipeline.priors[1]])(1)
