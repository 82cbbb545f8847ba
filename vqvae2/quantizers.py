"""Quantizers: each vector of a feature map becomes one of K codes, usually of a learned codebook.

Letters: B batch, D code dimension, h w code grid, N = B*h*w vectors, K codebook size.
sg() is stop-gradient.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.errors import UserError
from vqvae2.config import QuantizerConfig
from vqvae2.distributed import (
    from_main_process,
    gather_rows,
    random_integers,
    rank,
    sum_over_processes,
    world_size,
)
from vqvae2.nearest import k_means, nearest, sum_by_code


class Quantized(NamedTuple):
    """What quantizing a feature map gives."""

    embeddings: Tensor
    """`(B, D, h, w)`; its gradient passes straight through to the features."""
    codes: Tensor
    """`(B, h, w)` int64 in [0, K)."""
    loss: Tensor
    """`()`, what the encoder (and a codebook that learns by gradient) pays."""


class Quantizer(nn.Module, ABC):
    """Features `(B, D, h, w)` in, `Quantized` out; `lookup` is the way back from codes."""

    codebook_size: int
    """K."""

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Quantize; in training mode the codebook learns."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""

    def features_of(self, codes: Tensor) -> Tensor:
        """Features `(B, D, h, w)` that are quantized to exactly these codes `(B, h, w)`."""
        return self.lookup(codes)


def straight_through(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings, exactly, with the gradient of the vectors (Bengio et al. 2013). Both
    `(N, D)`."""
    return embeddings + (vectors - vectors.detach())


