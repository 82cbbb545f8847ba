"""What a prior promises: it never sees the future, but all of its condition; sampling is exact."""

import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from prior import (
    Known,
    PixelSNAIL,
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    Prior,
    SamplingConfig,
    TransformerConfig,
    TransformerPriorConfig,
)
from prior.attention import KVCache, attend, bf16_keys_pay
from prior.audit import audit
from prior.config import PriorConfig, TrainPriorConfig, TransformerOptions
from prior.cuda_graphs import (
    RecordedCalls,
    _warn_once,
    as_it_is,
    cuda_graph,
    fixed_stepper,
    fused,
)
from prior.dropout import add_dropped
from prior.manifest import Manifest
from prior.noise import Noise, gumbel
from prior.packed_linear import can_pack
from prior.predictive import Guesses, sample_codes
from prior.probes import fresh_copy
from prior.registry import FAMILIES, load_prior, make_prior
from prior.rms_norm import rms_norm
from prior.training import make_loss, prior_config
from prior.transformer import neighbour_slots
from tests.pretended_graph import pretended_graph
from vqvae2.common.errors import UserError

# Name -> facts: one level without and with classes, two and three levels, other vocabularies and
# stride ratios, not square.
ABC = ("a", "b", "c")
PRIORS: dict[str, dict] = {
    "top": {"grids": ((4, 5),), "codebook_sizes": (11,)},
    "top, classes": {"grids": ((4, 4),), "codebook_sizes": (11,), "class_names": ABC},
    "bottom": {"grids": ((2, 3), (4, 6)), "codebook_sizes": (17, 7)},
    "bottom, classes, ratio 4": {
        "grids": ((1, 2), (4, 8)),
        "codebook_sizes": (600, 512),
        "class_names": ABC,
    },
    "third of three, classes": {
        "grids": ((1, 1), (2, 2), (4, 4)),
        "codebook_sizes": (5, 6, 7),
        "class_names": ABC,
        "label_dropout": 0.1,
        "vector_size": 3,
        "views": ("flip", "top_left"),
    },
}
# Family -> a small network of it.
TRANSFORMER = TransformerConfig(
    width=32, num_layers=3, num_heads=2, num_condition_layers=1, dropout=0.0
)
FAMILY = {
    "transformer": TRANSFORMER,
    "transformer, window": dataclasses.replace(
        TRANSFORMER, num_layers=8, attention_rows=1, reads_neighbours=False
    ),
    "pixelsnail": PixelSNAILConfig(
        width=16,
        residual_channels=12,
        num_blocks=2,
        num_residual_blocks=2,
        num_heads=2,
        num_condition_blocks=1,
        num_output_blocks=1,
        dropout=0.0,
    ),
}
CONFIGS = {TransformerConfig: TransformerPriorConfig, PixelSNAILConfig: PixelSNAILPriorConfig}
BATCH, SEEDS = 3, [5, 6, 7]
each_prior = pytest.mark.parametrize("name", PRIORS)
each_family = pytest.mark.parametrize("family", FAMILY)
each_prior_with_condition = pytest.mark.parametrize(
    "name", [name for name, facts in PRIORS.items() if len(facts["grids"]) > 1]
)


def make(family: str, name: str = "", facts: dict | None = None, **network: int) -> Prior:
    """A prior of a family over the codes of that name, or with other facts."""
    facts, config_class = facts or PRIORS[name], CONFIGS[type(FAMILY[family])]
    sizes = dataclasses.replace(FAMILY[family], **network)
    return perturbed(config_class(level=len(facts["grids"]) - 1, network=sizes, **facts))


