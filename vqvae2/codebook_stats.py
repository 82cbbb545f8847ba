"""How a codebook is used: figures from counts `(K,)`, and what they mean in words."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
COLLAPSED = 0.1  # a perplexity below this times K is called a collapse
SIZES = "codebook_sizes (of fsq: fsq_levels)"


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the code frequencies: from 1 (one code is used) to K (all equally)."""
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp().item()


def usage(counts: Tensor) -> float:
    """Share of the codes that occur at all."""
    return (counts > 0).double().mean().item()


def carriers(counts: Tensor, share: float = 0.95) -> int:
    """How few codes make up this share of the assignments."""
    ordered = counts.double().sort(descending=True).values.cumsum(dim=0)
    return int((ordered < share * ordered[-1]).sum()) + 1


def level_name(level: int, num_levels: int) -> str:
    """top, bottom, or the number of a level between them; codebook if there is one level."""
    if num_levels == 1:
        return "codebook"
    return {0: "top", num_levels - 1: "bottom"}.get(level, f"level {level}")


def verdict(name: str, counts: Tensor, num_features: int | None = None) -> tuple[bool, str]:
    """Whether a codebook is in use, and a sentence that says so or names the settings to change;
    `num_features` is how many different ones there can be, if that is known."""
    size, total = len(counts), int(counts.sum())
    use = f"{name}: {carriers(counts)} of {size} codes carry 95 % of the assignments"
    if perplexity(counts) >= COLLAPSED * size:
        return True, f"{use}: in use."
    too_few = f"there are only {total}, too few to judge" if total < 10 * size else None
    if num_features is not None and num_features < size:
        too_few = f"all images have only {num_features} features, too few images to fill it"
    if too_few:
        return False, f"{use}, but {too_few}: use more images or smaller {SIZES}."
    advice = f"lower learning_rate, raise model.quantizer.revival_threshold, or lower {SIZES}"
    return False, f"{use}: it has collapsed; {advice}."


def warn_of_few(number: int, sizes: Sequence[int]) -> None:
    """Say that a codebook has more codes than there are training images, if one has."""
    if number < max(sizes):
        text = "only %d training images for %d codes, which may memorise them: use more images"
        logger.warning(f"{text}, or smaller {SIZES}.", number, max(sizes))


class CodebookWatch:
    """Turns the sums of a window of steps into figures, and warns while a codebook collapses."""

    PATIENCE = 200  # steps before the first warning, and between two of the same level

    def __init__(self, num_levels: int, num_features: Sequence[int | None] = ()) -> None:
        self.num_features = num_features or [None] * num_levels
        self.names = [level_name(level, num_levels) for level in range(num_levels)]
        self.quiet_until = [self.PATIENCE] * num_levels

    def __call__(self, step: int, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
        """Means of `count` scalars; perplexity and usage of each level l from `assignments_l`."""
        figures = {}
        for name, value in sums.items():
            if not name.startswith("assignments_"):
                figures[name] = value.item() / count
                continue
            level = int(name.removeprefix("assignments_"))
            figures |= {f"perplexity_{level}": perplexity(value), f"usage_{level}": usage(value)}
            healthy, sentence = verdict(self.names[level], value, self.num_features[level])
            if not healthy and step >= self.quiet_until[level]:
                logger.warning("%s (step %d)", sentence, step)
                self.quiet_until[level] = step + self.PATIENCE
        return figures
