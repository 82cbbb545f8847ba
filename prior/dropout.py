"""Dropout whose masks cost little on a CPU: drawing them took an eighth of a training step."""

import torch
from torch import Tensor
from torch.nn import functional as F

BYTES = 8  # that one random number gives
FULL_RANGE = torch.iinfo(torch.int64).min, None  # all values, so that all bytes are random


def add_dropped(x: Tensor, branch: Tensor, share: float, *, training: bool) -> Tensor:
    """x + dropout(branch), of one shape: a residual connection.

    On a CPU a byte decides over each feature, so that `share` is rounded to a multiple of 1/256;
    but not where it is compiled, for torch.compile cannot trace that.
    """
    if not training or share == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x + F.dropout(branch, share, training)
    dropped = min(max(1, round(256 * share)), 255)
    numbers = torch.empty(-(-branch.numel() // BYTES), dtype=torch.int64).random_(*FULL_RANGE)
    random = numbers.view(torch.uint8)[: branch.numel()].view(branch.shape)
    kept = (random >= dropped).to(branch.dtype)
    scale = 256 / (256 - dropped)
    if branch.dtype == x.dtype:
        return torch.addcmul(x, branch, kept, value=scale)
    # Of mixed types it would first make copies of both factors in the larger one.
    return torch.add(x, (branch * kept).to(x.dtype), alpha=scale)
