"""What quantizers promise: nearest codes, the papers' gradients, codebooks that stay in use."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vqvae2.common.metrics import Metrics
from vqvae2.config import QuantizerConfig
from vqvae2.nearest import argmax, k_means, nearest, neighbours
from vqvae2.quantizers import (
    CodebookQuantizer,
    CosineQuantizer,
    EMAQuantizer,
    GradientQuantizer,
    Quantizer,
    make_quantizer,
    rotation,
)

LEARNED = ["ema", "gradient", "cosine"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def started(quantizer: CodebookQuantizer, codebook: Tensor) -> CodebookQuantizer:
    """The quantizer with this codebook, past its start."""
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    quantizer._started = True
    return quantizer.train()


def of_kind(kind: str, **options: Any) -> Quantizer:
    """A quantizer with 60 codes of dimension 3."""
    return make_quantizer(QuantizerConfig(kind=kind, fsq_levels=(5, 4, 3), **options), 60, 3)  # type: ignore[arg-type]


def as_features(vectors: Tensor) -> Tensor:
    return rearrange(vectors, "(b h w) d -> b d h w", h=2, w=2)


def distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """All distances in float64."""
    return torch.cdist(vectors.double(), codebook.double())


# The search


def test_nearest_is_brute_force_in_float64() -> None:
    vectors, codebook = torch.randn(5000, 16), torch.randn(300, 16)
    expected = distances(vectors, codebook).argmin(dim=1)
    assert torch.equal(nearest(vectors, codebook, megabytes=0.1), expected)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (100.0, 1.0), (1e4, 10.0), (0.0, 1e4)])
def test_nearest_is_right_far_from_the_origin_and_for_huge_values(
    offset: float, scale: float
) -> None:
    """The chosen code is the nearest in float64, up to the rounding of the data itself."""
    vectors, codebook = (offset + scale * torch.randn(number, 64) for number in (2000, 1024))
    exact = distances(vectors, codebook)
    chosen = nearest(vectors, codebook)
    assert (chosen == exact.argmin(dim=1)).float().mean() > 0.999
    found = exact.gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(found, exact.min(dim=1).values, rtol=1e-6, atol=0)


def test_a_large_codebook_needs_no_large_matrix() -> None:
    vectors, codebook = torch.randn(500, 8), torch.randn(65_536, 8)
    in_pieces = nearest(vectors, codebook, megabytes=1)
    assert torch.equal(in_pieces, nearest(vectors, codebook, megabytes=1000))
    assert torch.equal(in_pieces, distances(vectors, codebook).argmin(dim=1))


@pytest.mark.parametrize("columns", [64, 512, 640, 100, 7])
def test_argmax_in_blocks_is_argmax_also_among_equals(columns: int) -> None:
    few_values = torch.randint(0, 3, (300, columns)).float()
    for scores in (torch.randn(300, columns), few_values, torch.zeros(5, columns)):
        assert torch.equal(argmax(scores), scores.argmax(dim=1))


def test_neighbours_are_the_nearest_other_codes() -> None:
    codebook = torch.randn(300, 16)
    order = distances(codebook, codebook).argsort(dim=1)
    assert torch.equal(neighbours(codebook, 5), order[:, 1:6])


def test_k_means_finds_clusters() -> None:
    centres = 10 * torch.eye(4)
    vectors = (centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, 4))[torch.randperm(400)]
    assert torch.cdist(vectors, k_means(vectors, 8)).min(dim=1).values.max() < 1


# A codebook of running averages


def test_two_ema_steps_by_hand_with_a_code_that_the_batch_misses() -> None:
    """Before: e_0 = (0, 0), e_1 = (10, 0), e_2 = (0, 10). Nothing is near e_2."""
    settings = QuantizerConfig(decay=0.9, revival_threshold=0)
    codebook = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    quantizer = started(EMAQuantizer(3, 2, settings), codebook)
    result = quantizer(as_features(torch.tensor([[1.0, 0], [3, 0], [9, 1], [0, 2]])))
    assert result.codes.flatten().tolist() == [0, 0, 1, 0]

    # First step: used codes are the means of their vectors, the missed one stays.
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[4 / 3, 2 / 3], [9, 1], [0, 10]]))
    torch.testing.assert_close(quantizer.counts, torch.tensor([0.3, 0.1, 0.0]))

    # Second step, all four at (2, 0): code 0 is 0.9 * (0.4, 0.2) + 0.1 * (8, 0) over
    # 0.9 * 0.3 + 0.1 * 4.
    quantizer(as_features(torch.tensor([[2.0, 0]] * 4)))
    expected = torch.tensor([[1.16 / 0.67, 0.18 / 0.67], [9, 1], [0, 10]])
    torch.testing.assert_close(quantizer.codebook, expected)


def test_after_one_step_used_codes_are_means_and_unused_ones_stay_in_range() -> None:
    quantizer = started(EMAQuantizer(64, 8), torch.randn(64, 8))
    vectors = torch.randn(16, 8)  # far fewer than codes
    codes = quantizer(as_features(vectors)).codes.flatten()
    for code in codes.unique():
        mean = vectors[codes == code].mean(dim=0)
        torch.testing.assert_close(quantizer.codebook[code], mean, atol=1e-6, rtol=0)
    assert quantizer.codebook.norm(dim=1).max() <= vectors.norm(dim=1).max() + 1e-6


def test_fewer_vectors_than_codes_still_converges() -> None:
    points = torch.randn(6, 4)
    quantizer = EMAQuantizer(128, 4)
    for _ in range(200):
        result = quantizer(as_features(points[torch.randint(0, 6, (8,))]))
    assert F.mse_loss(quantizer.lookup(result.codes), result.embeddings).item() < 1e-6


def test_constant_input_neither_explodes_nor_loops() -> None:
    quantizer = EMAQuantizer(16, 4)
    for _ in range(20):
        quantizer(torch.ones(2, 4, 4, 4))
    torch.testing.assert_close(quantizer.codebook, torch.ones(16, 4))


def test_cosine_codes_have_length_one_and_ignore_the_length_of_features() -> None:
    quantizer = of_kind("cosine")
    for _ in range(3):
        quantizer(torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(60))
    features = torch.randn(8, 3, 4, 4)
    assert torch.equal(quantizer.eval()(features).codes, quantizer(100 * features).codes)


# Start and revival


def test_nothing_moves_in_evaluation() -> None:
    quantizer = EMAQuantizer(4, 2).eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 2, 3, 3))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_the_start_is_skipped_after_loading() -> None:
    first, second = EMAQuantizer(4, 2), EMAQuantizer(4, 2)
    first(torch.randn(2, 2, 3, 3))
    second.load_state_dict(first.state_dict())
    codebook = second.codebook.clone()
    second._initialise_codebook(torch.randn(18, 2))
    assert torch.equal(second.codebook, codebook)


def test_revived_codes_are_current_features_and_survive() -> None:
    far_away = torch.full((8, 2), 1e3) + torch.arange(8.0)[:, None]
    quantizer = started(EMAQuantizer(8, 2), far_away)
    vectors = torch.randn(64, 2)
    quantizer(as_features(vectors))
    revived = distances(quantizer.codebook, vectors).min(dim=1).values < 1e-5
    assert revived.sum() >= 7
    for _ in range(50):
        quantizer(as_features(torch.randn(64, 2)))
    assert len(quantizer(as_features(torch.randn(256, 2))).codes.unique()) == 8


def test_revival_does_not_depend_on_the_batch_size() -> None:
    """The same shares at 10 times the vectors revive the same codes."""
    codebook = 10 * torch.randn(32, 4)
    vectors = codebook[torch.randint(0, 20, (64,))]
    small, large = (started(EMAQuantizer(32, 4), codebook) for _ in range(2))
    small(as_features(vectors))
    large(as_features(vectors.repeat(10, 1)))
    moved, moved_too = ((q.codebook - codebook).norm(dim=1) > 1e-3 for q in (small, large))
    assert torch.equal(moved, moved_too)
    assert moved.any()


@pytest.mark.parametrize("kind", LEARNED)
def test_start_and_revival_can_be_turned_off(kind: str) -> None:
    plain, healthy = of_kind(kind, start_from_data=False, revival_threshold=0.0), of_kind(kind)
    before, features = plain.codebook.detach().clone(), 0.01 * torch.randn(2, 3, 2, 2)
    used = plain(features).codes.flatten()
    unused = torch.ones(60, dtype=torch.bool).index_fill(0, used, False)
    torch.testing.assert_close(plain.codebook[unused], before[unused])
    healthy(features)
    assert not torch.allclose(healthy.codebook[unused], before[unused])


# Losses and gradients


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_losses_and_gradients_by_hand(beta: float) -> None:
    features, codebook = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4)
    settings = QuantizerConfig(beta=beta, revival_threshold=0)
    quantizer = started(GradientQuantizer(5, 4, settings), codebook)
    result = quantizer(features)
    embeddings = rearrange(codebook[result.codes], "b h w d -> b d h w")
    distance = F.mse_loss(features, embeddings).item()
    assert result.loss.item() == pytest.approx((1 + beta) * distance, rel=1e-5)

    # The encoder pays beta, the codebook 1.
    result.loss.backward()
    towards_code = 2 * (features.detach() - embeddings) / features.numel()
    torch.testing.assert_close(features.grad, beta * towards_code)
    code = int(result.codes[0, 0, 0])
    chosen = rearrange(features.detach(), "b d h w -> b h w d")[result.codes == code]
    towards_features = 2 * (codebook[code] - chosen).sum(dim=0) / features.numel()
    torch.testing.assert_close(quantizer.codebook.grad[code], towards_features)

    ema = started(EMAQuantizer(5, 4, settings), codebook)
    assert ema(features).loss.item() == pytest.approx(beta * distance, rel=1e-5)


def test_straight_through_passes_the_gradient_on() -> None:
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantizer = started(EMAQuantizer(5, 4), torch.randn(5, 4)).eval()
    result = quantizer(features)
    torch.testing.assert_close(result.embeddings, quantizer.lookup(result.codes))
    weights = torch.randn_like(features)
    (result.embeddings * weights).sum().backward()
    torch.testing.assert_close(features.grad, weights)


def test_rotation_is_the_rotation_that_the_paper_names() -> None:
    vectors, embeddings, weights = torch.randn(3, 7, 5, dtype=torch.float64)
    vectors.requires_grad_()
    result = rotation(vectors, embeddings)
    torch.testing.assert_close(result, embeddings)
    (result * weights).sum().backward()
    for z, e, w, gradient in zip(vectors.detach(), embeddings, weights, vectors.grad, strict=True):
        # The matrix from the formula; a rotation and scaling that maps the feature to its code.
        z1, e1 = z / z.norm(), e / e.norm()
        r = (z1 + e1) / (z1 + e1).norm()
        identity, scale = torch.eye(5, dtype=z.dtype), e.norm() / z.norm()
        matrix = scale * (identity - 2 * torch.outer(r, r) + 2 * torch.outer(e1, z1))
        torch.testing.assert_close(matrix @ z, e)
        torch.testing.assert_close(matrix @ matrix.T, scale**2 * identity)
        torch.testing.assert_close(gradient, matrix.T @ w)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_reach_the_features(kind: str, estimator: str) -> None:
    quantizer = of_kind(kind, estimator=estimator)
    features = torch.randn(4, 3, 4, 4, requires_grad=True)
    result = quantizer(features)
    (result.embeddings * torch.randn_like(features)).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert (features.grad.abs().sum(dim=1) > 0).all()


# All kinds


@pytest.mark.parametrize("kind", [*LEARNED, "fsq"])
def test_all_kinds_have_one_interface(kind: str) -> None:
    quantizer = of_kind(kind)
    features = 2 * torch.randn(8, 3, 4, 5)
    quantizer(features)  # starts a codebook
    result = quantizer.eval()(features)
    assert result.codes.shape == (8, 4, 5)
    assert result.codes.dtype == torch.int64
    assert 0 <= result.codes.min() <= result.codes.max() < 60
    torch.testing.assert_close(quantizer.lookup(result.codes), result.embeddings)
    assert result.loss.shape == ()


def test_every_fsq_code_survives_the_way_to_features_and_back() -> None:
    quantizer, every = of_kind("fsq"), torch.arange(60).reshape(1, 6, 10)
    assert torch.equal(quantizer(quantizer.features_of(every)).codes, every)
    # By hand: what is squashed to these values (Mentzer et al. 2023, section 3.1).
    levels = torch.tensor([5, 4, 3])[:, None, None]
    half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
    bounded = (quantizer.lookup(every) * (levels // 2) + offset) / half
    unsquashed = torch.atanh(bounded) - torch.atanh(offset / half)
    assert torch.equal(quantizer(unsquashed).codes, every)


@pytest.mark.parametrize("kind", [EMAQuantizer, GradientQuantizer, CosineQuantizer])
def test_fp32_inside_bf16_outside(kind: type[CodebookQuantizer]) -> None:
    quantizer = kind(32, 8)
    features = 1e4 * torch.randn(4, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(features.bfloat16())
    assert result.embeddings.dtype == torch.float32
    assert torch.isfinite(result.loss)
    for name, tensor in quantizer.state_dict().items():
        assert torch.isfinite(tensor).all(), name


def test_counts_of_several_processes_are_sums_however_often_they_are_reduced(
    tmp_path: Path,
) -> None:
    """Saving and validating reduce what the next line of metrics.jsonl will say."""
    seen: list[float] = []

    def describe(step: int, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
        seen.extend(sums["assignments_0"].tolist())
        return {"loss": sums["loss"].item() / count}

    accelerator: Any = mock.MagicMock(num_processes=2, is_main_process=True)
    accelerator.reduce = lambda sums, reduction: sums  # both processes have counted the same
    metrics = Metrics(
        tmp_path,
        accelerator,
        SimpleNamespace(batch_size=1, gradient_accumulation_steps=1),
        describe,
    )
    metrics._start_clock()
    with mock.patch("vqvae2.common.metrics.on_main_process", lambda _, work: work()):
        for step in range(3):
            metrics.add({"loss": torch.ones(()), "assignments_0": torch.tensor([10, 0])})
            metrics.check_finite(step)
        assert metrics.write_means(3, 0.1)["loss"] == 1
    assert seen == [60, 0]
