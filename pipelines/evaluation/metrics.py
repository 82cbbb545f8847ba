"""How near a set of images is to another: figures over features `(N, D)`, in float64.

Features may be of any type; distances are worked out in chunks of rows, so that the memory does not
grow with the square of the number of images.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.errors import UserError

CHUNK = 256  # rows of a matrix of distances that are held at a time
BLOCK = 10_000  # rows that are compared in pairs: KID's work grows with their square


class Moments:
    """Count, mean `(D,)` and covariance `(D, D)` of features, accumulated batch by batch.

    The covariance divides by count - 1. A count of 0 beside a covariance, from a file that another
    program has written, means that nobody knows it.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.covariance = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Those of all rows of `(N, D)`."""
        moments = cls(features.shape[1])
        for rows in features.split(CHUNK):
            moments.update(rows)
        return moments

    def update(self, features: Tensor) -> None:
        """Add a batch `(B, D)`."""
        if not len(features):
            return
        rows = features.detach().double().cpu()
        count, mean = len(rows), rows.mean(dim=0)
        centred = rows - mean
        scatter = centred.T @ centred  # not divided by anything yet
        # Chan, Golub and LeVeque 1983, equation 2.1.
        total, shift = self.count + count, mean - self.mean
        scatter = scatter + self.covariance * (self.count - 1)
        scatter = scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.covariance = scatter / max(total - 1, 1)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @classmethod
    def from_npz(cls, path: Path) -> Self:
        """Those of a file as pytorch-fid and others write it, too.

        Raises:
            UserError: no such file, or one without a fitting `mu` and `sigma`.
        """
        moments = cls(0)
        try:
            with np.load(path) as arrays:
                moments.mean = torch.from_numpy(np.asarray(arrays["mu"], dtype=np.float64))
                moments.covariance = torch.from_numpy(np.asarray(arrays["sigma"], np.float64))
                moments.count = int(arrays["count"]) if "count" in arrays else 0
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
            reason = type(error).__name__  # NumPy's own words advise to run what a file may hold
            raise UserError(
                f"{path} cannot be read as statistics ({reason}): give an .npz file with mu (D,) "
                "and sigma (D, D)."
            ) from None
        shape = tuple(moments.covariance.shape)
        finite = moments.covariance.isfinite().all() and moments.mean.isfinite().all()
        if shape != (*moments.mean.shape, *moments.mean.shape) or len(shape) != 2 or not finite:
            raise UserError(
                f"{path} has mu {tuple(moments.mean.shape)} and sigma {shape}, but finite numbers "
                "(D,) and (D, D) are expected: make the file again."
            )
        return moments


# The Frechet distance


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) (Heusel et al. 2017, equation 6).

    Raises:
        UserError: the two have different numbers of features, or fewer than two images.
    """
    return _frechet_distance(a, _root(a), b)


