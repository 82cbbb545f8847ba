"""Drawing from logits, and the linear layers of sampling."""

import pytest
import torch

from prior.packed_linear import can_pack, pack_linears
from prior.sampling import SamplingConfig, draw, image_seeds, probabilities, uniforms
from vqvae2.common.errors import UserError


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(50, 20)
    drawn = draw(logits, torch.rand(50), SamplingConfig(temperature=0))
    assert torch.equal(drawn, logits.argmax(1))


def test_frequencies_are_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6).expand(40_000, 6)
    drawn = draw(logits, torch.rand(40_000), SamplingConfig(temperature=1.3))
    frequencies, expected = (
        torch.bincount(drawn, minlength=6) / 40_000,
        (logits[0] / 1.3).softmax(0),
    )
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, 30)
    kept = probabilities(logits, SamplingConfig(top_p=top_p)) > 0
    for p, keep in zip(logits.double().softmax(1), kept, strict=True):
        assert p[keep].sum() >= top_p - 1e-9
        assert p[keep].sum() - p[keep].min() < top_p
        assert keep.all() or p[keep].min() >= p[~keep].max()


def test_top_k_keeps_k() -> None:
    kept = probabilities(torch.randn(20, 30), SamplingConfig(top_k=4)) > 0
    assert (kept.sum(1) == 4).all()


def test_extreme_uniforms_never_draw_an_impossible_code() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, 5)
    drawn = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), SamplingConfig())
    assert drawn.tolist() == [0, 3]


def test_random_numbers_belong_to_the_image() -> None:
    seeds = image_seeds(3, 0, 8)
    assert image_seeds(3, 5, 2) == seeds[5:7]
    assert len({*seeds, *image_seeds(4, 0, 8)}) == 16
    assert torch.equal(uniforms(seeds, 1, 10)[5:7], uniforms(seeds[5:7], 1, 10))
    assert not torch.equal(uniforms(seeds, 0, 10), uniforms(seeds, 1, 10))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingConfig(**bad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_packed_linears_are_the_linears(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 20, bias=False))
    network = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), inner)
    packed, x = pack_linears(network, 4, dtype), torch.randn(4, 7, 32)
    torch.testing.assert_close(packed(x), network(x), atol=tolerance, rtol=0)
    assert packed(x).dtype == torch.float32

    def number_of_linears(module: torch.nn.Module) -> int:
        return sum(isinstance(child, torch.nn.Linear) for child in module.modules())

    assert number_of_linears(network) == 2  # the original is as it was
    assert number_of_linears(packed) == 0 or not can_pack(dtype)
    double = network.double()  # what cannot be packed is a plain linear layer
    torch.testing.assert_close(pack_linears(double, 4, dtype)(x.double()), double(x.double()))
