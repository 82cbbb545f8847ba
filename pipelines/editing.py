"""Sampling around what is known: completion, inpainting, variations. Codes that are known are kept, the others drawn given them."""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from prior.sampling import Known
from vqvae2.common.errors import UserError
from vqvae2.model import VQVAE2


@torch.no_grad()
def known_outside(model: VQVAE2, images: Tensor, mask: Tensor) -> list[Known]:
    """For inpainting: the codes of images `(B, C, H, W)` in [-1, 1], known wherever their cell holds no pixel to be repainted.

    The decoder mixes neighbouring cells, so near the mask known pixels change a little; and a known code next to the mask was made by an
    encoder that saw some of what is to be repainted.

    Args:
        mask: `(B, H, W)` bool, true where an image is to be repainted.

    Raises:
        UserError: the mask is not of the images' size.
    """
    if mask.shape != (len(images), *images.shape[2:]):
        raise UserError(
            f"the mask is {tuple(mask.shape)}, but the images need {(len(images), *images.shape[2:])}: give one value per pixel."
        )
    levels = [level.codes for level in model.encode(images)]
    return [Known(codes, ~_any_pixel(mask, codes.shape[1], codes.shape[2])) for codes in levels]


@torch.no_grad()
def keep_levels(model: VQVAE2, images: Tensor, number: int) -> list[Known | None]:
    """For variations: the codes of the `number` coarsest levels of images `(B, C, H, W)` are kept, the finer levels drawn anew.

    Raises:
        UserError: there are not more levels than that.
    """
    if not 0 < number < model.config.num_levels:
        raise UserError(
            f"{number} levels are to be kept, but of {model.config.num_levels} levels only 1 to {model.config.num_levels - 1} can be."
        )
    levels = [level.codes for level in model.encode(images)]
    return [
        Known(codes, torch.ones_like(codes, dtype=torch.bool)) if level < number else None
        for level, codes in enumerate(levels)
    ]


def repeat_known(known: Sequence[Known | None], number: int) -> list[Known | None]:
    """The same known codes for `number` images: image i gets those of row i modulo their number."""
    repeated: list[Known | None] = []
    for level in known:
        rows = torch.arange(number) % len(level.codes) if level is not None else None
        repeated.append(None if level is None else Known(level.codes[rows], level.mask[rows]))
    return repeated


def _any_pixel(mask: Tensor, height: int, width: int) -> Tensor:
    """`(B, H, W)` to `(B, height, width)`: whether any pixel of a cell is set."""
    return reduce(mask.float(), "b (h up) (w across) -> b h w", "max", h=height, w=width).bool()