def perturbed(config: PriorConfig) -> Prior:
    """In evaluation mode, with larger weights than fresh ones: every path matters."""
    torch.manual_seed(0)
    prior = make_prior(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return prior.eval()


def inputs(prior: Prior) -> tuple[Tensor, list[Tensor], Tensor | None]:
    torch.manual_seed(1)
    sizes = zip(prior.config.codebook_sizes, prior.config.grids, strict=True)
    *condition, codes = [torch.randint(k, (BATCH, *grid)) for k, grid in sizes]
    if prior.config.vector_size:  # the last one's is hidden
        vectors = torch.randn(BATCH, prior.config.vector_size)
        condition.append(torch.cat([vectors[:-1], torch.full_like(vectors[:1], torch.nan)]))
    return codes, condition, torch.tensor([0, 1, 2]) if prior.config.num_classes else None


def codes_before(prior: Prior, codes: Tensor) -> Tensor:
    """The code before each position, `(T, B)`: what the steps are given."""
    return F.pad(codes.flatten(1)[:, :-1], (1, 0), value=prior.config.codebook_sizes[-1]).T


def changed_at(codes: Tensor, position: int, size: int) -> Tensor:
    """Other codes at one position of `(B, h, w)`, in raster order."""
    changed = codes.clone().flatten(1)
    changed[:, position] = (changed[:, position] + 1) % size
    return changed.view_as(codes)


@torch.no_grad()
def visible(prior: Prior) -> Tensor:
    """`(T, T)` bool: whether position t's logits change with the code at s, at `[t, s]`."""
    codes, condition, labels = inputs(prior)
    logits = prior(codes, condition, labels)
    columns = []
    for s in range(prior.config.num_positions):
        changed = changed_at(codes, s, prior.config.codebook_sizes[-1])
        moved = prior(changed, condition, labels) != logits  # (B, K, h, w)
        columns.append(moved.any(dim=1).any(dim=0).flatten())
    return torch.stack(columns, dim=1)


def everything_before(length: int) -> Tensor:
    """What `visible` gives for a prior that sees all earlier codes."""
    return torch.ones(length, length, dtype=torch.bool).tril(-1)


def loss_of(prior: Prior) -> Tensor:
    codes, condition, labels = inputs(prior)
    views = torch.arange(BATCH) if prior.config.views else None
    return F.cross_entropy(prior(codes, condition, labels, views), codes)


@torch.no_grad()
def assert_steps_are_the_forward(prior: Prior, tolerance: float = 1e-5) -> None:
    """With numbers for positions, and with tensors as CUDA graphs need them."""
    codes, condition, labels = inputs(prior)
    logits = prior(codes, condition, labels).flatten(2)
    eager = prior.make_stepper(BATCH, condition, labels)
    fixed = fixed_stepper(prior, prior.start(BATCH, condition, labels), compiled=False)
    for step in (eager, fixed):
        for position, before in enumerate(codes_before(prior, codes)):
            found, expected = take(step, position, before), logits[..., position]
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def take(step: Callable, position: int, before: Tensor) -> Tensor:
    """The logits `(B, K)` of one position, the same for all images."""
    return step(position, torch.full((BATCH,), position), before[:, None])[:, 0]


@each_family
@each_prior
def test_changing_a_code_moves_the_logits_after_it_and_no_bit_before(
    family: str, name: str
) -> None:
    prior = make(family, name)
    assert not visible(prior).triu().any()
    # In double, so that no change is lost to rounding where attention hardly looks.
    assert torch.equal(visible(prior.double()), everything_before(prior.config.num_positions))


@each_family
@each_prior
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.3}, {"temperature": 0.0}],
    ids=str,
)
def test_cached_sampling_is_the_plain_loop(family: str, name: str, sampling: dict) -> None:
    """One position at a time, and as many as is chosen."""
    prior = make(family, name)
    _, condition, labels = inputs(prior)
    sample = partial(prior.sample, sampling=SamplingConfig(**sampling), seeds=SEEDS)
    cached = sample(BATCH, condition, labels, window=1)
    assert torch.equal(cached, sample(BATCH, condition, labels, plain=True))
    assert torch.equal(cached, sample(BATCH, condition, labels))
    assert tuple(cached.shape[1:]) == prior.config.grids[-1]


@each_family
def test_guided_sampling_is_the_plain_loop_and_not_unguided_sampling(family: str) -> None:
    prior = make(family, "third of three, classes")
    _, condition, labels = inputs(prior)
    sample = partial(prior.sample, BATCH, condition, seeds=SEEDS)
    guided = partial(sample, sampling=SamplingConfig(guidance_scale=2.5))
    cached, no_label = guided(labels), torch.full_like(labels, 3)
    assert torch.equal(cached, guided(labels, plain=True))
    assert torch.equal(cached, guided(labels, window=1))
    assert not torch.equal(cached, sample(labels))
    assert not torch.equal(cached, guided(no_label))


@each_family
@pytest.mark.parametrize("name", ["top", "bottom, classes, ratio 4"])
def test_given_codes_stay_and_the_drawn_ones_follow_them(family: str, name: str) -> None:
    prior = make(family, name)
    codes, condition, labels = inputs(prior)
    known = Known(codes, torch.rand(codes.shape) < 0.5)
    cold = SamplingConfig(temperature=0.1)  # in which codes depend strongly on one another
    sample = partial(prior.sample, BATCH, condition, labels, sampling=cold, seeds=SEEDS)
    cached = sample(known=known)
    assert torch.equal(cached[known.mask], codes[known.mask])
    assert torch.equal(cached, sample(known=known, plain=True))
    assert torch.equal(cached, sample(known=known, window=1))
    assert not torch.equal(cached[~known.mask], sample()[~known.mask])


@each_family
@each_prior
def test_steps_give_the_logits_of_the_forward(family: str, name: str) -> None:
    prior = make(family, name)
    assert_steps_are_the_forward(prior)
    assert_steps_are_the_forward(prior.double(), tolerance=1e-10)


@each_family
@each_prior_with_condition
@torch.no_grad()
def test_every_position_sees_every_coarser_code_and_the_label(family: str, name: str) -> None:
    prior = make(family, name)
    codes, condition, labels = inputs(prior)
    logits = prior(codes, condition, labels)
    for level, grid in enumerate(condition[: prior.config.level]):
        for position in range(grid[0].numel()):
            changed = [*condition]
            changed[level] = changed_at(grid, position, prior.config.codebook_sizes[level])
            assert (prior(codes, changed, labels) != logits).any(dim=1).all()
    if labels is not None:
        assert (prior(codes, condition, (labels + 1) % 3) != logits).any(dim=1).all()


