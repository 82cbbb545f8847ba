"""What quantizers promise: nearest codes, gradients that go where the paper says, and codebooks that neither die nor explode."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from vqvae2.config import QuantizerConfig
from vqvae2.nearest import argmax, k_means, nearest
from vqvae2.quantizers import (
    CosineQuantizer,
    EMAQuantizer,
    FSQuantizer,
    GradientQuantizer,
    make_quantizer,
    rotation,
)


def started(quantizer, codebook):  # type: ignore[no-untyped-def]
    """The quantizer with this codebook, past its initialisation."""
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    quantizer._started = True
    return quantizer.train()


def as_features(vectors: torch.Tensor) -> torch.Tensor:
    return rearrange(vectors, "(b h w) d -> b d h w", h=2, w=2)


def test_nearest_is_brute_force_in_float64() -> None:
    torch.manual_seed(0)
    vectors, codebook = torch.randn(5000, 16), torch.randn(300, 16)
    assert torch.equal(
        nearest(vectors, codebook, megabytes=0.1),
        torch.cdist(vectors.double(), codebook.double()).argmin(1),
    )


def test_one_ema_step_by_hand_with_codes_that_the_batch_misses() -> None:
    """Before: e_0 = (0, 0), e_1 = (10, 0), e_2 = (0, 10). Nothing is near e_2."""
    quantizer = started(
        EMAQuantizer(3, 2, QuantizerConfig(decay=0.9, revival_threshold=0)),
        torch.tensor([[0.0, 0], [10, 0], [0, 10]]),
    )
    vectors = torch.tensor([[1.0, 0], [3, 0], [9, 1], [0, 2]])  # -> codes 0, 0, 1, 0
    result = quantizer(as_features(vectors))
    assert result.codes.flatten().tolist() == [0, 0, 1, 0]
    # First step: used codes are the means of their vectors, the missed one stays.
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[4 / 3, 2 / 3], [9, 1], [0, 10]]))
    torch.testing.assert_close(quantizer.counts, torch.tensor([0.3, 0.1, 0.0]))
    # Second step, all four at (2, 0): code 0's running sum is 0.9 * (0.4, 0.2) + 0.1 * (8, 0) over 0.9 * 0.3 + 0.1 * 4.
    quantizer(as_features(torch.tensor([[2.0, 0]] * 4)))
    torch.testing.assert_close(
        quantizer.codebook, torch.tensor([[1.16 / 0.67, 0.18 / 0.67], [9, 1], [0, 10]])
    )


def test_after_one_step_used_codes_are_means_and_unused_ones_stay_in_range() -> None:
    torch.manual_seed(0)
    quantizer = started(EMAQuantizer(64, 8), torch.randn(64, 8))
    vectors = torch.randn(16, 8)  # far fewer than codes
    codes = quantizer(as_features(vectors)).codes.flatten()
    for code in codes.unique():
        torch.testing.assert_close(
            quantizer.codebook[code], vectors[codes == code].mean(0), atol=1e-6, rtol=0
        )
    assert quantizer.codebook.norm(dim=1).max() <= vectors.norm(dim=1).max() + 1e-6


def test_revived_codes_are_current_features_and_survive() -> None:
    torch.manual_seed(0)
    quantizer = started(EMAQuantizer(8, 2), torch.full((8, 2), 1e3) + torch.arange(8.0)[:, None])
    vectors = torch.randn(64, 2)
    quantizer(as_features(vectors))
    revived = [
        k for k in range(8) if any(torch.allclose(quantizer.codebook[k], v) for v in vectors)
    ]
    assert len(revived) >= 7
    for _ in range(50):
        quantizer(as_features(torch.randn(64, 2)))
    assert len(quantizer(as_features(torch.randn(256, 2))).codes.unique()) == 8


def test_nothing_moves_in_evaluation() -> None:
    quantizer = EMAQuantizer(4, 2).eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 2, 3, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_losses_and_gradients_by_hand(beta: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    codebook = torch.randn(5, 4)

    quantizer = started(
        GradientQuantizer(5, 4, QuantizerConfig(beta=beta, revival_threshold=0)), codebook
    )
    result = quantizer(features)
    embeddings = rearrange(codebook[result.codes], "b h w d -> b d h w")
    distance = F.mse_loss(features, embeddings).item()
    assert result.loss.item() == pytest.approx((1 + beta) * distance, rel=1e-5)
    result.loss.backward()
    torch.testing.assert_close(
        features.grad, beta * 2 * (features.detach() - embeddings) / features.numel()
    )
    code = int(result.codes[0, 0, 0])
    chosen = rearrange(features.detach(), "b d h w -> b h w d")[result.codes == code]
    torch.testing.assert_close(
        quantizer.codebook.grad[code], 2 * (codebook[code] - chosen).sum(0) / features.numel()
    )

    ema = started(EMAQuantizer(5, 4, QuantizerConfig(beta=beta)), codebook)
    assert ema(features).loss.item() == pytest.approx(beta * distance, rel=1e-5)


def test_straight_through() -> None:
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantizer = started(EMAQuantizer(5, 4), torch.randn(5, 4)).eval()
    result = quantizer(features)
    torch.testing.assert_close(result.embeddings, quantizer.lookup(result.codes))
    weights = torch.randn_like(features)
    (result.embeddings * weights).sum().backward()
    torch.testing.assert_close(features.grad, weights)


@pytest.mark.parametrize("kind", [EMAQuantizer, GradientQuantizer, CosineQuantizer])
def test_fp32_inside_bf16_outside(kind: type) -> None:
    torch.manual_seed(0)
    quantizer = kind(32, 8)
    features = 1e4 * torch.randn(4, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(features.bfloat16())
    assert result.embeddings.dtype == torch.float32
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(tensor).all() for tensor in quantizer.state_dict().values())


def test_fewer_vectors_than_codes_still_converges() -> None:
    torch.manual_seed(0)
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


def test_k_means_finds_clusters() -> None:
    torch.manual_seed(0)
    centres = 10 * torch.eye(4)
    vectors = (centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, 4))[torch.randperm(400)]
    found = k_means(vectors, 8)
    assert torch.cdist(vectors, found).min(dim=1).values.max() < 1


def test_the_start_is_skipped_after_loading() -> None:
    first = EMAQuantizer(4, 2)
    first(torch.randn(2, 2, 3, 3))
    second = EMAQuantizer(4, 2)
    second.load_state_dict(first.state_dict())
    codebook = second.codebook.clone()
    second._start(torch.randn(18, 2))
    assert torch.equal(second.codebook, codebook)


KINDS = ["ema", "gradient", "cosine", "fsq"]


def of_kind(kind: str, **options):  # type: ignore[no-untyped-def]
    config = QuantizerConfig(kind=kind, fsq_levels=(5, 4, 3), **options)
    return make_quantizer(config, 60, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_has_one_interface(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = of_kind(kind)
    features = 2 * torch.randn(8, 3, 4, 5)
    quantizer(features)  # starts a codebook
    result = quantizer.eval()(features)
    assert result.codes.shape == (8, 4, 5)
    assert result.codes.dtype == torch.int64
    assert 0 <= result.codes.min() <= result.codes.max() < 60
    torch.testing.assert_close(quantizer.lookup(result.codes), result.embeddings)
    assert result.loss.shape == ()
    every = torch.arange(60).reshape(1, 6, 10)
    assert torch.equal(quantizer(quantizer_inverse(quantizer, every)).codes, every) or kind != "fsq"


def quantizer_inverse(quantizer, codes):  # type: ignore[no-untyped-def]
    """Features that should give these codes: the embeddings themselves, unsquashed for fsq."""
    embeddings = quantizer.lookup(codes)
    if not isinstance(quantizer, FSQuantizer):
        return embeddings
    levels = quantizer.levels[:, None, None]
    half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
    return torch.atanh((embeddings * (levels // 2) + offset) / half) - torch.atanh(offset / half)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
@pytest.mark.parametrize("kind", ["ema", "gradient", "cosine"])
def test_gradients_reach_the_features(kind: str, estimator: str) -> None:
    torch.manual_seed(0)
    quantizer = of_kind(kind, estimator=estimator)
    features = torch.randn(4, 3, 4, 4, requires_grad=True)
    result = quantizer(features)
    (result.embeddings * torch.randn_like(features)).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert (features.grad.abs().sum(dim=1) > 0).all()


def test_rotation_is_the_rotation_that_the_paper_names() -> None:
    torch.manual_seed(0)
    vectors, embeddings, weights = torch.randn(3, 7, 5, dtype=torch.float64)
    vectors.requires_grad_()
    result = rotation(vectors, embeddings)
    torch.testing.assert_close(result, embeddings)
    (result * weights).sum().backward()
    for z, e, w, gradient in zip(vectors.detach(), embeddings, weights, vectors.grad, strict=True):
        matrix = torch.autograd.functional.jacobian(
            lambda v, e=e, z=z: rotation_by_hand(z, e) @ v, z
        )
        torch.testing.assert_close(matrix @ z, e)  # it maps the feature to its code
        torch.testing.assert_close(
            matrix @ matrix.T, (e.norm() / z.norm()) ** 2 * torch.eye(5, dtype=torch.float64)
        )  # a scaled rotation
        torch.testing.assert_close(gradient, matrix.T @ w)


def rotation_by_hand(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The matrix, from the formula."""
    z1, e1 = z / z.norm(), e / e.norm()
    r = (z1 + e1) / (z1 + e1).norm()
    return (
        e.norm()
        / z.norm()
        * (torch.eye(5, dtype=z.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(e1, z1))
    )


def test_cosine_codes_have_length_one_and_ignore_the_length_of_features() -> None:
    torch.manual_seed(0)
    quantizer = of_kind("cosine")
    for _ in range(3):
        quantizer(torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(60))
    features = torch.randn(8, 3, 4, 4)
    assert torch.equal(quantizer.eval()(features).codes, quantizer(100 * features).codes)


@pytest.mark.parametrize("kind", ["ema", "gradient", "cosine"])
def test_health_can_be_turned_off(kind: str) -> None:
    torch.manual_seed(0)
    plain = of_kind(kind, start_from_data=False, revival_threshold=0.0)
    before = plain.codebook.detach().clone()
    result = plain(0.01 * torch.randn(2, 3, 2, 2))
    unused = torch.ones(60, dtype=torch.bool).index_fill(0, result.codes.flatten(), False)
    torch.testing.assert_close(plain.codebook[unused], before[unused])
    healthy = of_kind(kind)
    healthy(0.01 * torch.randn(2, 3, 2, 2))
    assert not torch.allclose(healthy.codebook[unused], before[unused])


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (100.0, 1.0), (1e4, 10.0), (0.0, 1e4)])
def test_nearest_on_hard_data(offset: float, scale: float) -> None:
    """Far from the origin, or huge: the distance to the chosen code is the smallest in float64, up to the rounding of the data itself."""
    torch.manual_seed(0)
    vectors, codebook = (offset + scale * torch.randn(number, 64) for number in (2000, 1024))
    distances = torch.cdist(vectors.double(), codebook.double())
    chosen = nearest(vectors, codebook)
    assert (chosen == distances.argmin(dim=1)).float().mean() > 0.999
    torch.testing.assert_close(
        distances.gather(1, chosen[:, None])[:, 0], distances.min(dim=1).values, rtol=1e-6, atol=0
    )


