"""Sampling around codes that are known: completion, inpainting, variations."""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from prior.base import Prior
from prior.sampling import Known
from vqvae2.common.errors import UserError
from vqvae2.model import VQVAE2


@torch.no_grad()
def known_outside(model: VQVAE2, images: Tensor, mask: Tensor) -> list[Known]:
    """For inpainting: the codes of images `(B, C, H, W)` in [-1, 1], known in each cell of the
    grid that holds no pixel to be repainted.

    The decoder mixes neighbouring cells, so pixels near the mask change a little; and the codes
    next to the mask come from an encoder that saw some of what is to be repainted.

    Args:
        mask: `(B, H, W)` bool, true where an image is to be repainted.

    Raises:
        UserError: the mask does not have the images' size.
    """
    if mask.shape != (expected := (len(images), *images.shape[2:])):
        shape = tuple(mask.shape)
        raise UserError(
            f"the mask is {shape}, but the images need {expected}: one value per pixel."
        )
    known = []
    for level in model.encode(images):
        h, w = level.codes.shape[1:]
        repainted = reduce(mask.float(), "b (h up) (w across) -> b h w", "max", h=h, w=w).bool()
        known.append(Known(level.codes, ~repainted))
    return known


@torch.no_grad()
def keep_levels(model: VQVAE2, images: Tensor, number: int) -> list[Known | None]:
    """For variations: all codes of the `number` coarsest levels of images `(B, C, H, W)` in
    [-1, 1] are known, and none of the finer levels'.

    Raises:
        UserError: there are not more levels than that.
    """
    most = model.config.num_levels - 1
    if not 1 <= number <= most:
        raise UserError(f"keep_levels is {number}, but must be from 1 to {most}: finer ones vary.")
    codes = [level.codes for level in model.encode(images)]
    kept = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes[:number]]
    return [*kept, *[None] * (len(codes) - number)]


def repeat_known(known: Sequence[Known | None], number: int) -> list[Known | None]:
    """The same known codes for `number` images: image i has those of row i modulo the rows."""
    repeated: list[Known | None] = []
    for level in known:
        rows = torch.arange(number) % len(level.codes) if level is not None else None
        repeated.append(level and Known(level.codes[rows], level.mask[rows]))
    return repeated


def check_known(known: Sequence[Known | None], priors: Sequence[Prior], num_images: int) -> None:
    """Refuse known codes that the priors cannot continue.

    Raises:
        UserError: not one entry per level, or codes of another shape or out of the codebook.
    """
    if len(known) != len(priors):
        count = f"known has {len(known)} entries, but there are {len(priors)} levels"
        raise UserError(f"{count}: give one per level, None where nothing is known.")
    for level, (prior, given) in enumerate(zip(priors, known, strict=True)):
        last, shape = prior.config.codebook_sizes[-1] - 1, (num_images, *prior.config.grids[-1])
        if given is not None and not (
            given.codes.shape == given.mask.shape == shape
            and 0 <= int(given.codes.min()) <= int(given.codes.max()) <= last
        ):
            raise UserError(
                f"known codes of level {level} must be from 0 to {last} and, as their mask, "
                f"{shape}, one grid per image: see repeat_known."
            )
