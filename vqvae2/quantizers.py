"""Quantizers: each vector of a feature map becomes the nearest entry of a learned codebook.

Letters: B batch, D code dimension, h w code grid, N = B*h*w vectors, K codebook size. sg() is stop-gradient.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.config import QuantizerConfig
from vqvae2.distributed import gather_rows, random_integers, rank, sum_over_processes, world_size

MOST_AT_ONCE = 4096  # vectors per matrix product: more is not faster
BLOCK = 64  # columns among which a maximum is searched first


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

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Quantize; in training mode the codebook learns."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""

    def features_of(self, codes: Tensor) -> Tensor:
        """Features `(B, D, h, w)` that are quantized to these codes `(B, h, w)` and to their embeddings without a rest: the embeddings themselves."""
        return self.lookup(codes)


def nearest(vectors: Tensor, codebook: Tensor, *, megabytes: float = 64.0) -> Tensor:
    """The index of the codebook entry nearest to each vector (van den Oord et al. 2017, equation 1).

    argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2), since |z|^2 is the same for all k: one matrix product. Both sides are first
    moved by the codebook's mean, which changes no distance: far from the origin the large squares would cancel and leave rounding.

    Args:
        vectors: `(N, D)`.
        codebook: `(K, D)`.
        megabytes: how much of the N x K products is held at once.

    Returns:
        `(N,)` int64.
    """
    centre = codebook.mean(dim=0)
    codebook = codebook - centre
    offset = -0.5 * codebook.square().sum(dim=1)
    bytes_per_vector = len(codebook) * codebook.element_size()
    chunk = min(MOST_AT_ONCE, max(1, int(megabytes * 2**20 / bytes_per_vector)))
    return torch.cat(
        [_argmax(_scores(part - centre, codebook, offset)) for part in vectors.split(chunk)]
    )


def _scores(vectors: Tensor, codebook: Tensor, offset: Tensor) -> Tensor:
    """`(N, D)` and `(K, D)` to the products of all pairs plus `offset` `(K,)`: `(N, K)`.

    On a CPU as a 1x1 convolution, which is the same sum; where oneDNN computes it, it was up to twice as fast as the matrix product.
    """
    if (
        vectors.device.type != "cpu"
        or vectors.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return torch.addmm(offset, vectors, codebook.T)
    pixels = vectors[None, :, None].permute(
        0, 3, 1, 2
    )  # (1, D, N, 1) with the strides of channels_last (rearrange gives others, which are slow)
    return F.conv2d(pixels, codebook[:, :, None, None], offset)[0, :, :, 0].T  # in memory (N, K)


def _argmax(scores: Tensor) -> Tensor:
    """The first index of each row's maximum, `(N, K)` to `(N,)`, in two steps: the block of columns, then the column in it.

    It equals `argmax`, whose inner loop is slower on a CPU than the search for a maximum alone.
    """
    if scores.device.type != "cpu" or scores.shape[1] % BLOCK:
        return scores.argmax(dim=1)
    blocks = rearrange(scores, "n (block column) -> n block column", column=BLOCK)
    best = blocks.amax(dim=2).argmax(dim=1)
    inside = blocks[torch.arange(len(scores)), best].argmax(dim=1)
    return best * BLOCK + inside


def straight_through(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """The value of the embeddings, with the gradient of the vectors: as if quantizing had changed nothing (Bengio et al. 2013). Both `(N, D)`."""
    return vectors + (embeddings - vectors).detach()


def rotation(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """The value of the embeddings, as a rotation and scaling of the vectors that are held constant for the gradient (Fifty et al. 2024, section 4.2).

    e = (|e|/|z|) R z with R = I - 2 r r^T + 2 e^ z^T, where z^ and e^ have length 1 and r = (z^ + e^) / |z^ + e^|. Both `(N, D)`.
    """
    with torch.no_grad():
        length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        scale = embeddings.norm(dim=1, keepdim=True) / length
        z, e = vectors / length, F.normalize(embeddings, dim=1)
        r = F.normalize(z + e, dim=1)
    turned = (
        vectors
        - 2 * r * (vectors * r).sum(dim=1, keepdim=True)
        + 2 * e * (vectors * z).sum(dim=1, keepdim=True)
    )
    return scale * turned


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook of K vectors, kept in good health.

    Start: k-means over the first batch's features of all processes; the averages of an `EMAQuantizer`, which begin at zero, then go on with
    it over the next batches.

    Revival: a code whose share of the assignments falls below `revival_threshold / K` is replaced by a feature of the current batch, and counts as
    used as often as the average code, so that it stays long enough to be found. A share depends on neither the batch size nor the number of processes.

    Subclasses own `self.codebook` `(K, D)`, say what it pays (`codebook_loss`) and how it learns otherwise (`learn`, `replace`).
    It computes in at least fp32, whatever autocast says outside: a search in bf16 gets about 1 % of the codes wrong.
    """

    codebook: Tensor
    counts: Tensor
    num_updates: Tensor

    def __init__(
        self, codebook_size: int, code_dim: int, config: QuantizerConfig | None = None
    ) -> None:
        super().__init__()
        self.codebook_size, self.code_dim, self.config = (
            codebook_size,
            code_dim,
            config or QuantizerConfig(),
        )
        self.register_buffer(
            "counts", torch.zeros(codebook_size)
        )  # running average of the assignments per update
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._started: bool | None = (
            None  # num_updates > 0, read once: asking the device at every step would stall it
        )

    def forward(self, features: Tensor) -> Quantized:
        """Quantize `(B, D, h, w)`: for example [16, 64, 8, 8] is seen as 1024 vectors of dimension 64."""
        batch, _, height, _ = features.shape
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            vectors = self.prepare(rearrange(features, "b d h w -> (b h w) d"))
            constant = vectors.detach()
            if self.training:
                self._start(constant)
            codes = nearest(
                constant, self.codebook.detach(), megabytes=self.config.search_megabytes
            )
            embeddings = F.embedding(codes, self.codebook)
            loss = self.config.beta * F.mse_loss(vectors, embeddings.detach()) + self.codebook_loss(
                constant, embeddings
            )
            passed = ESTIMATORS[self.config.estimator](vectors, embeddings.detach())
            if self.training:
                self._update(constant, codes)
        return Quantized(
            embeddings=rearrange(passed, "(b h w) d -> b d h w", b=batch, h=height),
            codes=rearrange(codes, "(b h w) -> b h w", b=batch, h=height),
            loss=loss,
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def prepare(self, vectors: Tensor) -> Tensor:
        """What is done to vectors `(N, D)` before they are compared: nothing."""
        return vectors

    @abstractmethod
    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """||sg(z) - e||^2 where the codebook learns by gradient, else 0. Vectors and embeddings are `(N, D)`."""

    @abstractmethod
    def learn(self, sums: Tensor) -> None:
        """What the codebook learns without gradients, from the sum of the vectors assigned to each code `(K, D)`; `counts` is up to date."""

    @abstractmethod
    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """Put vectors `(K, D)` in the place of the dead codes `(K, 1)` (bool)."""

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        if self._started is None:
            self._started = bool(self.num_updates > 0)
        if not self._started and self.config.start_from_data:
            self.codebook.copy_(self.prepare(k_means(gather_rows(vectors), self.codebook_size)))
        self._started = True

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor) -> None:
        """One step of all that does not learn by gradient, from the vectors of all processes. Nothing here asks the device for a value."""
        sums, counts = _sum_by_code(vectors, codes, self.codebook_size)
        together = sum_over_processes(
            torch.cat([sums, self._candidates(vectors), counts[:, None]], dim=1)
        )  # one message
        sums, candidates, counts = together.split([self.code_dim, self.code_dim, 1], dim=1)
        self.counts.lerp_(counts[:, 0], 1 - self.config.decay)
        self.learn(sums)
        if self.config.revival_threshold:
            dead = self.counts < self.config.revival_threshold * self.counts.mean()
            self.counts.copy_(torch.where(dead, self.counts.mean(), self.counts))
            self.replace(dead[:, None], candidates)
        self.num_updates += 1

    def _candidates(self, vectors: Tensor) -> Tensor:
        """One random vector of all processes for each code `(K, D)`: here those that this process holds, zero elsewhere.

        The choice is a hash of (update, code), the same on every process, and the joint batch of one process gives the same vectors.
        """
        number = vectors.shape[0]
        chosen = (
            random_integers(self.num_updates, self.codebook_size) % (number * world_size())
            - rank() * number
        )
        mine = (chosen >= 0) & (chosen < number)
        return vectors[chosen.clamp(0, number - 1)] * mine[:, None]

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self._started = None