def test_a_large_codebook_needs_no_large_matrix() -> None:
    torch.manual_seed(0)
    vectors, codebook = torch.randn(500, 8), torch.randn(65_536, 8)
    small, whole = (
        nearest(vectors, codebook, megabytes=1),
        nearest(vectors, codebook, megabytes=1000),
    )
    assert torch.equal(small, whole)
    assert torch.equal(small, torch.cdist(vectors.double(), codebook.double()).argmin(dim=1))


def test_revival_does_not_depend_on_the_batch_size() -> None:
    """The same shares at 10 times the vectors revive the same codes."""
    torch.manual_seed(0)
    codebook = 10 * torch.randn(32, 4)
    vectors = codebook[torch.randint(0, 20, (64,))]
    small, large = (started(EMAQuantizer(32, 4), codebook) for _ in range(2))
    small(as_features(vectors))
    large(as_features(vectors.repeat(10, 1)))
    moved = [(quantizer.codebook - codebook).norm(dim=1) > 1e-3 for quantizer in (small, large)]
    assert torch.equal(*moved)
    assert moved[0].any()


@pytest.mark.parametrize("columns", [64, 512, 640, 100, 7])
def test_argmax_in_blocks_is_argmax_also_among_equals(columns: int) -> None:
    torch.manual_seed(0)
    for scores in (
        torch.randn(300, columns),
        torch.randint(0, 3, (300, columns)).float(),
        torch.zeros(5, columns),
    ):
        assert torch.equal(argmax(scores), scores.argmax(dim=1))