def rotation(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings as a rotated and scaled image of the vectors (Fifty et al. 2024, section 4.2).

    e = (|e|/|z|) R z with R = I - 2 r r^T + 2 e^ z^T, where z^ and e^ have length 1 and
    r = (z^ + e^) / |z^ + e^|; rotation and scale are constants for the gradient. Both `(N, D)`.
    A vector of length 0, which has no direction, goes `straight_through`.
    """
    with torch.no_grad():
        length = vectors.norm(dim=1, keepdim=True)
        is_zero = length < 1e-12
        length = length.masked_fill(is_zero, 1.0)
        scale = embeddings.norm(dim=1, keepdim=True) / length
        z, e = vectors / length, F.normalize(embeddings, dim=1)
        r = F.normalize(z + e, dim=1)
    reflected = vectors - 2 * r * (vectors * r).sum(dim=1, keepdim=True)
    rotated = scale * (reflected + 2 * e * (vectors * z).sum(dim=1, keepdim=True))
    return torch.where(is_zero, straight_through(vectors, embeddings), rotated)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook of K vectors, whose unused codes are revived.

    Start: k-means over the first batch's features of all processes.
    Revival: a code whose share of the assignments falls below `revival_threshold / K` is replaced
    by a feature of the current batch, and counts as used as often as the average code, so that it
    stays long enough to be chosen. A share depends on neither batch size nor number of processes.

    Subclasses say how the codebook `(K, D)` learns. All is computed in at least fp32, whatever
    autocast says outside: a search in bf16 gets about 1 % of the codes wrong.
    """

    by_gradient = False  # whether the codebook learns by gradient descent, not by `learn`
    codebook: Tensor
    counts: Tensor
    num_updates: Tensor

    def __init__(self, codebook_size: int, dim: int, config: QuantizerConfig | None = None) -> None:
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, dim
        self.config = config or QuantizerConfig()
        # Running average of the assignments per update.
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        codebook = self.normalize(torch.randn(codebook_size, dim))
        if self.by_gradient:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        # num_updates > 0, read once: reading it at every step would wait for the GPU.
        self._started: bool | None = None

    def forward(self, features: Tensor) -> Quantized:
        """Quantize `(B, D, h, w)`: [32, 16, 8, 8] is seen as 2048 vectors of dimension 16."""
        batch, _, height, _ = features.shape
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            vectors = self.normalize(rearrange(features, "b d h w -> (b h w) d"))
            constant = vectors.detach()
            if self.training:
                self._initialise_codebook(constant)

            # The nearest codes, and what the encoder and the codebook pay for the distance.
            megabytes, codebook = self.config.search_megabytes, self.codebook.to(features.dtype)
            codes = nearest(constant, codebook.detach(), megabytes=megabytes)  # (N,)
            embeddings = F.embedding(codes, codebook)  # (N, D)
            loss = self.config.beta * F.mse_loss(vectors, embeddings.detach())
            if self.by_gradient:
                loss = loss + F.mse_loss(embeddings, constant)

            # The decoder sees the embeddings, and its gradient reaches the features.
            passed = ESTIMATORS[self.config.estimator](vectors, embeddings.detach())
            if self.training:
                self._update(constant, codes)
        passed = rearrange(passed, "(b h w) d -> b d h w", b=batch, h=height)
        return Quantized(passed, rearrange(codes, "(b h w) -> b h w", b=batch, h=height), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def normalize(self, vectors: Tensor) -> Tensor:
        """What is done to vectors `(N, D)` before they are compared: nothing."""
        return vectors

    def learn(self, sums: Tensor) -> None:
        """Learn without gradients from the sum of each code's vectors `(K, D)` and `counts`."""

    @abstractmethod
    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """Put vectors `(K, D)` in the place of the dead codes `(K, 1)` (bool)."""

    @torch.no_grad()
    def _initialise_codebook(self, vectors: Tensor) -> None:
        if self._started is None:
            self._started = bool(self.num_updates > 0)
        if not self._started and self.config.start_from_data:
            # On a GPU sums are rounded in any order: each process's centres would differ.
            centres = k_means(gather_rows(vectors), self.codebook_size)
            self.codebook.copy_(from_main_process(self.normalize(centres)))
        self._started = True

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor) -> None:
        """One step of all that does not learn by gradient; never waits for a GPU."""
        if self.counts.dtype.itemsize < 4:
            what = f"the model's weights are {self.counts.dtype}, in which codebooks cannot learn"
            raise UserError(f"{what}: train in float32, with autocast (mixed_precision) for speed.")
        # One message between the processes: sums (K, D), candidates (K, D), counts (K, 1).
        sums, counts = sum_by_code(vectors, codes, self.codebook_size)
        message = torch.cat([sums, self._candidates(vectors), counts[:, None]], dim=1)
        widths = [self.code_dim, self.code_dim, 1]
        sums, candidates, counts = sum_over_processes(message).split(widths, dim=1)

        self.counts.lerp_(counts[:, 0], 1 - self.config.decay)
        self.learn(sums)
        if self.config.revival_threshold:
            dead = self.counts < self.config.revival_threshold * self.counts.mean()
            self.counts.copy_(torch.where(dead, self.counts.mean(), self.counts))
            self.replace(dead[:, None], candidates)
        self.num_updates += 1

    def _candidates(self, vectors: Tensor) -> Tensor:
        """A random vector of the joint batch for each code `(K, D)`; zero where another process's.

        The choice is a hash of (update, code), so every number of processes makes the same one.
        """
        number = len(vectors)
        chosen = random_integers(self.num_updates, self.codebook_size) % (number * world_size())
        chosen = chosen - rank() * number
        here = (chosen >= 0) & (chosen < number)
        return vectors[chosen.clamp(0, number - 1)] * here[:, None]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started = None


class GradientQuantizer(CodebookQuantizer):
    """Codes that descend the gradient of ||sg(z) - e||^2 (van den Oord et al. 2017, equation 3)."""

    by_gradient = True

    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """Overwrite the parameter's rows."""
        self.codebook.copy_(torch.where(dead, vectors, self.codebook))


class EMAQuantizer(CodebookQuantizer):
    """Each code is the mean of its latest features (van den Oord et al. 2017, appendix A.1).

        counts_k <- decay * counts_k + (1 - decay) * n_k    n_k vectors chose code k
        sums_k   <- decay * sums_k   + (1 - decay) * sum of them
        e_k      <- sums_k / counts_k

    Both averages start at zero, so their common bias (1 - decay^t) cancels in the quotient: after
    one step a code *is* the mean of its vectors. A code that no vector ever chose stays in place.
    """

    sums: Tensor

    def __init__(self, codebook_size: int, dim: int, config: QuantizerConfig | None = None) -> None:
        super().__init__(codebook_size, dim, config)
        self.register_buffer("sums", torch.zeros(codebook_size, dim))

    def learn(self, sums: Tensor) -> None:
        """One step of the averages."""
        self.sums.lerp_(sums, 1 - self.config.decay)
        self._divide()

    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """Make the vectors averages with the weight that `counts` gives them, so that they last."""
        self.sums.copy_(torch.where(dead, self.counts[:, None] * vectors, self.sums))
        self._divide()

    def _divide(self) -> None:
        tiny = torch.finfo(self.counts.dtype).tiny
        averages = self.normalize(self.sums / self.counts.clamp(min=tiny)[:, None])
        self.codebook.copy_(torch.where((self.counts > tiny)[:, None], averages, self.codebook))


class CosineQuantizer(EMAQuantizer):
    """Features and codes of length 1: the nearest code is the one at the smallest angle.

    Yu et al. 2022 (ViT-VQGAN, section 3.2) use it with codes of few dimensions, here `code_dims`.
    """

    def normalize(self, vectors: Tensor) -> Tensor:
        """Scale to length 1."""
        return F.normalize(vectors, dim=1)


class FSQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): dimension d is rounded to L_d values.

    Nothing can collapse. A code is the mixed-radix number of its digits, an integer below
    prod(L_d) like any other; embeddings lie in [-1, 1].
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, codebook_size: int, dim: int, config: QuantizerConfig | None = None) -> None:
        super().__init__()
        sizes = (config or QuantizerConfig()).fsq_levels
        assert (math.prod(sizes), len(sizes)) == (codebook_size, dim), "both follow from levels"
        self.codebook_size = codebook_size
        levels = torch.tensor(sizes)
        self.register_buffer("levels", levels, persistent=False)
        basis = torch.cat([torch.ones(1, dtype=torch.int64), levels[:-1].cumprod(dim=0)])
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize `(B, D, h, w)`, D the number of `fsq_levels`; there is no loss."""
        half, offset = self._interval()
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            vectors = rearrange(features, "b d h w -> b h w d")
            # Squash to the interval that rounds to L values (section 3.1 there).
            bounded = torch.tanh(vectors + torch.atanh(offset / half)) * half - offset
            digits = bounded.round().detach()
            codes = ((digits.long() + self.levels // 2) * self.basis).sum(dim=-1)
            embeddings = straight_through(bounded, digits) / (self.levels // 2)
        return Quantized(rearrange(embeddings, "b h w d -> b d h w"), codes, vectors.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""
        digits = codes[..., None] // self.basis % self.levels
        return rearrange((digits - self.levels // 2) / (self.levels // 2), "b h w d -> b d h w")

    def features_of(self, codes: Tensor) -> Tensor:
        """Features `(B, D, h, w)` that are squashed to the values of the codes `(B, h, w)`."""
        half, offset = self._interval()
        bounded = rearrange(self.lookup(codes), "b d h w -> b h w d") * (self.levels // 2)
        vectors = torch.atanh((bounded + offset) / half) - torch.atanh(offset / half)
        return rearrange(vectors, "b h w d -> b d h w")

    def _interval(self) -> tuple[Tensor, Tensor]:
        """Half of the interval's width, and its distance below zero, `(D,)` each.

        Symmetric for an odd L, half a step lower for an even one.
        """
        half = (self.levels - 1) * (1 + 1e-3) / 2
        return half, torch.where(self.levels % 2 == 0, 0.5, 0.0)


QUANTIZERS: dict[str, Callable[[int, int, QuantizerConfig], Quantizer]] = {
    "gradient": GradientQuantizer,
    "ema": EMAQuantizer,
    "cosine": CosineQuantizer,
    "fsq": FSQuantizer,
}


def make_quantizer(config: QuantizerConfig, codebook_size: int, code_dim: int) -> Quantizer:
    """The quantizer that the configuration names, for one level."""
    return QUANTIZERS[config.kind](codebook_size, code_dim, config)
