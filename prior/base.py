"""What every prior is: logits that depend on the past alone, and sampling that is exact.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prior.attention import Attention
from prior.config import PriorConfig
from prior.cuda_graphs import RecordedCalls, Stepper, as_it_is, eager_stepper, fixed_stepper
from prior.noise import Noise
from prior.predictive import Guesses, choose_window, grid_pays, sample_codes
from prior.sampling import Known, SamplingConfig, check_inputs, guide
from vqvae2.common.artifact import Artifact
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.torch_settings import evaluating, exact_convolutions


def nats_of(logits: Tensor, codes: Tensor) -> Tensor:
    """The negative log-likelihood of each code `(B, h, w)`, by logits `(B, K, h, w)`.

    With a code's logits side by side in memory, torch takes a third of the time on a CPU.
    """
    rows = logits.movedim(1, -1).flatten(end_dim=-2)
    return F.cross_entropy(rows, codes.flatten(), reduction="none").view_as(codes)


class Prior(Artifact, ABC):
    """A distribution over one level's codes, given those of all coarser levels, and perhaps a
    class label and a condition vector.

    A new family implements `forward` (all positions at once, for training), `start` and `step`
    (one position after another, for sampling). Both ways must give the same logits. The rest is
    optional: `has_windows` for several positions at once, `fixed_shapes` and `start_row` for CUDA
    graphs, `attention` for `prior.audit`.
    """

    config_class = PriorConfig
    config: PriorConfig
    fixed_shapes: ClassVar[bool] = False
    """Whether no shape in `step` depends on the position, so that a CUDA graph can hold it."""
    has_windows: ClassVar[bool] = False
    """Whether `step` computes windows of positions, each image its own. Other families compute
    one position per call, by `step`, or all of them, by `forward`."""

    @abstractmethod
    def forward(
        self,
        codes: Tensor,
        condition: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        views: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, K, h, w)`, which at each position depend only on the codes before it.

        Args:
            codes: `(B, h, w)` int64.
            condition: the codes of all coarser levels, coarse to fine, `(B, h', w')` each; then, if
                the prior reads vectors, those, `(B, V)` floats, of NaN where they are hidden.
            labels: `(B,)` int64 if the prior has classes; `num_classes` means no label.
            views: `(B,)` int64 if the prior is told views: 0 for the original, which is meant, too,
                if none are given; else 1 + the place in `config.views`.
        """

    @abstractmethod
    def start(
        self, batch_size: int, condition: Any, labels: Any, *, dtype: torch.dtype = torch.float32
    ) -> Any:
        """What sampling keeps between positions; products are computed in `dtype`. A family with
        windows is also given `window`, the number of their positions."""

    @abstractmethod
    def step(self, state: Any, position: Any, previous: Tensor) -> Tensor:
        """Logits `(B, W, K)` of a window of positions; `state` moves on in place.

        Args:
            position: `(B,)`, the first of each image; the positions before it were computed with
                the right codes. In families without windows W = 1, and it is the number of the
                position; with `fixed_shapes` a tensor `(1,)` too, and then the caller
                (`fixed_stepper`) runs `start_row` before each row.
            previous: the codes just before each position `(B, W)`; K before the first one.
        """

    def start_row(self, state: Any, position: Any, previous: Tensor) -> None:
        """What a family computes once per row; the arguments are those of the row's first step."""

    def starts_row(self, call: int) -> bool:
        """Whether this call of a sampling loop begins with `start_row`, if it has fixed shapes."""
        return not self.has_windows and call % self.config.grids[-1][1] == 0

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
        window: int = 1,
        compiled: bool | None = None,
    ) -> Stepper:
        """`step` on a fresh state, for windows of `window` positions; see `sample`."""
        options: Any = {"dtype": dtype, **({"window": window} if self.has_windows else {})}
        start = partial(self.start, batch_size, condition, labels, **options)
        if self.is_recorded(compiled):
            return fixed_stepper(self, start(), compiled=bool(compiled))
        return eager_stepper(self, start())

    def is_recorded(self, compiled: bool | None) -> bool:
        """Whether sampling records its calls as CUDA graphs; see `sample`."""
        if compiled is False or torch.are_deterministic_algorithms_enabled():
            return False  # deterministic operations may look at values, which graphs cannot
        return self.fixed_shapes and self.device.type == "cuda"

    def _plain_stepper(self, batch_size: int, condition: Any, labels: Any) -> Stepper:
        """The definition of a step: `forward` over the whole grid."""
        codes = torch.zeros(batch_size, self.config.num_positions, dtype=torch.int64)
        codes = codes.to(self.device)

        def step(position: int, _: Tensor, previous: Tensor) -> Tensor:
            if position:
                codes[:, position - 1] = previous[:, 0]
            grid = codes.unflatten(1, self.config.grids[-1])
            return self.forward(grid, condition, labels).flatten(2)[:, None, :, position]

        return step

    def _grid_stepper(self, condition: Any, labels: Any) -> Stepper:
        """`forward` as a step, whose window is the whole grid."""
        grid, highest = self.config.grids[-1], self.config.codebook_sizes[-1] - 1

        def step(_: int, __: Tensor, previous: Tensor) -> Tensor:
            # Nothing reads the last code. A code that was drawn from NaN is none: see `sample`.
            codes = F.pad(previous[:, 1:].clamp(max=highest), (0, 1)).unflatten(1, grid)
            return self.forward(codes, condition, labels).flatten(2).transpose(1, 2)

        return step

    def _width(self, wanted: int, batch_size: int, *, bf16: bool) -> int:
        """How many positions a call computes; `wanted` is the caller's window, 0 to choose."""
        length, device = self.config.num_positions, self.device.type
        if self.has_windows:
            return min(wanted or choose_window(batch_size, length, device), length)
        whole = wanted > 1 if wanted else grid_pays(batch_size, length, self.num_parameters, device)
        return length if whole and not bf16 else 1  # `forward` does not sum bf16 products in fp32

    @torch.no_grad()
    @exact_convolutions()
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
        window: int = 0,
        plain: bool = False,
    ) -> Tensor:
        """Draw codes `(B, h, w)` int64, the same as one position after another in raster order.

        Args:
            seeds: one per image; an image's random numbers come from its own seed alone.
            known: codes that are given instead of drawn.
            bf16: products in bfloat16, sums in fp32: faster, but the codes differ.
            compiled: on CUDA. None: calls are recorded as CUDA graphs. True: steps and drawing are
                compiled first, for each level, size of a batch and setting. False: neither.
            window: positions computed in one call, whose codes are guessed first, see
                `prior.predictive`; 0 chooses. The codes are the same, but for ties in the last bit.
                For a family without windows more than 1 means all, which is not compiled, or in
                bf16 still 1.
            plain: without caches, slowly: the definition, which all else equals but for ties.

        Raises:
            UserError: see `check_inputs`; or the logits are not finite.
        """
        # What is asked for.
        config, codebook_size = self.config, self.config.codebook_sizes[-1]
        sampling = sampling or SamplingConfig()
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else [*seeds]
        check_inputs(config, batch_size, condition, labels, sampling, seeds, known)
        check(window >= 0, "window", window, "0 or more")
        if known is not None and bool(known.mask.all()):
            return known.codes

        # An image's noise comes from its seed (an int64 holds 64 bits of it, whatever the sign).
        numbers = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))
        noise = Noise(numbers.to(self.device), config.level, config.num_positions, codebook_size)
        guesses = Guesses(noise, config.num_positions, sampling, known)

        # Guidance needs every image a second time, without its label and vector.
        copies = 2 if sampling.guided else 1
        condition = [torch.cat([given] * copies) for given in condition]
        if sampling.guided and config.vector_size:
            condition[-1][batch_size:] = torch.nan
        if sampling.guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

        # How the logits of a window of positions are computed: without dropout.
        with evaluating(self):
            width = 1 if plain else self._width(window, copies * batch_size, bf16=bf16)
            record: Callable = as_it_is
            if plain:
                step = self._plain_stepper(copies * batch_size, condition, labels)
            elif width > 1 and not self.has_windows:
                step = self._grid_stepper(condition, labels)
            else:
                dtype = torch.bfloat16 if bf16 else torch.float32
                how: Any = {"window": width, "compiled": compiled}
                step = self.make_stepper(copies * batch_size, condition, labels, dtype, **how)
                if self.is_recorded(compiled):
                    record = partial(RecordedCalls, is_special=self.starts_row, device=self.device)
                    if compiled:
                        guesses.compile()

            def guided(call: int, first: Tensor, before: Tensor) -> Tensor:
                logits = step(call, first.repeat(copies), before.repeat(copies, 1))
                return guide(logits, sampling)

            flat, _ = sample_codes(guided, guesses, width, record)
        codes = flat.unflatten(1, config.grids[-1])  # (B, T) to (B, h, w)
        if int(codes.max()) >= codebook_size:  # drawn from NaN
            fault = f"the prior of level {config.level} gives logits that are not finite"
            raise UserError(f"{fault}: its weights are damaged; run vqvae2 doctor.")
        return codes