class EMAQuantizer(CodebookQuantizer):
    """A codebook of running averages: each code is the mean of the features assigned to it lately (van den Oord et al. 2017, appendix A.1).

        counts_k <- decay * counts_k + (1 - decay) * n_k    n_k: number of vectors assigned to code k, over all processes
        sums_k   <- decay * sums_k   + (1 - decay) * sum of them
        e_k      <- sums_k / counts_k

    Both averages start at zero, so their common bias (1 - decay^t) cancels in the quotient: after one step a code *is* the mean of its
    vectors. A code that no vector has ever chosen keeps its place.
    """

    sums: Tensor

    def __init__(
        self, codebook_size: int, code_dim: int, config: QuantizerConfig | None = None
    ) -> None:
        super().__init__(codebook_size, code_dim, config)
        self.register_buffer("codebook", self.prepare(torch.randn(codebook_size, code_dim)))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))

    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """Nothing: the averages are the minimiser of the codebook loss."""
        return 0.0

    def learn(self, sums: Tensor) -> None:
        """One step of the averages."""
        self.sums.lerp_(sums, 1 - self.config.decay)
        self._set(self.counts)

    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """The vectors become the averages, with the weight that `counts` gives them: they survive the next steps."""
        self.sums.copy_(torch.where(dead, self.counts[:, None] * vectors, self.sums))
        self._set(self.counts)

    def _set(self, counts: Tensor) -> None:
        tiny = torch.finfo(counts.dtype).tiny
        averages = self.prepare(self.sums / counts.clamp(min=tiny)[:, None])
        self.codebook.copy_(torch.where((counts > tiny)[:, None], averages, self.codebook))


