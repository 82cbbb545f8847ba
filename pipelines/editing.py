"""Given codes: sampling around them (inpainting, variations), and how likely they are."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from prior.base import Prior
from prior.probes import nats_per_row, rows_for
from prior.sampling import Known
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.config import PreprocessingConfig
from vqvae2.data import load_picture, open_picture, picture_size
from vqvae2.model import VQVAE2

logger = logging.getLogger(__name__)


def known_outside(model: VQVAE2, images: Any, mask: Any) -> list[Known]:
    """For inpainting: the codes of images (see `as_images`), given in each cell of the grid that
    holds no pixel to be repainted.

    Pixels near the mask change a little, as the decoder mixes neighbouring cells.

    Args:
        mask: a picture as large as the image's (a PIL image, a path, an array), white where it is
            to be repainted; or a bool tensor `(B, H, W)` or `(H, W)` of the model's size.

    Raises:
        UserError: an image or the mask cannot be read, or they differ in size.
    """
    if not isinstance(mask, Tensor):
        mask = _painted(mask, images, model.config.image)
    codes = model.encode_images(images)
    size = (len(codes[0]), *model.config.image.height_width)
    fits = mask.dtype == torch.bool and tuple(mask.shape) in (size, size[1:])
    allowed = f"{size} or {size[1:]} of torch.bool, as the images"
    check(fits, f"the mask of {mask.dtype}", tuple(mask.shape), allowed)
    if not mask.any():
        logger.warning("the mask has no white: nothing is repainted.")
    mask, known = mask.to(model.device).expand(size).float(), []
    for level in codes:
        h, w = level.shape[1:]
        repainted = reduce(mask, "b (h up) (w across) -> b h w", "max", h=h, w=w).bool()
        known.append(Known(level, ~repainted))
    return known


def _painted(mask: Any, images: Any, config: PreprocessingConfig) -> Tensor:
    """The white area `(H, W)` of a mask that was painted over these images."""
    picture = open_picture(mask)
    if isinstance(picture, np.ndarray) and picture.dtype == bool:
        picture = picture * np.uint8(255)
    for one in images if isinstance(images, list | tuple) else [images]:
        is_prepared = isinstance(one, Tensor) or getattr(one, "ndim", 0) == 4
        size = config.height_width[::-1] if is_prepared else picture_size(open_picture(one))
        if picture_size(picture) != size:
            seen = "the mask has {} x {} pixels, and the image {} x {}"
            seen = seen.format(*picture_size(picture), *size)
            raise UserError(f"{seen}: paint the mask over the image itself.")
    try:
        return load_picture(picture, for_masks(config))[0, 0] > 127
    except UserError:
        name = f"the mask {mask}" if isinstance(mask, str | Path) else "the mask"
        raise UserError(f"{name} is no 8-bit picture in black and white: convert it.") from None


def for_masks(config: PreprocessingConfig) -> PreprocessingConfig:
    """How a mask is read that was painted over an image: grey, and scaled as the image is."""
    return dataclasses.replace(config, channels=1, background="black", value_range=(0, 255))


def keep_levels(model: VQVAE2, images: Any, number: int) -> list[Known | None]:
    """For variations: all codes of the `number` coarsest levels of images (see `as_images`), and
    none of the finer levels', of which there must be one or more (`UserError`)."""
    most = model.config.num_levels - 1
    if not most:
        raise UserError("a model of one level has no finer one to vary: give a mask.")
    allowed = "1" if most == 1 else f"from 1 to {most}"
    check(number in range(1, most + 1), "keep_levels", number, f"{allowed}: finer levels vary")
    codes = model.encode_images(images)
    kept = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes[:number]]
    return [*kept, *[None] * (len(codes) - number)]


def repeat_known(known: Sequence[Known | None], images: range) -> list[Known | None]:
    """The given codes of these images: image i has those of row i modulo the rows."""
    rows = torch.tensor(images, dtype=torch.int64)
    return [level and Known(*(tensor[rows % len(tensor)] for tensor in level)) for level in known]


def check_known(known: Sequence[Known | None], priors: Sequence[Prior], num_images: int) -> None:
    """Raise a `UserError` for given codes that the priors cannot continue: not one entry per level,
    of another shape, or out of the codebook."""
    allowed = f"{len(priors)}: give one per level, None where nothing is given"
    check(len(known) == len(priors), "the length of known", len(known), allowed)
    for level, (prior, given) in enumerate(zip(priors, known, strict=True)):
        if given is None:
            continue
        shape, shapes = (num_images, *prior.config.grids[-1]), [tuple(t.shape) for t in given]
        allowed = f"{shape}, one grid per image, as the mask: see repeat_known"
        check(shapes == [shape, shape], f"known[{level}]: shape", shapes, allowed)
        _check_range(f"known[{level}]", given.codes, prior.config.codebook_sizes[-1])


def as_codes(given: Sequence[Any], model: VQVAE2) -> list[Tensor]:
    """Codes `(B, h, w)` per level, coarse to fine, tensors or arrays, as int64 tensors where the
    model is. Raises a `UserError` for any that it does not have."""
    try:
        levels = [torch.as_tensor(level).to(model.device) for level in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"there are no codes ({error}): give a tensor per level.") from None
    shapes = [tuple(level.shape) for level in levels]
    number = len(levels[0]) if levels and shapes[0] else 0
    fits = number > 0 and shapes == [(number, *grid) for grid in model.config.grids]
    fits = fits and not any(level.is_floating_point() for level in levels)
    allowed = f"integers (B, h, w), one per level, on the grids {model.config.grids}"
    check(fits, "the shape of the codes", shapes, allowed)
    for level, size in enumerate(model.config.codebook_size_per_level):
        levels[level] = levels[level].long()  # torch compares no uint16
        _check_range(f"codes[{level}]", levels[level], size)
    return levels


def log_likelihood(
    priors: Sequence[Prior],
    codes: Sequence[Tensor],
    labels: Sequence[int],
    vectors: Tensor | None = None,
) -> Tensor:
    """ln p of each image's codes by level, given the coarser ones: `(B, levels)` float64, in nats.
    `labels` are one for all images or one each; none without classes (else a `UserError`).
    Likewise `vectors` `(1, V)` or `(B, V)`; None hides them."""
    number, levels = len(codes[0]), []
    classes = class_tensor(labels, number)
    if vectors is not None:
        fits = len(vectors) in (1, number)
        check(fits, "the number of conditions", len(vectors), f"1, or {number}, one per image")
        vectors = vectors.expand(number, -1)
    for prior in priors:
        levels.append(-nats_per_row(prior, rows_for(prior, codes, classes, vectors)).cpu())
    return torch.stack(levels, dim=1)


def class_tensor(labels: Sequence[int], number: int) -> Tensor:
    """The classes `(number,)` of images of which all have one label, or each its own; without
    labels zeros, which nothing reads."""
    if len(labels) not in (0, 1, number):
        what = f"{len(labels)} labels do not fit the number of images, {number}"
        raise UserError(f"{what}: give one label, or one per image.")
    return torch.tensor([*labels] if len(labels) == number else [*(labels or [0])] * number)


def _check_range(key: str, codes: Tensor, size: int) -> None:
    if not bool(((codes >= 0) & (codes < size)).all()):  # waits for a GPU once
        found = int(codes.min()), int(codes.max())
        check(False, f"{key}: codes", found, f"from 0 to {size - 1}")
