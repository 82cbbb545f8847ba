"""What a prior reads besides codes and a class: a vector of numbers or of attributes; and while it
is trained, which view of its image a row is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VectorNetwork(nn.Module):
    """Vectors `(B, V)` to features `(B, W)`: an affine map of their normalised numbers, to be added
    to the class's. A vector of NaN is hidden, which has features of its own."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.affine = nn.Linear(size + 1, width)  # the last input says that it is hidden

    def normalise_as(self, vectors: Tensor, *, attributes: bool) -> None:
        """From now on, numbers as in these vectors `(N, V)` have mean 0 and variance 1 / V, so that
        a vector is about as long as one attribute. Attributes stay 0 and 1."""
        if not attributes:
            deviation, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
            scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0)
            self.mean.copy_(mean)
            self.scale.copy_(scale / len(scale) ** 0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        """See the class."""
        vectors = vectors.to(self.mean.dtype)
        hidden = vectors.isnan().any(dim=1, keepdim=True)
        given = torch.where(hidden, 0, (vectors - self.mean) * self.scale)
        return self.affine(torch.cat([given, hidden.to(given.dtype)], dim=1))


class ViewNetwork(nn.Module):
    """Views `(B,)` to features `(B, W)`, to be added to the class's. The original, 0, has none:
    where no view is given, it is meant. So a prior learns from mirrored and cropped images, too,
    and samples none of them (distribution augmentation, Jun et al. 2020, section 3)."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.others = nn.Parameter(torch.zeros(number, width))

    def forward(self, views: Tensor) -> Tensor:
        """See the class."""
        return F.embedding(views, F.pad(self.others, (0, 0, 1, 0)))


def with_vectors(
    config: Any, coarser: Sequence[Tensor], number: int, vectors: Tensor | None = None
) -> list[Tensor]:
    """The condition of a prior of this configuration: coarser codes, and where it reads vectors
    those `(B, V)`, by default `number` hidden ones."""
    if not config.vector_size:
        return [*coarser]
    hidden = torch.full((number, config.vector_size), torch.nan)
    return [*coarser, hidden if vectors is None else vectors]