class CosineQuantizer(EMAQuantizer):
    """Running averages on the unit sphere: features and codes have length 1, and the nearest code is the one at the smallest angle.

    Yu et al. 2022 (ViT-VQGAN, section 3.2) use it with codes of few dimensions, here `code_dims`: the 1x1 convolution before the
    quantizer projects to them.
    """

    def prepare(self, vectors: Tensor) -> Tensor:
        """Scale to length 1."""
        return F.normalize(vectors, dim=1)


class GradientQuantizer(CodebookQuantizer):
    """A codebook that learns by gradient descent on ||sg(z) - e||^2 (van den Oord et al. 2017, equation 3, second term)."""

    codebook: nn.Parameter

    def __init__(
        self, codebook_size: int, code_dim: int, config: QuantizerConfig | None = None
    ) -> None:
        super().__init__(codebook_size, code_dim, config)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """||sg(z) - e||^2."""
        return F.mse_loss(embeddings, vectors)

    def learn(self, sums: Tensor) -> None:
        """Nothing: the optimizer moves the codebook."""

    def replace(self, dead: Tensor, vectors: Tensor) -> None:
        """Overwrite the parameter's rows."""
        self.codebook.copy_(torch.where(dead, vectors, self.codebook))


class FSQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): each dimension is squashed and rounded to one of L_d values. Nothing can collapse.

    A code is the mixed-radix number of its digits, so it is an integer below prod(L_d) like any other; embeddings lie in [-1, 1].
    """

    levels: Tensor
    basis: Tensor

    def __init__(
        self, codebook_size: int, code_dim: int, config: QuantizerConfig | None = None
    ) -> None:
        super().__init__()
        fsq_levels = (config or QuantizerConfig()).fsq_levels
        assert (math.prod(fsq_levels), len(fsq_levels)) == (codebook_size, code_dim), (
            "the configuration derives both from fsq_levels"
        )
        levels = torch.tensor(fsq_levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer(
            "basis",
            torch.cat([torch.ones(1, dtype=torch.int64), levels[:-1].cumprod(dim=0)]),
            persistent=False,
        )

    def forward(self, features: Tensor) -> Quantized:
        """Quantize `(B, D, h, w)`, D the number of levels; there is no loss."""
        with torch.autocast(features.device.type, enabled=False):
            vectors = rearrange(
                features.to(torch.promote_types(features.dtype, torch.float32)),
                "b d h w -> b h w d",
            )
            bounded = self._bound(vectors)
            digits = bounded.round().detach()
            codes = ((digits.long() + self.levels // 2) * self.basis).sum(dim=-1)
            embeddings = straight_through(bounded, digits) / (self.levels // 2)
        return Quantized(rearrange(embeddings, "b h w d -> b d h w"), codes, vectors.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""
        digits = codes[..., None] // self.basis % self.levels
        return rearrange((digits - self.levels // 2) / (self.levels // 2), "b h w d -> b d h w")

    def features_of(self, codes: Tensor) -> Tensor:
        """Features `(B, D, h, w)` that are squashed to exactly the values that the codes `(B, h, w)` stand for."""
        half, offset = self._interval()
        bounded = rearrange(self.lookup(codes), "b d h w -> b h w d") * (self.levels // 2)
        return rearrange(
            torch.atanh((bounded + offset) / half) - torch.atanh(offset / half),
            "b h w d -> b d h w",
        )

    def _bound(self, vectors: Tensor) -> Tensor:
        """Squash to the interval that rounds to L values (section 3.1 there)."""
        half, offset = self._interval()
        return torch.tanh(vectors + torch.atanh(offset / half)) * half - offset

    def _interval(self) -> tuple[Tensor, Tensor]:
        """Half of the interval's width and its distance below zero: symmetric for an odd L, half a step lower for an even one. `(D,)` each."""
        return (self.levels - 1) * (1 + 1e-3) / 2, torch.where(self.levels % 2 == 0, 0.5, 0.0)


