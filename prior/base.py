"""What every prior is: logits that depend on the past alone, and sampling that is exact.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from prior.attention import Attention
from prior.config import PriorConfig
from prior.sampling import Known, SamplingConfig, draw, guide, uniforms
from vqvae2.common.artifact import Artifact
from vqvae2.common.errors import UserError

Stepper = Callable[[int, Tensor | None], Tensor]


class Prior(Artifact, nn.Module, ABC):
    """A distribution over the codes of one level, given those of all coarser levels and a class label.

    A new kind of prior says three things: `forward` (all positions at once, for training), `start` and `step` (one position after
    the other, for sampling). Both ways must give the same logits.
    """

    config_class = PriorConfig
    config: PriorConfig

    @abstractmethod
    def forward(
        self, codes: Tensor, condition: Sequence[Tensor] = (), labels: Tensor | None = None
    ) -> Tensor:
        """Logits of every code. Those of a position depend only on the positions before it, in raster order.

        Args:
            codes: `(B, h, w)` int64.
            condition: the codes of all coarser levels, coarse to fine.
            labels: `(B,)` int64, if the prior has classes; `num_classes` stands for a hidden label.

        Returns:
            `(B, K, h, w)`.
        """

    @abstractmethod
    def start(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """What sampling needs to keep between positions: caches, packed weights, and all that follows from condition and labels.

        Args:
            dtype: of the products of packed weights, see `prior.packed_linear`.
        """

    @abstractmethod
    def step(self, state: Any, position: int, previous: Tensor | None) -> Tensor:
        """Logits `(B, K)` at a position, given the code before it `(B,)` (None at the first), and `state` moved on in place."""

    def attention(self) -> Attention | None:
        """The attention over the level's own positions, for the audit to try it at its real length; None for a family that has none."""
        return None

    def make_stepper(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        dtype: torch.dtype,
    ) -> Stepper:
        """A function of a position and the codes before it `(B,)` (None at the first) to logits `(B, K)`: `step` on a fresh `start`.

        A family that can do it faster on some device overrides this.
        """
        return partial(self.step, self.start(batch_size, condition, labels, dtype=dtype))

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        condition: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        sampling: SamplingConfig | None = None,
        seeds: Sequence[int],
        known: Known | None = None,
        bf16: bool = False,
    ) -> Tensor:
        """Draw codes `(B, h, w)` int64, position after position, through caches: code for code what `sample_plain` draws.

        Args:
            labels: `(B,)`; `num_classes` stands for no label, where the prior was trained with label dropout.
            seeds: one number per image; the random numbers of an image come from its own seed alone.
            known: codes that are not drawn but given.
            bf16: products in bfloat16, sums and caches in fp32: faster, and not code for code the same.

        Raises:
            UserError: see `check_inputs`; or the logits are not finite.
        """
        sampling = sampling or SamplingConfig()
        self.check_inputs(batch_size, condition, labels, sampling)
        numbers = uniforms(seeds, self.config.level, self.config.num_positions).to(self.device)
        rows, condition, labels = self._with_unlabelled(batch_size, condition, labels, sampling)
        if known is not None and bool(known.mask.all()):
            return known.codes
        step = self.make_stepper(rows, condition, labels, torch.bfloat16 if bf16 else torch.float32)
        drawn: list[Tensor] = []
        for position in range(self.config.num_positions):
            previous = (
                drawn[-1].clamp(max=self.config.codebook_sizes[-1] - 1) if drawn else None
            )  # beyond it only if logits are no numbers, see below
            if previous is not None and sampling.guided:
                previous = torch.cat([previous, previous])
            code = draw(guide(step(position, previous), sampling), numbers[:, position], sampling)
            drawn.append(code if known is None else known.instead_of(code, position))
        codes = rearrange(torch.stack(drawn, dim=1), "b (h w) -> b h w", h=self.config.grids[-1][0])
        if (
            int(codes.max()) >= self.config.codebook_sizes[-1]
        ):  # what drawing from logits that are no numbers ends in
            raise UserError(
                f"the prior of level {self.config.level} gives logits that are not finite: its weights are damaged; see vqvae2 doctor."
            )
        return codes

    @torch.no_grad()
    def sample_plain(
        self,
        batch_size: int,
        condition: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        sampling: SamplingConfig | None = None,
        seeds: Sequence[int],
        known: Known | None = None,
    ) -> Tensor:
        """The definition of sampling: `forward` over the whole grid for every position. Slow; what `sample` is held against."""
        sampling = sampling or SamplingConfig()
        self.check_inputs(batch_size, condition, labels, sampling)
        height, width = self.config.grids[-1]
        codes = torch.zeros(batch_size, height, width, dtype=torch.int64, device=self.device)
        numbers = uniforms(seeds, self.config.level, height * width).to(self.device)
        _, given, classes = self._with_unlabelled(batch_size, condition, labels, sampling)
        for position in range(height * width):
            row, column = divmod(position, width)
            logits = self.forward(
                torch.cat([codes, codes]) if sampling.guided else codes, given, classes
            )[:, :, row, column]
            code = draw(guide(logits, sampling), numbers[:, position], sampling)
            codes[:, row, column] = code if known is None else known.instead_of(code, position)
        return codes

    def _with_unlabelled(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        sampling: SamplingConfig,
    ) -> tuple[int, Sequence[Tensor], Tensor | None]:
        """For guidance every image twice, the second time without its label."""
        if not sampling.guided or labels is None:
            return batch_size, condition, labels
        return (
            2 * batch_size,
            [torch.cat([codes, codes]) for codes in condition],
            torch.cat([labels, torch.full_like(labels, self.config.num_classes)]),
        )

    def check_inputs(
        self,
        batch_size: int,
        condition: Sequence[Tensor],
        labels: Tensor | None,
        sampling: SamplingConfig,
    ) -> None:
        """Refuse a condition, labels or guidance that are not what the prior was made for.

        Raises:
            UserError: naming what was expected.
        """
        config = self.config
        expected = [(batch_size, *grid) for grid in config.grids[:-1]]
        if [tuple(codes.shape) for codes in condition] != expected:
            raise UserError(
                f"the condition has shapes {[tuple(c.shape) for c in condition]}, but the prior of level {config.level} expects {expected}."
            )
        if (labels is None) != (config.num_classes == 0):
            raise UserError(
                f"the prior has {config.num_classes} classes: give {'labels' if labels is None else 'no labels'}."
            )
        highest = config.num_classes if config.label_dropout else config.num_classes - 1
        if labels is not None and not (int(labels.min()) >= 0 and int(labels.max()) <= highest):
            raise UserError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}, but must be from 0 to {highest}."
            )
        if sampling.guided and not (config.num_classes and config.label_dropout):
            raise UserError(
                f"guidance_scale is {sampling.guidance_scale}, but the prior of level {config.level} was trained "
                f"{'without label dropout' if config.num_classes else 'without classes'}: leave it at 1, or train with --label-dropout 0.1."
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
