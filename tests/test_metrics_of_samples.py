"""The figures of a set of samples: against other programs, the definitions and known answers."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import (
    Moments,
    at_infinity,
    bootstrap,
    classifier_score,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbours,
)
from vqvae2.common.errors import UserError


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    figures = neighbours(real, fake)
    return figures.precision.mean().item(), figures.recall.mean().item()


def density_coverage(real: Tensor, fake: Tensor) -> tuple[float, float]:
    figures = neighbours(real, fake)
    return figures.density.mean().item(), figures.coverage.mean().item()


def gaussian(number: int, dim: int = 16, *, seed: int = 0, shift: float = 0) -> Tensor:
    """Rows `(number, dim)` with as many variances as there are columns."""
    noise = torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.2, 1, dim) + shift


def correlated(number: int, seed: int) -> Tensor:
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    return gaussian(number, seed=seed) @ mixing + seed


def test_moments_of_batches_are_those_of_all_rows_at_once() -> None:
    rows = correlated(500, 1) * 100 + 1000
    merged = Moments(16)
    for batch in (rows[:0], *rows[:301].split(64), rows[301:302], rows[:0], rows[302:]):
        merged.update(batch)
    assert merged.count == 500
    torch.testing.assert_close(merged.mean, rows.double().mean(dim=0), rtol=1e-12, atol=0)
    expected = torch.cov(rows.double().T)
    torch.testing.assert_close(merged.covariance, expected, rtol=1e-10, atol=1e-8)


def test_the_frechet_distance_of_shifted_and_scaled_gaussians_has_its_closed_form() -> None:
    one, other = Moments.of(gaussian(5000)), Moments.of(3 * gaussian(5000) + 2)
    expected = (other.mean - one.mean).square().sum() + one.covariance.trace() * (3 - 1) ** 2
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("number", [10, 300])
def test_identical_sets_have_no_distance_also_where_images_are_fewer_than_features(
    number: int,
) -> None:
    rows = gaussian(number, 64)
    assert frechet_distance(Moments.of(rows), Moments.of(rows)) < 1e-10
    value, _ = kernel_distance(rows, rows)
    assert value <= 0  # without bias: the pairs of an image with itself count on one side only
    assert precision_recall(rows, rows) == (1, 1)
    assert density_coverage(rows, rows)[1] == 1


@pytest.mark.usefixtures("stub_torchvision")
def test_the_distances_are_those_of_scipy_and_torchmetrics() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    a, b = correlated(400, 1), correlated(400, 2)
    one, other = Moments.of(a), Moments.of(b)
    root = linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    traces = one.covariance.trace() + other.covariance.trace() - 2 * np.trace(root)
    expected = (one.mean - other.mean).square().sum() + traces
    distance = frechet_distance(one, other)
    assert distance == pytest.approx(expected.item(), rel=1e-6)
    theirs = fid._compute_fid(one.mean, one.covariance, other.mean, other.covariance)
    assert distance == pytest.approx(theirs.item(), rel=1e-6)
    mmd = kid.poly_mmd(a.double(), b.double()).item()
    assert kernel_distance(a, b)[0] == pytest.approx(mmd, rel=1e-6)


@pytest.mark.usefixtures("stub_torchvision")
def test_the_score_is_that_of_torchmetrics() -> None:
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).double() * 3
    theirs = inception.InceptionScore(feature=torch.nn.Identity(), splits=1).set_dtype(torch.double)
    theirs.update(logits)
    score, _ = classifier_score(logits.softmax(dim=1), num_splits=1)
    assert score == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


@pytest.mark.usefixtures("stub_torchvision")
def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = gaussian(300).double(), gaussian(200, seed=1, shift=0.1).double()
    assert precision_recall(real, fake) == pytest.approx(
        prc.calculate_precision_recall_full(fake, real), rel=1e-6
    )


def test_the_kernel_distance_is_its_definition_and_knows_its_error() -> None:
    a, b = gaussian(60).double(), gaussian(40, seed=1, shift=0.2).double()
    kernels = [(x @ y.T / 16 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [k.fill_diagonal_(0).sum() / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    expected = within[0] + within[1] - 2 * kernels[2].mean()
    assert kernel_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-12)

    # The spread over sets that are drawn again, and the same in several blocks.
    results = []
    for seed in range(20):
        results.append(kernel_distance(gaussian(200, seed=seed), gaussian(200, seed=99, shift=0.2)))
    values, errors = np.array(results).T
    assert values.std() < errors.mean() < 3 * values.std()  # they hold one side fixed
    large = gaussian(1500), gaussian(1500, seed=1, shift=0.2)
    value, error = kernel_distance(*large)
    with mock.patch.object(metrics, "BLOCK", 500):
        in_blocks, error_of_blocks = kernel_distance(*large)
    assert abs(in_blocks - value) < 2 * error
    assert error_of_blocks == pytest.approx(error, rel=0.2)


def test_precision_and_recall_are_their_definitions_however_rows_are_chunked() -> None:
    real, fake = gaussian(70), gaussian(50, seed=1, shift=0.1)
    distances = [torch.cdist(x.double(), y.double()) for x, y in ((real,) * 2, (fake,) * 2)]
    near_real, near_fake = (d.sort(dim=1).values for d in distances)
    across = torch.cdist(fake.double(), real.double())
    with mock.patch.object(metrics, "CHUNK", 16):
        figures = neighbours(real, fake)
    assert figures.precision.equal((across <= near_real[:, 3]).any(dim=1).double())
    assert figures.recall.equal((near_fake[:, 3] >= across.T).any(dim=1).double())
    inside = across <= near_real[:, 5]
    assert figures.density.equal(inside.sum(dim=1).double() / 5)
    assert figures.coverage.equal(inside.any(dim=0).double())
    assert 0 < figures.recall.mean() < 1


def test_a_missing_class_lowers_recall_alone_and_noise_lowers_precision() -> None:
    centres = torch.eye(4, 16) * 20
    real = torch.cat([gaussian(60, seed=seed) + centre for seed, centre in enumerate(centres)])
    fake = torch.cat([gaussian(60, seed=9 + seed) + centre for seed, centre in enumerate(centres)])
    whole, missing = neighbours(real, fake), neighbours(real, fake[:180])
    assert missing.recall[:180].mean() == whole.recall[:180].mean() > 0.5
    assert missing.recall[180:].sum() == missing.coverage[180:].sum() == 0
    assert missing.precision.mean() > 0.5
    noise = 20 * torch.randn(240, 16, generator=torch.Generator().manual_seed(1))
    assert precision_recall(real, noise)[0] < 0.05
    assert density_coverage(real, noise)[0] < 0.05
    assert kernel_distance(real, noise)[0] > 100 * abs(kernel_distance(real, fake)[0])


def test_copies_are_at_distance_zero_from_what_they_copy() -> None:
    rows = gaussian(100) + 1000  # far from 0, where squares round most
    distances, indices = nearest(rows[[7, 3]], rows, k=2)
    assert (indices[:, 0].tolist(), distances[:, 0].tolist()) == ([7, 3], [0, 0])
    expected = torch.cdist(rows[[7]].double(), rows.double()).sort().values[0, 1]
    assert distances[0, 1].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_distance_at_infinity_is_that_of_the_distributions() -> None:
    real, samples = Moments.of(gaussian(50_000)), gaussian(400, seed=1, shift=0.1)
    value, error = at_infinity(real, samples)
    expected, biased = 16 * 0.1**2, frechet_distance(real, Moments.of(samples))
    assert abs(value - expected) < abs(biased - expected) / 2
    assert 0 < error < biased
    assert at_infinity(real, samples) == (value, error)


def test_the_score_counts_classes_that_are_told_apart() -> None:
    labels = torch.arange(1000) // 100  # in the order of their classes, as samples often are
    score, error = classifier_score(torch.eye(10)[labels])
    assert score == pytest.approx(10, rel=0.1)
    assert 0 < error < 0.5
    assert classifier_score(torch.full((50, 10), 0.1)) == (pytest.approx(1), pytest.approx(0))


def test_the_bootstrap_gives_the_interval_of_a_mean() -> None:
    values = gaussian(400, 1)[:, 0]
    low, high = bootstrap(values)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=half / 5)
    assert high == pytest.approx(values.mean().item() + half, abs=half / 5)
    assert bootstrap(values) == (low, high)


def test_statistics_are_kept_in_files_and_read_from_those_of_others(tmp_path: Path) -> None:
    moments, samples = Moments.of(gaussian(100)), Moments.of(gaussian(100, seed=1))
    facts = {"mu": moments.mean, "sigma": moments.covariance}
    np.savez(tmp_path / "own.npz", count=moments.count, **facts)
    own = Moments.from_npz(tmp_path / "own.npz")
    assert (own.count, frechet_distance(own, samples)) == (100, frechet_distance(moments, samples))
    np.savez(tmp_path / "theirs.npz", **facts)
    theirs = Moments.from_npz(tmp_path / "theirs.npz")
    assert frechet_distance(theirs, samples) == frechet_distance(moments, samples)


@pytest.mark.parametrize("arrays", [{"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.eye(4)}])
def test_a_file_that_holds_no_statistics_is_refused(tmp_path: Path, arrays: dict) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=r"x\.npz .*mu.*sigma"):
        Moments.from_npz(tmp_path / "x.npz")
    content = (tmp_path / "x.npz").read_bytes()
    for part in (content[:0], content[: len(content) // 2]):
        (tmp_path / "part.npz").write_bytes(part)
        with pytest.raises(UserError, match=r"part\.npz cannot be read"):
            Moments.from_npz(tmp_path / "part.npz")
    with pytest.raises(UserError, match=r"missing\.npz cannot be read"):
        Moments.from_npz(tmp_path / "missing.npz")


def test_sets_that_cannot_be_compared_are_refused() -> None:
    one, other = Moments.of(gaussian(9)), Moments.of(gaussian(9, 8))
    with pytest.raises(UserError, match=r"16 numbers per image .* 8: compare"):
        frechet_distance(one, other)
    with pytest.raises(UserError, match="two images at least"):
        frechet_distance(one, Moments.of(gaussian(1)))
    with pytest.raises(UserError, match="subsets of 2 images"):
        at_infinity(one, gaussian(2))
    with pytest.raises(UserError, match="have 9 and 2, give at least 3"):
        kernel_distance(gaussian(9), gaussian(2))
    with pytest.raises(UserError, match="there are 5 images, give at least 6"):
        neighbours(gaussian(5), gaussian(9))