@each_family
def test_a_vector_alone_reaches_every_position_and_guides(family: str) -> None:
    facts = {**PRIORS["top"], "vector_size": 3, "label_dropout": 0.1}
    prior = make(family, facts=facts)
    prior.vector.normalise_as(torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 4.0]]), attributes=False)
    codes, (vectors,), _ = inputs(prior)
    logits = prior(codes, [vectors])
    for place in (0, 2):
        moved = prior(codes, [vectors + F.one_hot(torch.tensor(place), 3)]) != logits
        assert moved.any(dim=1).flatten(1).all(dim=1).tolist() == [True, True, False]  # hidden
    constant = prior(codes, [vectors + torch.tensor([0.0, 9.0, 0.0])])
    assert torch.equal(constant, logits)  # a number that is the same in all rows says nothing
    guided = partial(prior.sample, 3, seeds=SEEDS, sampling=SamplingConfig(guidance_scale=3.0))
    assert torch.equal(guided([vectors]), guided([vectors], plain=True))
    hidden = torch.full_like(vectors, torch.nan)
    assert torch.equal(guided([hidden]), prior.sample(3, [hidden], seeds=SEEDS))
    assert {finding.passed for finding in audit(prior)} == {True}
    with pytest.raises(UserError, match="condition has shapes"):
        prior.sample(3, seeds=SEEDS)


@each_family
@each_prior
@torch.no_grad()
def test_a_view_reaches_every_position_and_none_means_the_original(family: str, name: str) -> None:
    prior = make(family, facts={**PRIORS[name], "views": ("flip", "top_left")})
    original = prior(*inputs(prior))
    assert torch.equal(prior(*inputs(prior), torch.zeros(BATCH).long()), original)
    seen = [original]
    for view in (1, 2):
        seen.append(prior(*inputs(prior), torch.full((BATCH,), view)))
        assert all((seen[-1] != before).any(dim=1).all() for before in seen[:-1])
    assert {finding.passed for finding in audit(prior)} == {True}


@pytest.mark.parametrize("told", [True, False])
def test_samples_are_of_the_original_view_where_a_prior_is_told_views(told: bool) -> None:
    """Half of the rows are mirrored ones: all codes of these are 9, and of the others 4."""
    views = torch.arange(32) % 2
    batch = {"codes": [torch.where(views == 1, 9, 4)[:, None, None].expand(-1, 4, 5)]}
    facts = {**PRIORS["top"], **({"views": ("flip",)} if told else {})}
    prior = make("transformer", facts=facts).train()
    loss_fn = make_loss(prior.config, token_corruption=0.0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.01)
    for _ in range(60):
        loss_fn(prior, {**batch, "views": views})[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = prior.sample(40, seeds=range(40))
    shares = [(drawn == code).double().mean().item() for code in (4, 9)]
    assert shares[0] > 0.95 if told else min(shares) > 0.2


def test_vectors_are_hidden_with_labels_and_alone() -> None:
    config = make("transformer", "third of three, classes").config
    grids = [torch.zeros(4000, *grid, dtype=torch.int64) for grid in config.grids]
    batch = {"codes": grids, "labels": torch.zeros(4000).long(), "vectors": torch.ones(4000, 3)}
    seen: dict[str, Tensor] = {}

    def model(codes: Tensor, condition: list[Tensor], labels: Tensor, views: Tensor) -> Tensor:
        assert not views.any()  # the batch names none
        seen.update(label=labels == 3, vector=condition[-1].isnan().all(dim=1))
        return torch.zeros(4000, 7, 4, 4)

    make_loss(config, token_corruption=0.0)(model, batch)
    both = (seen["label"] & seen["vector"]).double().mean()
    assert both == pytest.approx(0.05, abs=0.02)
    assert seen["label"].double().mean() == pytest.approx(0.1, abs=0.03)
    assert seen["vector"].double().mean() - both == pytest.approx(0.09, abs=0.03)


@each_family
@each_prior
def test_every_parameter_receives_a_gradient(family: str, name: str) -> None:
    assert_every_parameter_receives_a_gradient(make(family, name))


def assert_every_parameter_receives_a_gradient(prior: Prior) -> None:
    loss_of(prior.train()).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@each_family
def test_forward_changes_no_parameter_and_starts_near_uniform(family: str) -> None:
    torch.manual_seed(0)
    config_class = CONFIGS[type(FAMILY[family])]
    facts = {"grids": ((4, 4), (8, 8)), "codebook_sizes": (16, 512), "class_names": ABC}
    prior = make_prior(config_class(level=1, **facts))
    before = [parameter.clone() for parameter in prior.parameters()]
    uniform = torch.log(torch.tensor(512.0)).item()
    assert loss_of(prior).item() == pytest.approx(uniform, abs=0.3)
    assert all(map(torch.equal, before, prior.parameters()))
    assert_every_parameter_receives_a_gradient(prior)


@each_family
@torch.no_grad()
def test_a_saved_prior_is_loaded_as_its_family(family: str, tmp_path: Path) -> None:
    prior = make(family, "bottom, classes, ratio 4")
    prior.save_pretrained(tmp_path)
    again = load_prior(tmp_path)
    assert type(again) is type(prior)
    assert again.config == prior.config
    assert torch.equal(again(*inputs(prior)), prior(*inputs(prior)))


@torch.no_grad()
def test_a_prior_of_before_neighbours_were_read_is_as_it_was(tmp_path: Path) -> None:
    network = dataclasses.replace(TRANSFORMER, reads_neighbours=False)
    prior = perturbed(TransformerPriorConfig(level=0, network=network, **PRIORS["top"]))
    prior.save_pretrained(tmp_path)
    assert "reads_neighbours" not in (tmp_path / "config.json").read_text()
    again = load_prior(tmp_path)
    assert again.config == prior.config
    assert torch.equal(again(*inputs(prior)), prior(*inputs(prior)))


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 2), (3, 4)])
def test_neighbours_are_those_of_the_grid(grid: tuple[int, int]) -> None:
    """Left of a position, and the three above it; 0 means none."""
    numbers = F.pad(torch.arange(1, 1 + grid[0] * grid[1]).view(grid), (1, 1, 1, 0))
    left, above = numbers[1:, :-2, None], numbers[:-1].unfold(1, 3, 1)  # (h, w, 1), (h, w, 3)
    assert torch.equal(neighbour_slots(grid), torch.cat([left, above], dim=2).flatten(0, 1))


