"""Drawing from logits, and the linear layers of sampling."""

import math

import pytest
import torch

from prior.noise import Noise, gumbel, philox
from prior.packed_linear import can_pack, pack_linears
from prior.sampling import SamplingConfig, draw, image_seeds, probabilities
from vqvae2.common.errors import UserError


def words(*numbers: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([number]) for number in numbers)


def test_philox_gives_the_published_words() -> None:
    """The known answers of Random123 (Salmon et al. 2011) for Philox-4x32-10."""
    most, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answers = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((most,) * 4, (most,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (pi, (0xA4093822, 0x299F31D0)): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), answer in answers.items():
        found = philox(words(*counter), words(*key))
        assert " ".join(f"{int(word):08x}" for word in found) == answer


def noise_of(seeds: range, *, level: int = 0, positions: int = 8, size: int = 256) -> torch.Tensor:
    places = torch.arange(positions).repeat(len(seeds), 1)
    return gumbel(torch.tensor(seeds), level, places, size)


def test_noise_is_gumbel_and_that_of_neighbours_is_independent() -> None:
    """Uniform in each of 64 parts, and not correlated with what lies beside it."""
    noise = noise_of(range(64))  # (64, 8, 256)
    uniform = torch.exp(-torch.exp(-noise.double()))
    counts = torch.histc(uniform, 64, 0, 1)
    expected = noise.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    others = {
        "seeds": noise_of(range(1, 65)),
        "levels": noise_of(range(64), level=1),
        "positions": noise.roll(1, dims=1),
        "codes": noise.roll(1, dims=2),
    }
    centred = noise - noise.mean()
    for name, other in others.items():
        correlation = (centred * (other - other.mean())).mean() / centred.square().mean()
        assert abs(correlation) < 5 / noise.numel() ** 0.5, name
    large = noise_of(range(2**40, 2**40 + 2), positions=1)  # all 64 bits of a seed count
    assert not torch.equal(large, noise_of(range(2), positions=1))


def test_noise_made_ahead_is_the_same_noise() -> None:
    seeds = torch.tensor([3, 4, 5])
    noise, everything = (
        Noise(seeds, 1, 64, 10),
        noise_of(range(3, 6), level=1, positions=64, size=10),
    )
    generator = torch.Generator().manual_seed(0)
    starts = torch.zeros(3, dtype=torch.int64)
    while int(starts.max()) < 60:
        places = starts[:, None] + torch.arange(4)
        assert torch.equal(noise.at(places), everything[torch.arange(3)[:, None], places])
        starts = starts + torch.randint(1, 5, (3,), generator=generator)


def test_rare_codes_come_as_often_as_they_should() -> None:
    """p = 1e-6 in fp32: the numbers that decide over it lie where fp32 is fine."""
    places, size = torch.arange(2**18)[None], 16
    logits = torch.full((size,), -torch.inf)
    logits[0], logits[5] = 0.0, math.log(1e-6)
    found = 0
    for seed in range(40):
        noise = gumbel(torch.tensor([seed]), 0, places, size)[0]
        found += int((draw(logits.expand(len(noise), -1), noise, SamplingConfig()) == 5).sum())
    expected = 40 * 2**18 * 1e-6
    assert abs(found - expected) < 4 * expected**0.5


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(50, 20)
    drawn = draw(logits, torch.randn(50, 20), SamplingConfig(temperature=0))
    assert torch.equal(drawn, logits.argmax(1))


def test_frequencies_are_the_probabilities() -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(6).expand(40_000, 6), noise_of(range(5000), size=6).flatten(0, 1)
    for how in (
        SamplingConfig(temperature=1.3),
        SamplingConfig(top_k=4),
        SamplingConfig(top_p=0.8),
    ):
        frequencies = torch.bincount(draw(logits, noise, how), minlength=6) / 40_000
        expected = probabilities(logits[0], how).float()
        torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)
        assert not frequencies[expected == 0].any()


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


def test_a_row_that_is_not_finite_gives_no_code() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan], [0.0, torch.inf], [-torch.inf] * 2])
    for temperature in (0.0, 1.0):
        how = SamplingConfig(temperature=temperature)
        assert draw(logits, torch.zeros(4, 2), how).tolist() == [1, 2, 2, 2]


def test_random_numbers_belong_to_the_image() -> None:
    seeds = image_seeds(3, 0, 8)
    assert image_seeds(3, 5, 2) == seeds[5:7]
    assert len({*seeds, *image_seeds(4, 0, 8)}) == 16


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": 1e-42}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}]
)
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