def at_infinity(
    real: Moments, features: Tensor, *, num_points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """The Frechet distance that infinitely many samples would have, and its standard error.

    The distance of n samples is linear in 1 / n (Chong and Forsyth 2020, section 3): a line through
    those of random subsets of `features` `(N, D)`, from half of them to all. What the number of
    real images adds stays in it; of samples that are some of them, it lies below 0.
    """
    if len(features) < 3:
        raise UserError(
            f"a line through subsets of {len(features)} images says nothing: give more."
        )
    root, generator = _root(real), torch.Generator().manual_seed(seed)
    distances: list[float] = []
    sizes = np.linspace(max(len(features) / 2, 2), len(features), num_points).astype(int)
    for size in sizes:
        rows = torch.randperm(len(features), generator=generator)[: int(size)]
        distances.append(_frechet_distance(real, root, Moments.of(features[rows])))
    (_, height), covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
    return float(height), float(covariance[1, 1] ** 0.5)


def _frechet_distance(a: Moments, root: Tensor, b: Moments) -> float:
    """`root`: of the first covariance.

    (A B)^1/2 has the trace of (R^T B R)^1/2 with A = R R^T, which is symmetric: its eigenvalues are
    real, and those that rounding made of zeros are known by the rank.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the features of one side are {len(a.mean)} numbers per image and those of the other "
            f"{len(b.mean)}: compare what one extractor has made."
        )
    eigenvalues = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace = eigenvalues[-_rank(b) :].clamp(min=0).sqrt().sum()
    total = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return max((total - 2 * trace).item(), 0.0)


def _root(moments: Moments) -> Tensor:
    """R `(D, r)` with R R^T the covariance, of rank r."""
    eigenvalues, vectors = torch.linalg.eigh(moments.covariance)
    rank = _rank(moments)
    return vectors[:, -rank:] * eigenvalues[-rank:].clamp(min=0).sqrt()


def _rank(moments: Moments) -> int:
    """What the covariance of so few images can have at most."""
    if moments.count == 1 or (moments.count == 0 and not moments.covariance.any()):
        raise UserError("the Frechet distance compares sets of images: give two images at least.")
    return min(moments.count - 1, len(moments.mean)) if moments.count else len(moments.mean)


# The kernel distance


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The squared maximum mean discrepancy, without bias, and its standard error.

    KID with Inception: the kernel is (x.y / D + 1)^3 (Binkowski et al. 2018, section 4). Sets of
    more than `BLOCK` rows are shuffled and compared in blocks. The error is the jackknife's, over
    the rows of both.

    Raises:
        UserError: a set has too few images.
    """
    blocks = -(-max(len(a), len(b)) // BLOCK)
    if min(len(a), len(b)) < 3 * blocks:
        raise UserError(
            f"the kernel distance compares sets of images: they have {len(a)} and {len(b)}, give "
            f"at least {3 * blocks}."
        )
    generator = torch.Generator().manual_seed(0)
    parts_of: list[tuple[Tensor, ...]] = []
    for features in (a, b):
        order = torch.randperm(len(features), generator=generator)
        shuffled = features[order.to(features.device)] if blocks > 1 else features
        parts_of.append(shuffled.tensor_split(blocks))
    results = [_kernel_distance(*pair) for pair in zip(*parts_of, strict=True)]
    values, variances = zip(*results, strict=True)
    return sum(values) / blocks, sum(variances) ** 0.5 / blocks


def _kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The value and its variance, from the sums of the kernel matrices' rows and columns."""
    (aa, _), (bb, _), (ab, ba) = _kernel_sums(a, a), _kernel_sums(b, b), _kernel_sums(a, b)
    n, m = len(a), len(b)
    aa, bb = aa - _kernel_of_itself(a), bb - _kernel_of_itself(b)
    within_a, within_b = aa.sum() / (n * (n - 1)), bb.sum() / (m * (m - 1))
    value = within_a + within_b - 2 * ab.sum() / (n * m)

    # The values without each row of a, and without each row of b.
    without_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) + within_b
    without_a = without_a - 2 * (ab.sum() - ab) / ((n - 1) * m)
    without_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) + within_a
    without_b = without_b - 2 * (ab.sum() - ba) / ((m - 1) * n)
    variance = 0.0
    for without in (without_a, without_b):
        variance += without.var(correction=0).item() * (len(without) - 1)
    return value.item(), variance


def _kernel_of_itself(rows: Tensor) -> Tensor:
    return (rows.double().square().sum(dim=1) / rows.shape[1] + 1) ** 3


