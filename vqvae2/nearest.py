"""Which code is nearest to each vector, and the sums and clusters that follow from it.

Letters: N vectors, D their dimension, K codebook size.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

VECTORS_AT_ONCE = 2048  # per matrix product on a CPU, where more leave its caches
BLOCK = 64  # columns among which a maximum is searched first


def nearest(vectors: Tensor, codebook: Tensor, *, megabytes: float = 64.0) -> Tensor:
    """The index of the codebook entry nearest to each vector (van den Oord et al. 2017, eq. 1).

    argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2), since |z|^2 is the same for all k: one
    matrix product. Both sides are first moved by the codebook's mean, which changes no distance:
    far from the origin the large squares would cancel and leave rounding errors.

    Args:
        vectors: `(N, D)`.
        codebook: `(K, D)`.
        megabytes: how much of the N x K products is held at once.

    Returns:
        `(N,)` int64.
    """
    return torch.cat([argmax(scores) for scores in _chunks(vectors, codebook, megabytes)])


def neighbours(codebook: Tensor, number: int) -> Tensor:
    """The entries nearest to each entry of a codebook `(K, D)`, itself aside: `(K, number)`."""
    with torch.autocast(codebook.device.type, enabled=False):
        scores = _chunks(codebook, codebook, 64.0)
        return torch.cat([chunk.topk(number + 1).indices[:, 1:] for chunk in scores])


def _chunks(vectors: Tensor, codebook: Tensor, megabytes: float) -> Iterator[Tensor]:
    """Scores `(n, K)`, the higher the nearer, of vectors `(N, D)`, n at once."""
    centre = codebook.mean(dim=0)
    codebook = codebook - centre
    offset = -0.5 * codebook.square().sum(dim=1)
    at_once = max(1, int(megabytes * 2**20 / codebook[:, 0].nbytes))
    if vectors.device.type == "cpu":
        at_once = min(VECTORS_AT_ONCE, at_once)
    for chunk in vectors.split(at_once):
        yield _scores(chunk - centre, codebook, offset)


def _scores(vectors: Tensor, codebook: Tensor, offset: Tensor) -> Tensor:
    """`(N, D)` and `(K, D)` to the products of all pairs plus `offset` `(K,)`: `(N, K)`.

    On a CPU as a 1x1 convolution, which is the same sum; where oneDNN computes it, it was up to
    twice as fast as the matrix product.
    """
    on_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    if not on_cpu or not torch.backends.mkldnn.is_available():
        return torch.addmm(offset, vectors, codebook.T)
    # (B, D, N / B, 1) with the strides of channels_last; rearrange gives others, which are slow.
    # From B = 16 on PyTorch takes oneDNN on one thread too.
    images = math.gcd(len(vectors), 16)
    pixels = vectors.view(images, -1, 1, vectors.shape[1]).permute(0, 3, 1, 2)
    scores = F.conv2d(pixels, codebook[:, :, None, None], offset)
    return scores.permute(0, 2, 3, 1).reshape(len(vectors), -1)  # a view: in memory it is (N, K)


def argmax(scores: Tensor) -> Tensor:
    """The first index of each row's maximum, `(N, K)` to `(N,)`.

    First the block of columns, then the column in it: equal to `Tensor.argmax`, whose inner loop
    is slower on a CPU than the search for a maximum alone (as is an index than an embedding).
    """
    if scores.device.type != "cpu" or scores.shape[1] % BLOCK:
        return scores.argmax(dim=1)
    blocks = rearrange(scores, "n (block column) -> n block column", column=BLOCK)
    block = blocks.amax(dim=2).max(dim=1).indices
    place = torch.arange(len(scores)) * blocks.shape[1] + block
    column = F.embedding(place, blocks.flatten(0, 1)).max(dim=1).indices
    return block * BLOCK + column


def k_means(vectors: Tensor, num_clusters: int, *, num_rounds: int = 10) -> Tensor:
    """Cluster centres `(K, D)` of vectors `(N, D)`: Lloyd's algorithm from K of the vectors.

    The same vectors give the same centres; with fewer vectors than clusters some are copies.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    first = order[torch.arange(num_clusters, device=vectors.device) % len(vectors)]
    centres = vectors[first].clone()
    for _ in range(num_rounds):
        sums, counts = sum_by_code(vectors, nearest(vectors, centres), num_clusters)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def sum_by_code(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """The sum `(K, D)` and the number `(K,)` of the vectors `(N, D)` assigned to each code."""
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    ones = torch.ones_like(vectors[:, 0])
    return sums, vectors.new_zeros(codebook_size).index_add_(0, codes, ones)
