"""Random changes are a function of seed, epoch and image; views are windows of the picture."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.images import GREY, load
from vqvae2.common.errors import UserError
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import AugmentationConfig, PreprocessingConfig
from vqvae2.data import AugmentedImages
from vqvae2.data.augmentation import known_views, random_change, view_change


@pytest.mark.parametrize("crop", ["off", "random", "random_resized"])
def test_changes_are_a_function_of_seed_epoch_and_image(crop: str, photos: Path) -> None:
    images = load(photos, replace(GREY, size=(16, 24))).train
    config = AugmentationConfig(horizontal_flip=True, crop=crop)  # type: ignore[arg-type]
    augmented, number = AugmentedImages(images, config, seed=1), len(images)
    rows = [3, number + 3, 2 * number + 3, 4]
    batch = augmented.__getitems__(rows)["images"]
    for place, i in enumerate(rows):  # whatever else is asked for
        alone = AugmentedImages(images, config, seed=1).__getitems__([i])["images"]
        assert torch.equal(alone[0], batch[place])
    epochs = augmented.__getitems__([3 + number * e for e in range(8)])["images"]
    assert len({image.numpy().tobytes() for image in epochs}) >= (2 if crop == "off" else 4)

    # From any position, and shared between processes.
    later = next(ShuffledLoader(augmented, 8).start_at(5))["images"]
    *_, sixth = islice(ShuffledLoader(augmented, 8).start_at(0), 6)
    assert torch.equal(sixth["images"], later)
    loaders = [ShuffledLoader(augmented, 8, num_processes=2, process_index=r) for r in (0, 1)]
    halves = [next(loader.start_at(5))["images"] for loader in loaders]
    assert torch.equal(torch.cat(halves), later)


def test_windows_lie_in_the_picture_and_have_its_ratio() -> None:
    image, shares = PreprocessingConfig(size=(32, 64)), []
    config = AugmentationConfig(crop="random_resized", crop_area=(0.3, 1))
    for epoch in range(200):
        change = random_change(config, image, (200, 90), seed=0, epoch=epoch, name="a")
        left, top, right, bottom = change.window or (0, 0, 0, 0)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 90
        assert 2 * 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 2 * 4 / 3 + 1e-6
        shares.append((right - left) * (bottom - top) / (200 * 90))
    assert 0.29 < min(shares) < 0.45
    assert max(shares) > 0.8


def test_views_are_named_and_the_flip_mirrors() -> None:
    image = PreprocessingConfig(size=(32, 64), channels=1)
    picture = (np.arange(32 * 64) % 251).reshape(32, 64).astype(np.uint8)
    flipped = view_change("flip", image, (200, 90)).apply(picture, image)
    assert np.array_equal(flipped[0, :, ::-1], picture)
    assert len({view_change(view, image, (200, 90)) for view in known_views()}) == 10
    with pytest.raises(UserError, match="upside_down"):
        view_change("upside_down", image, (200, 90))