def test_every_family_is_tested() -> None:
    assert {type(make(family, "top")) for family in FAMILY} == set(FAMILIES)


@pytest.mark.parametrize(
    "network",
    [
        {"num_heads": 0},
        {"num_condition_blocks": 0, "num_output_blocks": 0},
        {"kernel_size": 3},
        {"kernel_size": 13},
        {"num_blocks": 1, "num_residual_blocks": 1, "num_heads": 8},
        {"width": 6, "num_heads": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["top", "top, classes", "bottom, classes, ratio 4"])
def test_pixelsnail_of_any_shape(name: str, network: dict) -> None:
    prior = make("pixelsnail", name, **network)
    assert_steps_are_the_forward(prior)
    assert not visible(prior).triu().any()
    assert_every_parameter_receives_a_gradient(prior)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 7), (3, 7), (9, 3)], ids=str)
@pytest.mark.parametrize(
    "network", [{}, {"num_heads": 0}, {"kernel_size": 3}, {"kernel_size": 13}], ids=str
)
def test_pixelsnail_on_any_grid(grid: tuple[int, int], network: dict) -> None:
    facts = {"grids": ((1, 1), grid), "codebook_sizes": (3, 7)}
    assert_steps_are_the_forward(make("pixelsnail", facts=facts, **network))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_pixelsnail_without_attention_sees_the_cone_above_and_all_to_the_left(
    kernel_size: int,
) -> None:
    """Each row up, a causal convolution reaches k//2 columns further to the right."""
    facts = {"grids": ((5, 9),), "codebook_sizes": (7,)}
    network = {"num_heads": 0, "num_residual_blocks": 4, "kernel_size": kernel_size}
    prior = make("pixelsnail", facts=facts, **network).double()
    row, column = torch.arange(45) // 9, torch.arange(45) % 9
    up, right = row[:, None] - row, column - column[:, None]
    above, left = (up > 0) & (right <= kernel_size // 2 * up), (up == 0) & (right < 0)
    assert torch.equal(visible(prior), above | left)


def test_pixelsnail_with_attention_sees_every_earlier_code() -> None:
    facts = {"grids": ((5, 9),), "codebook_sizes": (7,)}
    assert torch.equal(visible(make("pixelsnail", facts=facts).double()), everything_before(45))


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_attention_is_sdpa(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal=causal), expected)


@pytest.mark.parametrize(("length", "window"), [(33, 4), (33, 11), (33, 16), (33, 40), (600, 300)])
def test_attention_in_a_window_is_attention_under_a_mask(length: int, window: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, length, 8, dtype=torch.float64)
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(-window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attend(q, k, v, causal=True, window=window), expected)


