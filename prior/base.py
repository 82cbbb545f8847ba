"""What every prior is: logits that depend on the past alone, and sampling that is exact.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from prior.config import PriorConfig
from prior.sampling import SamplingConfig, draw, uniforms
from vqvae2.common.artifact import Artifact
from vqvae2.common.errors import UserError


class Prior(Artifact, nn.Module, ABC):
    """A distribution over the codes of one level, given those of all coarser levels and a class label.

    A new kind of prior says three things: `forward` (all positions at once, for training), `start` and `step` (one position after
    the other, for sampling). Both ways must give the same logits.
    """

    config_class = PriorConfig
    config: PriorConfig

    @abstractmethod
    def forward(self, codes: Tensor, condition: Sequence[Tensor] = (), labels: Tensor | None = None) -> Tensor:
        """Logits of every code. Those of a position depend only on the positions before it, in raster order.

        Args:
            codes: `(B, h, w)` int64.
            condition: the codes of all coarser levels, coarse to fine.
            labels: `(B,)` int64, if the prior has classes.

        Returns:
            `(B, K, h, w)`.
        """

    @abstractmethod
    def start(self, batch_size: int, condition: Sequence[Tensor], labels: Tensor | None) -> Any:
        """What sampling needs to keep between positions: caches, and all that follows from condition and labels."""

    @abstractmethod
    def step(self, state: Any, position: int, previous: Tensor | None) -> Tensor:
        """Logits `(B, K)` at a position, given the code before it `(B,)` (None at the first), and `state` moved on in place."""

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        condition: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        sampling: SamplingConfig | None = None,
        seeds: Sequence[int],
    ) -> Tensor:
        """Draw codes `(B, h, w)` int64, position after position, through caches: code for code what `sample_plain` draws.

        Args:
            seeds: one number per image; the random numbers of an image come from its own seed alone.
        """
        self.check_inputs(batch_size, condition, labels)
        state = self.start(batch_size, condition, labels)
        numbers = uniforms(seeds, self.config.level, self.config.num_positions).to(self.device)
        drawn: list[Tensor] = []
        for position in range(self.config.num_positions):
            logits = self.step(state, position, drawn[-1] if drawn else None)
            drawn.append(draw(logits, numbers[:, position], sampling or SamplingConfig()))
        return rearrange(torch.stack(drawn, dim=1), "b (h w) -> b h w", h=self.config.grids[-1][0])

    @torch.no_grad()
    def sample_plain(
        self,
        batch_size: int,
        condition: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        sampling: SamplingConfig | None = None,
        seeds: Sequence[int],
    ) -> Tensor:
        """The definition of sampling: `forward` over the whole grid for every position. Slow; what `sample` is held against."""
        self.check_inputs(batch_size, condition, labels)
        height, width = self.config.grids[-1]
        codes = torch.zeros(batch_size, height, width, dtype=torch.int64, device=self.device)
        numbers = uniforms(seeds, self.config.level, height * width).to(self.device)
        for position in range(height * width):
            row, column = divmod(position, width)
            logits = self.forward(codes, condition, labels)[:, :, row, column]
            codes[:, row, column] = draw(logits, numbers[:, position], sampling or SamplingConfig())
        return codes

    def check_inputs(self, batch_size: int, condition: Sequence[Tensor], labels: Tensor | None) -> None:
        """Refuse a condition or labels that are not what the prior was made for.

        Raises:
            UserError: naming what was expected.
        """
        expected = [(batch_size, *grid) for grid in self.config.grids[:-1]]
        if [tuple(codes.shape) for codes in condition] != expected:
            raise UserError(f"the condition has shapes {[tuple(c.shape) for c in condition]}, but the prior of level {self.config.level} expects {expected}.")
        if (labels is None) != (self.config.num_classes == 0):
            raise UserError(f"the prior has {self.config.num_classes} classes: give {'labels' if labels is None else 'no labels'}.")
        if labels is not None and not (int(labels.min()) >= 0 and int(labels.max()) < self.config.num_classes):
            raise UserError(f"labels reach from {int(labels.min())} to {int(labels.max())}, but must be from 0 to {self.config.num_classes - 1}.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