QUANTIZERS: dict[str, Callable[[int, int, QuantizerConfig], Quantizer]] = {
    "ema": EMAQuantizer,
    "gradient": GradientQuantizer,
    "cosine": CosineQuantizer,
    "fsq": FSQuantizer,
}


def make_quantizer(config: QuantizerConfig, codebook_size: int, code_dim: int) -> Quantizer:
    """The quantizer that the configuration names, for one level."""
    return QUANTIZERS[config.kind](codebook_size, code_dim, config)


@torch.no_grad()
def k_means(vectors: Tensor, num_clusters: int, *, num_rounds: int = 10) -> Tensor:
    """Cluster centres `(K, D)` of vectors `(N, D)`: Lloyd's algorithm from K of the vectors. The same vectors give the same centres.

    With fewer vectors than clusters some centres are copies of each other.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    centres = vectors[
        order[torch.arange(num_clusters, device=vectors.device) % len(vectors)]
    ].clone()
    for _ in range(num_rounds):
        sums, counts = _sum_by_code(vectors, nearest(vectors, centres), num_clusters)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def _sum_by_code(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """The sum `(K, D)` and the number `(K,)` of the vectors `(N, D)` assigned to each code."""
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return sums, vectors.new_zeros(codebook_size).index_add_(
        0, codes, torch.ones_like(vectors[:, 0])
    )