def test_compiling_attention_needs_no_warning() -> None:
    q, k, v = torch.randn(3, 2, 2, 12, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        for window in (0, 4):
            compiled = torch.compile(attend, backend="eager", fullgraph=True)
            expected = attend(q, k, v, causal=True, window=window)
            torch.testing.assert_close(compiled(q, k, v, causal=True, window=window), expected)


@each_family
@torch.no_grad()
def test_steps_in_bf16_give_nearly_the_logits_of_fp32(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prior.attention.bf16_keys_pay", lambda device_type: True)
    prior = make(family, "bottom, classes, ratio 4")
    codes, *given = inputs(prior)
    exact_step = prior.make_stepper(BATCH, *given)
    fast_step = prior.make_stepper(BATCH, *given, torch.bfloat16)
    for position, before in enumerate(codes_before(prior, codes)):
        exact, fast = take(exact_step, position, before), take(fast_step, position, before)
        assert (exact - fast).square().mean().sqrt() < 0.02 * exact.std()
        assert fast.dtype == torch.float32
        assert not can_pack(torch.bfloat16) or not torch.equal(exact, fast)  # it is used


@pytest.mark.parametrize(
    ("dtype", "pays", "kept"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
    ],
)
def test_keys_are_kept_in_bf16_where_products_are_and_it_pays(
    dtype: torch.dtype, pays: bool, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prior.attention.bf16_keys_pay", lambda device_type: pays)
    q, k, v = torch.ones(3, 2, 2, 1, 8)
    cache = KVCache(3, dtype=dtype)
    slots = cache.slots(torch.zeros(2, 1, dtype=torch.int64), 2, q)
    assert cache.attend(slots, q, k, v).dtype == torch.float32
    assert cache.keys.dtype == cache.values.dtype == kept  # type: ignore[union-attr]


def test_keys_are_in_bf16_where_the_hardware_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = []
    for has_it in (False, True):
        found = {"amx_bf16": has_it, "avx512_bf16": True}
        answer = lambda found=found: found  # noqa: E731
        monkeypatch.setattr(torch.cpu, "get_capabilities", answer, raising=False)
        answers.append(bf16_keys_pay("cpu"))
    assert answers == [False, True]
    assert bf16_keys_pay("cuda")


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x, branch = torch.zeros(2, 101, 999), torch.ones(2, 101, 999, requires_grad=True)
    dropped = add_dropped(x, branch, 0.25, training=True)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.005)
    assert torch.equal(dropped, kept * (1 / 0.75))
    assert kept[..., ::8].float().mean().item() == pytest.approx(0.75, abs=0.01)  # any byte
    assert kept[..., 7::8].float().mean().item() == pytest.approx(0.75, abs=0.01)
    dropped.sum().backward()
    assert torch.equal(branch.grad, dropped.detach())
    assert torch.equal(add_dropped(x, branch, 0.25, training=False), branch)
    assert not (add_dropped(x, branch, 0.001, training=True) != 0).all()


@pytest.mark.parametrize("family", ["transformer", "pixelsnail"])
def test_gradients_in_bf16_are_nearly_those_of_fp32(family: str) -> None:
    """Also of a code that is far more frequent than others: sums of bf16 numbers stop growing."""
    facts: Any = {"grids": ((4, 4), (16, 16)), "codebook_sizes": (16, 64), "label_dropout": 0.1}
    prior = make(family, facts={**facts, "class_names": ABC, "views": ("flip",)})
    torch.manual_seed(0)
    top, codes = torch.randint(16, (32, 4, 4)), torch.randint(64, (32, 16, 16))
    codes = torch.where(torch.rand(codes.shape) < 0.7, 3, codes)
    labels, views = torch.randint(4, (32,)), torch.randint(2, (32,))
    gradients = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = prior(codes, [torch.where(top < 12, 5, top)], labels, views)
        loss = F.cross_entropy(logits.float(), codes)
        gradients.append(torch.autograd.grad(loss, list(prior.parameters())))
    names = [name for name, _ in prior.named_parameters()]
    for name, exact, rounded in zip(names, *gradients, strict=True):
        assert (rounded - exact).norm() <= 0.15 * exact.norm(), name


def test_activations_that_are_recomputed_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        prior = make("transformer", "bottom", checkpoint_activations=again, dropout=0.5).train()
        torch.manual_seed(2)
        loss_of(prior).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 4, 3, 16)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_and_its_gradients_are_those_of_pytorch(shape: Any, weighted: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [tensor for tensor in (x, weight) if tensor is not None]
    ours, theirs = rms_norm(x, weight), F.rms_norm(x, x.shape[-1:], weight)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, inputs, gradient)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, gradient), expected)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sampling as on CUDA, but for the kernels: in fixed shapes, and recorded. What happened."""
    events: list[str] = []
    monkeypatch.setattr("prior.cuda_graphs.broken", [])

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        events.append("recorded")
        return pretended_graph(work, device)

    def noise(self: Noise, places: Tensor) -> Tensor:
        return gumbel(self.seeds, self.level, places, self.codebook_size)

    monkeypatch.setattr(Prior, "is_recorded", lambda self, compiled: compiled is not False)
    monkeypatch.setattr("prior.base.RecordedCalls", partial(RecordedCalls, record=record))
    monkeypatch.setattr("prior.attention.grows", lambda places: False)
    monkeypatch.setattr(Noise, "at", noise)
    return events


@pytest.mark.parametrize("family", ["transformer", "pixelsnail"])
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_recorded_sampling_follows_the_weights_however_they_change(
    family: str, bf16: bool, recording: list[str]
) -> None:
    """Also in ways that torch does not count; with bf16 a step has copies of them."""
    prior = make(family, "bottom")
    _, condition, labels = inputs(prior)
    sample = partial(prior.sample, BATCH, condition, labels, seeds=SEEDS, bf16=bf16, window=1)
    drawn = []
    for factor in (1.0, 0.3, 1.1):
        for parameter in prior.parameters():
            parameter.data.mul_(factor)
        drawn.append(sample())
        assert recording  # the first time, and anew each time
        recording.clear()
        assert torch.equal(drawn[-1], sample(compiled=False))
        assert not recording
    assert not torch.equal(drawn[0], drawn[1])


@torch.no_grad()
def test_where_calls_cannot_be_recorded_sampling_goes_on_and_says_so_once(
    recording: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prior = make("pixelsnail", "bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    expected, tried = prior.sample(BATCH, condition, labels, seeds=SEEDS, window=1), []

    def fail(work: Callable[[], None], device: torch.device) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted\nMore of it")

    monkeypatch.setattr("prior.base.RecordedCalls", partial(RecordedCalls, record=fail))
    for _ in range(2):
        assert torch.equal(prior.sample(BATCH, condition, labels, seeds=SEEDS, window=1), expected)
    assert len(tried) == 1
    (warning,) = caplog.messages
    assert "(operation not permitted More of it): sampling is slower" in warning


@pytest.mark.parametrize(
    ("raised", "at_the_end", "said", "is_broken"),
    [
        (RuntimeError("not permitted"), RuntimeError("cannot end"), "not permitted", True),
        (None, RuntimeError("cannot end"), "cannot end", True),
        (torch.OutOfMemoryError("full"), None, "full", False),
        (torch.OutOfMemoryError("full"), RuntimeError("cannot end"), "full", True),
    ],
)
def test_a_recording_that_fails_leaves_everything_as_it_was(
    raised: Exception | None,
    at_the_end: Exception | None,
    said: str,
    is_broken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own context does not, when it cannot end; and freeing the graph may fail as well."""
    broken: list[object] = []
    monkeypatch.setattr("prior.cuda_graphs.broken", broken)
    monkeypatch.setattr("prior.cuda_graphs._recording_stream", lambda device: "recording")
    streams, context = ["default"], mock.MagicMock()
    context.__enter__.side_effect = lambda: streams.append("inner")
    context.__exit__.side_effect = at_the_end
    context.__exit__.return_value = False

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        before = streams[:]
        streams.append(name)
        try:
            yield
        finally:
            streams[:] = before

    def work() -> None:
        assert not gc.isenabled()
        if raised is not None:
            raise raised

    with (
        mock.patch("torch.cuda.CUDAGraph") as graph,
        mock.patch("torch.cuda.graph", return_value=context),
        mock.patch("torch.cuda.stream", stream),
        pytest.raises(type(raised or at_the_end), match=said),
    ):
        cuda_graph(work, torch.device("cuda:0"))
    assert streams == ["default"]
    assert len(broken) == is_broken
    assert graph.return_value.reset.called != is_broken
    assert gc.isenabled()


