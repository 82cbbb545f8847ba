"""Sampling around given codes: completion, inpainting, variations."""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from prior.base import Prior
from prior.sampling import Known
from vqvae2.common.config import check
from vqvae2.model import VQVAE2


@torch.no_grad()
def known_outside(model: VQVAE2, images: Tensor, mask: Tensor) -> list[Known]:
    """For inpainting: the codes of images `(B, C, H, W)` in [-1, 1], given in each cell of the
    grid that holds no pixel to be repainted.

    Pixels near the mask change a little, as the decoder mixes neighbouring cells.

    Args:
        mask: `(B, H, W)` bool, true where an image is to be repainted; a `UserError` if it differs
            from the images in size.
    """
    size = (len(images), *images.shape[2:])
    check(mask.shape == size, "the mask's shape", tuple(mask.shape), f"{size}, as the images'")
    known = []
    for level in model.encode(images):
        h, w = level.codes.shape[1:]
        repainted = reduce(mask.float(), "b (h up) (w across) -> b h w", "max", h=h, w=w).bool()
        known.append(Known(level.codes, ~repainted))
    return known


@torch.no_grad()
def keep_levels(model: VQVAE2, images: Tensor, number: int) -> list[Known | None]:
    """For variations: all codes of the `number` coarsest levels of images `(B, C, H, W)` in
    [-1, 1], and none of the finer levels', of which there must be one or more (`UserError`)."""
    most = model.config.num_levels - 1
    check(1 <= number <= most, "keep_levels", number, f"from 1 to {most}: finer levels vary")
    codes = [level.codes for level in model.encode(images)]
    kept = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes[:number]]
    return [*kept, *[None] * (len(codes) - number)]


def repeat_known(known: Sequence[Known | None], number: int) -> list[Known | None]:
    """The same given codes for `number` images: image i has those of row i modulo the rows."""
    rows = torch.arange(number)
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
        last, ends = prior.config.codebook_sizes[-1] - 1, given.codes.aminmax()
        low, high = int(ends.min), int(ends.max)
        check(0 <= low <= high <= last, f"known[{level}]: codes", (low, high), f"from 0 to {last}")
