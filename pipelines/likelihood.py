"""How likely the priors find codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prior.base import Prior
from prior.probes import Rows, nats_per_row
from vqvae2.common.errors import UserError


def log_likelihood(
    priors: Sequence[Prior], codes: Sequence[Tensor], labels: Sequence[int]
) -> Tensor:
    """ln p of each image's codes by level, given the coarser ones: `(B, levels)` float64, in nats.

    Args:
        codes: `(B, h, w)` int64 per level, coarse to fine.
        labels: numbers of classes, one for all images or one each; none without classes.
    """
    number, levels = len(codes[0]), []
    if len(labels) not in (0, 1, number):
        what = f"{len(labels)} labels do not fit the number of images, {number}"
        raise UserError(f"{what}: give one label, or one per image.")
    classes = torch.tensor([*labels] * (number if len(labels) == 1 else 1))
    for level, prior in enumerate(priors):
        *condition, own = [grid.to(prior.device) for grid in codes[: level + 1]]
        given = classes.to(prior.device) if prior.config.num_classes else None
        levels.append(-nats_per_row(prior, Rows(own, condition, given)).cpu())
    return torch.stack(levels, dim=1)