@torch.no_grad()
def test_where_memory_does_not_suffice_to_record_sampling_goes_on(
    recording: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prior = make("transformer", "bottom")
    _, condition, labels = inputs(prior)
    sample = partial(prior.sample, BATCH, condition, labels, seeds=SEEDS, window=1)
    expected = sample()
    fail = mock.Mock(side_effect=torch.OutOfMemoryError("full"))
    _warn_once.cache_clear()
    with mock.patch("prior.base.RecordedCalls", partial(RecordedCalls, record=fail)):
        for _ in range(2):
            assert torch.equal(sample(), expected)
    assert fail.call_count == 2
    assert caplog.messages == ["no memory is left to record CUDA graphs: sampling is slower."]
    recording.clear()
    assert torch.equal(sample(), expected)
    assert recording  # the next batch tries again


@torch.no_grad()
def test_where_steps_cannot_be_compiled_sampling_goes_on_and_says_so_once(
    recording: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    prior, tried = make("transformer", "bottom, classes, ratio 4"), []
    _, condition, labels = inputs(prior)
    expected = prior.sample(BATCH, condition, labels, seeds=SEEDS)

    def without_triton(step: Callable, **_: Any) -> Callable:
        def fail(*inputs: Any) -> None:
            tried.append(step.__name__)
            raise RuntimeError("Cannot find a working triton installation.\nMore of it")

        return fail

    fused.cache_clear()
    caplog.set_level(logging.INFO, logger="prior")
    with mock.patch("torch.compile", without_triton):
        for _ in range(2):
            drawn = prior.sample(BATCH, condition, labels, seeds=SEEDS, compiled=True)
            assert torch.equal(drawn, expected)
    fused.cache_clear()
    assert tried == ["settle", "_step"]
    reason = "cannot be compiled (Cannot find a working triton installation. More of it)"
    assert [reason in message for message in caplog.messages].count(True) == 2
    assert any(message.startswith("compiling") for message in caplog.messages)


@pytest.mark.parametrize("family", ["transformer, window", "pixelsnail"])
def test_one_compiled_step_serves_all_positions_and_batches(
    family: str, recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, and drawing, are traced once, as graphs without a break."""
    network = {"num_layers": 2} if family != "pixelsnail" else {}
    prior = make(family, "bottom, classes, ratio 4", **network)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    _, condition, labels = inputs(prior)
    batches = [(condition, labels), ([level.flip(0) for level in condition], labels.flip(0))]
    options: dict[str, Any] = {"seeds": SEEDS, "window": 4 if prior.has_windows else 1}
    expected = [prior.sample(BATCH, *batch, **options) for batch in batches]
    torch._dynamo.reset()
    fused.cache_clear()
    monkeypatch.setattr("prior.base.RecordedCalls", lambda call, **_: as_it_is(call))
    with mock.patch("torch.compile", partial(torch.compile, backend=backend, fullgraph=True)):
        for batch, codes in zip(batches, expected, strict=True):
            assert torch.equal(prior.sample(BATCH, *batch, compiled=True, **options), codes)
    fused.cache_clear()
    assert len(graphs) == 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_windows_of_guesses_draw_the_codes_of_the_plain_loop(data: st.DataObject) -> None:
    assert_sampling_draws_the_codes_of_the_plain_loop(data)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_recorded_calls_draw_the_codes_of_the_plain_loop(
    data: st.DataObject, recording: list[str]
) -> None:
    recording.clear()
    window, is_whole = assert_sampling_draws_the_codes_of_the_plain_loop(data)
    if window == 1 and is_whole:
        assert recording


def assert_sampling_draws_the_codes_of_the_plain_loop(data: st.DataObject) -> tuple[int, bool]:
    """In float64: any prior, number of lanes, window, settings, and codes known beforehand. Gives
    the window, and whether no codes were known."""
    family, name = data.draw(st.sampled_from([*FAMILY])), data.draw(st.sampled_from([*PRIORS]))
    prior, lanes = make(family, name).double(), data.draw(st.integers(1, 5))
    codes, condition, labels = inputs(prior)
    rows = torch.arange(lanes) % BATCH
    codes, condition = codes[rows], [level[rows] for level in condition]
    labels = None if labels is None else labels[rows]
    shares = st.sampled_from([None, 0.05, 0.5, 0.9])
    facts: dict[str, Any] = {"temperature": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))}
    facts |= {"top_k": data.draw(st.sampled_from([None, 1, 5])), "top_p": data.draw(shares)}
    facts |= {"min_p": data.draw(shares)}
    if prior.config.label_dropout:
        facts["guidance_scale"] = data.draw(st.sampled_from([1.0, 0.0, 2.5]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    mask = torch.rand(codes.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.4]))
    known = Known(codes, mask) if mask.any() else None
    options: dict[str, Any] = {"sampling": SamplingConfig(**facts), "known": known}
    options["seeds"] = data.draw(
        st.lists(st.integers(0, 2**64 - 1), min_size=lanes, max_size=lanes)
    )
    sample = partial(prior.sample, lanes, condition, labels, **options)
    plain, window = sample(plain=True), data.draw(st.just(1) | st.integers(0, 40))
    assert torch.equal(sample(window=window), plain)
    assert known is None or torch.equal(plain[mask], codes[mask])
    return window, known is None


@torch.no_grad()
def test_windows_draw_the_same_codes_where_caches_grow_and_kernels_change() -> None:
    """At more than 512 positions attention is another kernel on a CPU."""
    network = TransformerConfig(width=32, num_layers=1, num_heads=2, dropout=0.0)
    facts: dict[str, Any] = {"level": 0, "grids": ((23, 24),), "codebook_sizes": (11,)}
    prior = fresh_copy(make_prior(TransformerPriorConfig(network=network, **facts)), noise=True)
    one, many = (prior.double().sample(2, seeds=[1, 2], window=window) for window in (1, 29))
    assert torch.equal(one, many)


def test_an_image_takes_few_calls_and_waits_for_no_other() -> None:
    """Where the logits do not depend on the codes, a window is right at the second look."""
    noise, calls = Noise(torch.tensor([1, 2]), 0, 12, 5), []

    def step(call: int, first: Tensor, before: Tensor) -> Tensor:
        calls.append(first.tolist())
        logits = torch.zeros(2, before.shape[1], 5)
        logits[1, :, 1:] = -torch.inf  # all zeros, as they are guessed
        return logits

    codes, number = sample_codes(step, Guesses(noise, 12, SamplingConfig(), None), 4)
    assert not codes[1].any()
    assert number == len(calls) < 9
    slow, fast = zip(*calls, strict=True)
    assert fast[:4] == (0, 4, 8, 8)
    assert slow[1] < 4


def test_a_pixelsnail_guesses_whole_grids_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call computes all positions, so that few calls do; or one, in bf16 and where it is asked
    for."""
    prior = make("pixelsnail", "bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    forward, calls = PixelSNAIL.forward, []

    def counted(self: PixelSNAIL, codes: Tensor, *given: Any) -> Tensor:
        calls.append(len(codes))
        return forward(self, codes, *given)

    monkeypatch.setattr(PixelSNAIL, "forward", counted)
    sample = partial(prior.sample, BATCH, condition, labels, seeds=SEEDS)
    codes = sample()
    assert 2 <= len(calls) < prior.config.num_positions
    calls.clear()
    assert torch.equal(sample(window=1), codes)
    sample(window=5, bf16=True)
    assert not calls
    monkeypatch.setattr("prior.predictive.GRID_WORK", BATCH * prior.num_parameters)
    assert torch.equal(sample(), codes)
    assert not calls
    assert torch.equal(sample(window=5), codes)
    assert calls


@each_family
def test_an_image_depends_on_its_own_seed_alone(family: str) -> None:
    prior = make(family, "bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    together = prior.sample(3, condition, labels, seeds=[1, 2, 3])
    alone = prior.sample(1, [c[1:2] for c in condition], labels[1:2], seeds=[2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, prior.sample(3, condition, labels, seeds=[4, 5, 6]))


@each_family
def test_wrong_inputs_are_refused(family: str) -> None:
    prior = make(family, "bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    sample = partial(prior.sample, BATCH, seeds=SEEDS)
    with pytest.raises(UserError, match="the condition has shapes"):
        sample((), labels)
    with pytest.raises(UserError, match="3 classes: give labels"):
        sample(condition, None)
    with pytest.raises(UserError, match="from 0 to 2"):
        sample(condition, torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="trained without label dropout"):
        sample(condition, labels, sampling=SamplingConfig(guidance_scale=2.0))


def test_a_class_named_as_the_hidden_label_is_refused() -> None:
    facts: Any = {"grids": ((2, 2),), "codebook_sizes": (8,), "num_levels": 1}
    manifest: Any = SimpleNamespace(
        **facts, class_names=("cat", "none"), encoder_hash="", codes_hash="", vector_size=0
    )
    manifest.vector_names, manifest.other_views, manifest.num_train = (), (), 100
    config = TrainPriorConfig(codes="x", level="0", output_dir="y")
    with pytest.raises(UserError, match="a class is named 'none'"):
        prior_config(config, manifest)
    assert prior_config(dataclasses.replace(config, label_dropout=0.0), manifest).num_classes == 2


@given(
    rows=st.integers(0, 10**9),
    width=st.none() | st.integers(1, 500).map(lambda number: 4 * number),
    layers=st.none() | st.integers(1, 20),
    dropout=st.none() | st.floats(0, 0.9),
)
def test_sizes_that_are_not_given_suit_the_number_of_rows(
    rows: int, width: int | None, layers: int | None, dropout: float | None
) -> None:
    asked = TransformerOptions(width=width, num_layers=layers, dropout=dropout, attention_rows=3)
    chosen, more = asked.for_rows(rows), asked.for_rows(10 * rows + 1)
    for name in ("width", "num_layers", "dropout", "attention_rows"):
        assert getattr(asked, name) in (None, getattr(chosen, name))
    assert chosen.width <= more.width
    assert chosen.num_layers <= more.num_layers
    assert chosen.dropout >= more.dropout
    assert asked.like(chosen).for_rows(0) == chosen
    old = dataclasses.replace(chosen, reads_neighbours=False)
    assert asked.like(old).for_rows(0) == old


def test_a_fine_tuned_prior_has_the_sizes_of_its_first_weights(tmp_path: Path) -> None:
    manifest = Manifest(
        grids=((4, 4),), codebook_sizes=(16,), class_names=(), encoder_hash="", rows_hash="",
        preprocessing=None,
    )  # fmt: skip
    config = TrainPriorConfig(codes="x", level="0", output_dir="y")
    few, many = (prior_config(config, manifest, num_rows=rows) for rows in (10, 10**6))
    assert (few.network.width, many.network.width) == (128, 256)
    make_prior(few).save_pretrained(tmp_path / "few")
    asked = TransformerOptions(num_layers=2)
    config = dataclasses.replace(config, init_from=str(tmp_path / "few"), transformer=asked)
    expected = dataclasses.replace(few.network, num_layers=2)
    assert prior_config(config, manifest, num_rows=10**6).network == expected
    gone = dataclasses.replace(config, init_from=str(tmp_path / "gone"))
    assert prior_config(gone, manifest, num_rows=10**6).network.width == 256
    begun = dataclasses.replace(gone, output_dir=str(tmp_path / "few"))
    assert prior_config(begun, manifest, num_rows=10**6).network == expected


def test_a_prior_is_told_views_of_the_rows_or_those_of_its_first_weights(tmp_path: Path) -> None:
    facts: Any = {"grids": ((4, 4),), "codebook_sizes": (16,), "class_names": ()}
    facts |= {"encoder_hash": "", "rows_hash": "", "preprocessing": None}
    config = TrainPriorConfig(codes="x", level="0", output_dir="y")

    def views(*names: str, **changes: Any) -> tuple[str, ...]:
        return prior_config(
            dataclasses.replace(config, **changes), Manifest(**facts, views=names)
        ).views

    assert views("original") == views("flip", "top_left") == ()  # of which none is the original
    assert views("flip", "original", "top_left") == ("flip", "top_left")
    assert views("flip", "original", view_conditional=False) == ()
    for name, known in {"none": ("original",), "flip": ("original", "flip")}.items():
        first = prior_config(config, Manifest(**facts, views=known), num_rows=10)
        make_prior(first).save_pretrained(tmp_path / name)
    none, flip = ({"init_from": str(tmp_path / name)} for name in ("none", "flip"))
    assert views("original", "flip", **none) == ()
    assert views("original", **flip) == views("flip", "original", **flip) == ("flip",)
    sentence = "holds the views original top_left, but .*flip knows original flip: extract with"
    with pytest.raises(UserError, match=sentence):
        views("original", "top_left", **flip)
    with pytest.raises(UserError, match=r"holds the views flip, but .*flip knows original flip"):
        views("flip", **flip)
    first = prior_config(config, Manifest(**facts, views=("original", "flip", "top_left")))
    make_prior(first).save_pretrained(tmp_path / "two")
    two = {"init_from": str(tmp_path / "two")}
    assert views("flip", "original", "top_left", **two) == ("flip", "top_left")
    with pytest.raises(UserError, match="extract with --views original flip top_left"):
        views("original", "top_left", "flip", **two)  # rows are numbered in this order
    with pytest.raises(UserError, match="views"):
        dataclasses.replace(first, views=("flip", "original"))


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (3999, (128, 3, 2, 0.2)),
        (4000, (192, 4, 3, 0.1)),
        (39_999, (192, 4, 3, 0.1)),
        (40_000, (256, 6, 4, 0.1)),
    ],
)
def test_sizes_change_at_these_numbers_of_rows(rows: int, sizes: tuple[float, ...]) -> None:
    chosen = TransformerOptions().for_rows(rows)
    assert (chosen.width, chosen.num_layers, chosen.num_heads, chosen.dropout) == sizes
    with pytest.raises(UserError, match="divisible by 4 x num_heads = 20"):
        TransformerOptions(num_heads=5).for_rows(rows)
