"""How a codebook is used: figures from counts, and what they mean in words."""

import torch
from torch import Tensor

COLLAPSED = 0.1  # a perplexity below this times K is called a collapse


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of code frequencies, from counts `(K,)`: between 1 (one code carries all) and K (all equal)."""
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp().item()


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at all, from counts `(K,)`."""
    return (counts > 0).double().mean().item()


def carriers(counts: Tensor, share: float = 0.95) -> int:
    """How few codes carry this share of the assignments, from counts `(K,)`."""
    ordered = counts.double().sort(descending=True).values.cumsum(dim=0)
    return int((ordered < share * ordered[-1]).sum()) + 1


def level_name(level: int, num_levels: int) -> str:
    """top, bottom, or the number of a level between them."""
    return (
        {0: "top", num_levels - 1: "bottom"}.get(level, f"level {level}")
        if num_levels > 1
        else "codebook"
    )


def verdict(name: str, counts: Tensor) -> tuple[bool, str]:
    """Whether a codebook is in use, and a sentence that says so or names the settings to change."""
    size, number = len(counts), carriers(counts)
    found = f"{name}: {number} of {size} codes carry 95 % of the assignments"
    if perplexity(counts) >= COLLAPSED * size:
        return True, f"{found}: in use."
    if counts.sum() < 10 * size:
        return (
            False,
            f"{found}, of which there are only {int(counts.sum())}: too few to judge; use more images or a smaller codebook_sizes.",
        )
    return False, (
        f"{found}: it has collapsed; lower learning_rate, raise model.quantizer.revival_threshold (and keep start_from_data on), "
        f"or take a smaller codebook_sizes."
    )