def _kernel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `(N,)` and `(M,)` of the rows and the columns of the kernel of `(N, D)` and `(M, D)`."""
    rows, columns = [], torch.zeros(len(b), dtype=torch.float64, device=b.device)
    others = b.double()
    for chunk in a.split(CHUNK):
        kernel = (chunk.double() @ others.T / a.shape[1] + 1) ** 3
        rows.append(kernel.sum(dim=1))
        columns += kernel.sum(dim=0)
    return torch.cat(rows), columns


# Neighbours


class Neighbours(NamedTuple):
    """Figures of single images, whose means are those of the sets."""

    precision: Tensor  # (F,) of the samples: whether it lies among the real images
    recall: Tensor  # (R,) of the real images: whether it lies among the samples
    density: Tensor  # (F,) of the samples: how closely real images stand around it, 1 as themselves
    coverage: Tensor  # (R,) of the real images: whether a sample is near it


def neighbours(real: Tensor, fake: Tensor, *, k: int = 3, k_density: int = 5) -> Neighbours:
    """What is near what, of features `(R, D)` and `(F, D)`: precision and recall (Kynkaanniemi et
    al. 2019), density and coverage, which outliers move less (Naeem et al. 2020, section 3).

    An image lies among others if it is in one of the balls around them that reach to their k-th
    nearest neighbours.

    Raises:
        UserError: a set has no more images than neighbours are asked for.
    """
    balls, held = _count_in_balls(fake, real, _radii(real, k, k_density))
    recall, _ = _count_in_balls(real, fake, _radii(fake, k))
    return Neighbours(
        precision=(balls[:, 0] > 0).double(),
        recall=(recall[:, 0] > 0).double(),
        density=balls[:, 1].double() / k_density,
        coverage=(held[1] > 0).double(),
    )


def nearest(rows: Tensor, others: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices `(N, k)` of the nearest of `others` `(M, D)`, ascending."""
    distances, indices = [], []
    for squares in _squared_distances(rows, others):
        values, places = squares.topk(k, dim=1, largest=False)
        distances.append(values.sqrt())
        indices.append(places)
    return torch.cat(distances), torch.cat(indices)


def _radii(features: Tensor, *ks: int) -> Tensor:
    """Squared distances `(N, number of ks)` to the k-th nearest of the other rows."""
    if len(features) <= max(ks):
        raise UserError(
            f"precision, recall, density and coverage look at {max(ks)} neighbours of each image: "
            f"there are {len(features)} images, give at least {max(ks) + 1}."
        )
    radii: list[Tensor] = []
    for squares in _squared_distances(features, features):
        ascending = squares.topk(max(ks) + 1, dim=1, largest=False).values  # the first is itself
        radii.append(ascending[:, list(ks)])
    return torch.cat(radii)


def _count_in_balls(points: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """How many balls hold each point `(P, n)`, and how many points each ball holds `(n, C)`, for n
    squared radii of each centre `(C, n)`."""
    balls, held = [], torch.zeros(radii.T.shape, dtype=torch.int64, device=radii.device)
    for squares in _squared_distances(points, centres):
        inside = [squares <= column for column in radii.T]
        balls.append(torch.stack([each.sum(dim=1) for each in inside], dim=1))
        held += torch.stack([each.sum(dim=0) for each in inside])
    return torch.cat(balls), held


def _squared_distances(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances `(chunk, M)` of each chunk of rows; copies have exactly 0."""
    shift = others.double().mean(dim=0)  # small numbers round less
    right = others.double() - shift
    lengths = right.square().sum(dim=1)
    for chunk in rows.split(CHUNK):
        left = chunk.double() - shift
        sums = left.square().sum(dim=1, keepdim=True) + lengths
        squares = sums - 2 * left @ right.T
        yield squares.masked_fill(squares < 1e-12 * sums, 0)  # nearer than float32 can tell


# Scores and intervals


def classifier_score(
    probabilities: Tensor, *, num_splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) of class probabilities `(N, classes)`, and its standard error.

    The inception score, if Inception's (Salimans et al. 2016, section 4): its mean over parts,
    which are drawn at random, as samples often stand in the order of their classes.
    """
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    scores: list[float] = []
    for rows in order.tensor_split(min(num_splits, len(order))):
        part = probabilities[rows.to(probabilities.device)].double()
        mean = part.mean(dim=0)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, mean)
        scores.append(divergence.sum(dim=1).mean().exp().item())
    error = np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return float(np.mean(scores)), float(error)


def bootstrap(values: Tensor, *, num_rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` `(N,)`, one for each image.

    Images are drawn again from those there are (Efron and Tibshirani 1993, chapter 13). For figures
    of neighbours the values are the single images' ones: drawing features would make copies, which
    are each other's neighbours.
    """
    generator = torch.Generator().manual_seed(seed)
    means: list[float] = []
    for _ in range(num_rounds):
        rows = torch.randint(len(values), (len(values),), generator=generator)
        means.append(values[rows].double().mean().item())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
