"""What every prior is: logits that depend on the past alone, and sampling that is exact.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prior.attention import Attention
from prior.config import PriorConfig
from prior.cuda_graphs import Stepper, graphed_stepper
from prior.sampling import Known, SamplingConfig, check_inputs, draw, guide, uniforms
from vqvae2.common.artifact import Artifact
from vqvae2.common.errors import UserError

# Compiling takes 5 to 15 s per level and batch size, and saves 5 to 12 ms at each position (on an
# H200): from here on it pays even for a single batch. The choice must not depend on the number of
# images, nor on the clock: an image's last bits depend on it.
COMPILED_POSITIONS = 1024


class Prior(Artifact, nn.Module, ABC):
    """A distribution over one level's codes, given those of all coarser levels and a class label.

    A new family implements `forward` (all positions at once, for training), `start` and `step`
    (one position after another, for sampling). Both ways must give the same logits. The rest is
    optional: `fixed_shapes` and `start_row` for CUDA graphs, `attention` for `prior.audit`.
    """

    config_class = PriorConfig
    config: PriorConfig
    fixed_shapes: ClassVar[bool] = False
    """Whether `step` takes tensors for positions too, so that a CUDA graph can hold it."""

    @abstractmethod
    def forward(
        self, codes: Tensor, condition: Sequence[Tensor] = (), labels: Tensor | None = None
    ) -> Tensor:
        """Logits `(B, K, h, w)`, which at each position depend only on the codes before it.

        Args:
            codes: `(B, h, w)` int64.
            condition: the codes of all coarser levels, coarse to fine, `(B, h', w')` each.
            labels: `(B,)` int64 if the prior has classes; `num_classes` means no label.
        """

    @abstractmethod
    def start(
        self, batch_size: int, condition: Any, labels: Any, *, dtype: torch.dtype = torch.float32
    ) -> Any:
        """What sampling keeps between positions; products are computed in `dtype`."""

    @abstractmethod
    def step(self, state: Any, position: Any, previous: Tensor) -> Tensor:
        """Logits `(B, K)` at one position; `state` moves on in place.

        Args:
            position: its number. With `fixed_shapes` it may also be a tensor `(1,)`: then no shape
                depends on it, and the caller (`graphed_stepper`) runs `start_row` before each row.
            previous: the codes just before it `(B,)`; K at the first position.
        """

    def start_row(self, state: Any, position: Any, previous: Tensor) -> None:
        """What a family computes once per row; the arguments are those of the row's first step."""

    def attention(self) -> Attention | None:
        """The attention over the level's own positions, for the audit; None if there is none."""
        return None

    def make_stepper(
        self,
        batch_size: int,
        condition: Any,
        labels: Any,
        dtype: torch.dtype = torch.float32,
        *,
        compiled: bool | None = None,
    ) -> Stepper:
        """`step` on a fresh state, as a function of position and previous codes; see `sample`."""
        start = partial(self.start, batch_size, condition, labels, dtype=dtype)
        if compiled is None:
            compiled = self.config.num_positions >= COMPILED_POSITIONS
        if compiled and self.fixed_shapes and self.device.type == "cuda":
            return graphed_stepper(self, start, (batch_size, dtype))
        return partial(self.step, start())

    def _plain_stepper(self, batch_size: int, condition: Any, labels: Any) -> Stepper:
        """The definition of a step: `forward` over the whole grid."""
        codes = torch.zeros(batch_size, *self.config.grids[-1], dtype=torch.int64).to(self.device)

        def step(position: int, previous: Tensor) -> Tensor:
            if position:
                codes.view(batch_size, -1)[:, position - 1] = previous
            return self.forward(codes, condition, labels).flatten(2)[:, :, position]

        return step

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
        compiled: bool | None = None,
        plain: bool = False,
    ) -> Tensor:
        """Draw codes `(B, h, w)` int64, one position after another in raster order.

        Args:
            seeds: one per image; an image's random numbers come from its own seed alone.
            known: codes that are given instead of drawn.
            bf16: products in bfloat16, sums in fp32: faster, but the codes differ.
            compiled: on CUDA, compile the steps, once per batch size, and replay them as graphs; by
                default on levels of at least `COMPILED_POSITIONS`.
            plain: without caches, slowly: the definition, which caches equal code for code.

        Raises:
            UserError: see `check_inputs`; or the logits are not finite.
        """
        sampling = sampling or SamplingConfig()
        check_inputs(self.config, batch_size, condition, labels, sampling)
        if known is not None and bool(known.mask.all()):
            return known.codes
        numbers = uniforms(seeds, self.config.level, self.config.num_positions).to(self.device)

        # Guidance needs every image a second time, without its label.
        copies = 2 if sampling.guided else 1
        condition = [codes.repeat(copies, 1, 1) for codes in condition]
        if sampling.guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        if plain:
            step = self._plain_stepper(copies * batch_size, condition, labels)
        else:
            dtype = torch.bfloat16 if bf16 else torch.float32
            step = self.make_stepper(
                copies * batch_size, condition, labels, dtype, compiled=compiled
            )

        # Position after position: logits, guidance, and one code per image.
        codebook_size = self.config.codebook_sizes[-1]
        previous = torch.full((batch_size,), codebook_size, device=self.device)
        drawn: list[Tensor] = []
        for position in range(self.config.num_positions):
            logits = guide(step(position, previous.repeat(copies)), sampling)  # (B, K)
            code = draw(logits, numbers[:, position], sampling)  # (B,)
            previous = code if known is None else known.instead_of(code, position)
            drawn.append(previous)
        codes = torch.stack(drawn, dim=1).unflatten(1, self.config.grids[-1])  # (B, T) to (B, h, w)
        if int(codes.max()) >= codebook_size:  # drawn from NaN
            fault = f"the prior of level {self.config.level} gives logits that are not finite"
            raise UserError(f"{fault}: its weights are damaged; run vqvae2 doctor.")
        return codes
