"""Quantizers: each vector of a feature map becomes the nearest entry of a learned codebook.

Letters: B batch, D code dimension, h w code grid, N = B*h*w vectors, K codebook size. sg() is stop-gradient.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.config import VQVAE2Config


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


def nearest(vectors: Tensor, codebook: Tensor, *, chunk: int = 4096) -> Tensor:
    """The index of the codebook entry nearest to each vector (van den Oord et al. 2017, equation 1).

    argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2), since |z|^2 is the same for all k: one matrix product. It is done in chunks,
    so no N x K matrix is ever held.

    Args:
        vectors: `(N, D)`.
        codebook: `(K, D)`.

    Returns:
        `(N,)` int64.
    """
    offset = -0.5 * codebook.square().sum(dim=1)
    return torch.cat([torch.addmm(offset, part, codebook.T).argmax(dim=1) for part in vectors.split(chunk)])


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook of K vectors, which starts as a clustering of the first features that it sees.

    Subclasses own `self.codebook` `(K, D)`, say what the codebook pays (`codebook_loss`) and how else it learns (`learn`).
    It computes in at least fp32, whatever autocast says outside: in bf16 about 1 % of the assignments are wrong.
    """

    codebook: Tensor
    num_updates: Tensor

    def __init__(self, codebook_size: int, code_dim: int, *, beta: float = 0.25) -> None:
        super().__init__()
        self.codebook_size, self.code_dim, self.beta = codebook_size, code_dim, beta
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._started: bool | None = None  # num_updates > 0, read once: asking the device at every step would stall it

    def forward(self, features: Tensor) -> Quantized:
        """Quantize `(B, D, h, w)`: for example [16, 64, 8, 8] is seen as 1024 vectors of dimension 64."""
        batch, _, height, _ = features.shape
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            vectors = rearrange(features, "b d h w -> (b h w) d")
            if self.training:
                self._start(vectors.detach())
            codes = nearest(vectors.detach(), self.codebook.detach())
            embeddings = F.embedding(codes, self.codebook)
            loss = self.beta * F.mse_loss(vectors, embeddings.detach()) + self.codebook_loss(vectors.detach(), embeddings)
            # Straight-through: the value is the embedding, the gradient goes to the features as if nothing had happened.
            passed = vectors + (embeddings - vectors).detach()
            if self.training:
                self.learn(vectors.detach(), codes)
                self.num_updates += 1
        return Quantized(
            embeddings=rearrange(passed, "(b h w) d -> b d h w", b=batch, h=height),
            codes=rearrange(codes, "(b h w) -> b h w", b=batch, h=height),
            loss=loss,
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `(B, h, w)` to embeddings `(B, D, h, w)`."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    @abstractmethod
    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """||sg(z) - e||^2 where the codebook learns by gradient, else 0. Vectors and embeddings are `(N, D)`."""

    @abstractmethod
    def learn(self, vectors: Tensor, codes: Tensor) -> None:
        """Whatever the codebook learns without gradients, from vectors `(N, D)` and their codes `(N,)`."""

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        if self._started is None:
            self._started = bool(self.num_updates > 0)
        if not self._started:
            self.codebook.copy_(k_means(_gather(vectors), self.codebook_size))
            self._started = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self._started = None


class EMAQuantizer(CodebookQuantizer):
    """A codebook of running averages: each code is the mean of the features assigned to it lately (van den Oord et al. 2017, appendix A.1).

    counts_k <- decay * counts_k + (1 - decay) * n_k        n_k: number of vectors assigned to code k, over all processes
    sums_k   <- decay * sums_k   + (1 - decay) * sum of them
    e_k      <- sums_k / counts_k

    Both averages start at zero, so their common bias (1 - decay^t) cancels in the quotient: after one step a code *is* the mean of its
    vectors. A code that no vector has ever chosen keeps its place.

    A code whose share of the assignments falls below `revival_threshold / K` is replaced by a feature of the current batch, with the
    average code's count, so that it stays long enough to be found. A share does not depend on the batch size or the process count.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook_size: int, code_dim: int, *, beta: float = 0.25, decay: float = 0.99, revival_threshold: float = 0.03) -> None:
        super().__init__(codebook_size, code_dim, beta=beta)
        self.decay, self.revival_threshold = decay, revival_threshold
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))

    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """Nothing: the averages are the minimiser of the codebook loss."""
        return 0.0

    @torch.no_grad()
    def learn(self, vectors: Tensor, codes: Tensor) -> None:
        """One step of the averages, from the vectors of all processes."""
        ones = torch.ones_like(vectors[:, :1])
        totals = vectors.new_zeros(self.codebook_size, 1 + self.code_dim)
        totals.index_add_(0, codes, torch.cat([ones, vectors], dim=1))
        candidates = self._candidates(vectors)
        totals, candidates = _sum_over_processes(torch.cat([totals, candidates], dim=1)).split([1 + self.code_dim, self.code_dim], dim=1)
        self.counts.lerp_(totals[:, 0], 1 - self.decay)
        self.sums.lerp_(totals[:, 1:], 1 - self.decay)

        share, average = self.counts / self.counts.sum(), self.counts.mean()
        dead = (share < self.revival_threshold / self.codebook_size)[:, None]
        self.counts.copy_(torch.where(dead[:, 0], average, self.counts))
        self.sums.copy_(torch.where(dead, average * candidates, self.sums))
        tiny = torch.finfo(self.counts.dtype).tiny
        seen = (self.counts > tiny)[:, None]
        self.codebook.copy_(torch.where(seen, self.sums / self.counts.clamp(min=tiny)[:, None], self.codebook))

    def _candidates(self, vectors: Tensor) -> Tensor:
        """One random vector of all processes for each code `(K, D)`: here those that this process holds, zero elsewhere.

        The choice is a hash of (update, code), the same on every process, and the joint batch of one process gives the same vectors.
        """
        number, rank = vectors.shape[0], _rank()
        keys = self.num_updates * self.codebook_size + torch.arange(self.codebook_size, device=vectors.device)
        chosen = _mix(keys) % (number * _world_size()) - rank * number
        mine = (chosen >= 0) & (chosen < number)
        return vectors[chosen.clamp(0, number - 1)] * mine[:, None]


class GradientQuantizer(CodebookQuantizer):
    """A codebook that learns by gradient descent on ||sg(z) - e||^2 (van den Oord et al. 2017, equation 3, second term)."""

    codebook: nn.Parameter

    def __init__(self, codebook_size: int, code_dim: int, *, beta: float = 0.25) -> None:
        super().__init__(codebook_size, code_dim, beta=beta)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def codebook_loss(self, vectors: Tensor, embeddings: Tensor) -> Tensor | float:
        """||sg(z) - e||^2."""
        return F.mse_loss(embeddings, vectors)

    def learn(self, vectors: Tensor, codes: Tensor) -> None:
        """Nothing: the optimizer moves the codebook."""


def make_quantizer(config: VQVAE2Config, codebook_size: int, code_dim: int) -> Quantizer:
    """The quantizer that the configuration names, for one level."""
    if config.quantizer == "ema":
        return EMAQuantizer(codebook_size, code_dim, beta=config.beta, decay=config.ema_decay, revival_threshold=config.revival_threshold)
    return GradientQuantizer(codebook_size, code_dim, beta=config.beta)


@torch.no_grad()
def k_means(vectors: Tensor, num_clusters: int, *, num_rounds: int = 10) -> Tensor:
    """Cluster centres `(K, D)` of vectors `(N, D)`: Lloyd's algorithm from K of the vectors. The same vectors give the same centres.

    With fewer vectors than clusters some centres are copies of each other.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    centres = vectors[order[torch.arange(num_clusters, device=vectors.device) % len(vectors)]].clone()
    ones = torch.ones_like(vectors[:, :1])
    for _ in range(num_rounds):
        members = vectors.new_zeros(num_clusters, 1 + vectors.shape[1])
        members.index_add_(0, nearest(vectors, centres), torch.cat([ones, vectors], dim=1))
        number = members[:, :1]
        centres = torch.where(number > 0, members[:, 1:] / number.clamp(min=1), centres)
    return centres


# Collectives. Whether there is a process group is asked at every call: a model may be built before the group is.


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _gather(vectors: Tensor) -> Tensor:
    """The vectors of all processes in rank order, as one process would see the joint batch."""
    if _world_size() == 1:
        return vectors
    parts = [torch.empty_like(vectors, memory_format=torch.contiguous_format) for _ in range(_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)


def _mix(keys: Tensor) -> Tensor:
    """A non-negative hash of int64 keys (the finaliser of SplitMix64 with logical shifts; products wrap around)."""

    def shifted(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    keys = keys + 1
    keys = (keys ^ shifted(keys, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    keys = (keys ^ shifted(keys, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (keys ^ shifted(keys, 31)) & (2**63 - 1)
