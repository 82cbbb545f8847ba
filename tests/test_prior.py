"""What a prior promises: it never sees the future, it sees all of its condition, and sampling through caches is exact."""

import pytest
import torch

from prior import SamplingConfig, TransformerConfig, TransformerPrior, TransformerPriorConfig
from prior.attention import attend
from vqvae2.common.errors import UserError

# Name -> facts: one level without and with classes, two and three levels, other vocabularies and stride ratios, not square.
PRIORS = {
    "top": {"grids": ((4, 5),), "codebook_sizes": (11,)},
    "top, classes": {"grids": ((4, 4),), "codebook_sizes": (11,), "class_names": ("a", "b", "c")},
    "bottom": {"grids": ((2, 3), (4, 6)), "codebook_sizes": (17, 7)},
    "bottom, classes, ratio 4": {"grids": ((1, 2), (4, 8)), "codebook_sizes": (600, 512), "class_names": ("a", "b", "c")},
    "third of three, classes": {"grids": ((1, 1), (2, 2), (4, 4)), "codebook_sizes": (5, 6, 7), "class_names": ("a", "b", "c")},
    "window of one row": {"grids": ((4, 4),), "codebook_sizes": (9,), "rows": 1},
}
BATCH = 3


def make(name: str) -> TransformerPrior:
    torch.manual_seed(0)
    facts = dict(PRIORS[name])
    network = TransformerConfig(width=32, num_layers=4, num_heads=2, num_condition_layers=1, dropout=0.0, attention_rows=facts.pop("rows", 0))
    prior = TransformerPrior(TransformerPriorConfig(level=len(facts["grids"]) - 1, network=network, **facts))
    with torch.no_grad():  # larger weights than at the start of a training: every path carries weight
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return prior.eval()


def inputs(prior: TransformerPrior) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(1)
    *condition, codes = [torch.randint(k, (BATCH, *grid)) for k, grid in zip(prior.config.codebook_sizes, prior.config.grids, strict=True)]
    return codes, condition, torch.tensor([0, 1, 2]) if prior.config.num_classes else None


@pytest.mark.parametrize("name", PRIORS)
def test_causal_bit_for_bit(name: str) -> None:
    """Changing a code leaves the logits at and before its position as they are, to the last bit, and changes those after it."""
    prior = make(name)
    codes, condition, labels = inputs(prior)
    width = codes.shape[2]
    with torch.no_grad():
        logits = prior(codes, condition, labels).flatten(2)
        for position in range(codes[0].numel()):
            changed = codes.clone()
            row, column = divmod(position, width)
            changed[:, row, column] = (changed[:, row, column] + 1) % prior.codebook_size
            new = prior(changed, condition, labels).flatten(2)
            assert torch.equal(new[..., : position + 1], logits[..., : position + 1])
            assert (new[..., position + 1 :] != logits[..., position + 1 :]).any(dim=1).all()


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}], ids=str)
def test_cached_sampling_is_the_plain_loop(name: str, sampling: dict) -> None:
    prior = make(name)
    _, condition, labels = inputs(prior)
    options = {"sampling": SamplingConfig(**sampling), "seeds": [5, 6, 7]}
    cached = prior.sample(BATCH, condition, labels, **options)
    assert torch.equal(cached, prior.sample_plain(BATCH, condition, labels, **options))
    assert tuple(cached.shape[1:]) == prior.config.grids[-1]


@pytest.mark.parametrize("name", PRIORS)
def test_steps_give_the_logits_of_the_forward(name: str) -> None:
    prior = make(name)
    codes, condition, labels = inputs(prior)
    flat = codes.flatten(1)
    with torch.no_grad():
        logits = prior(codes, condition, labels).flatten(2)
        state = prior.start(BATCH, condition, labels)
        for position in range(flat.shape[1]):
            step = prior.step(state, position, flat[:, position - 1] if position else None)
            torch.testing.assert_close(step, logits[..., position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name, facts in PRIORS.items() if len(facts["grids"]) > 1])
def test_every_position_sees_every_coarser_code_and_the_label(name: str) -> None:
    prior = make(name)
    codes, condition, labels = inputs(prior)
    with torch.no_grad():
        logits = prior(codes, condition, labels)
        for level, grid in enumerate(condition):
            for row in range(grid.shape[1]):
                for column in range(grid.shape[2]):
                    changed = [c.clone() for c in condition]
                    changed[level][:, row, column] = (changed[level][:, row, column] + 1) % prior.config.codebook_sizes[level]
                    assert (prior(codes, changed, labels) != logits).any(dim=1).all()
        if labels is not None:
            assert (prior(codes, condition, (labels + 1) % 3) != logits).any(dim=1).all()


@pytest.mark.parametrize("name", PRIORS)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    prior = make(name).train()
    codes, condition, labels = inputs(prior)
    torch.nn.functional.cross_entropy(prior(codes, condition, labels), codes).backward()
    for parameter_name, parameter in prior.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_forward_changes_no_parameter_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    prior = TransformerPrior(TransformerPriorConfig(level=0, grids=((8, 8),), codebook_sizes=(512,)))
    before = {name: p.clone() for name, p in prior.named_parameters()}
    codes = torch.randint(512, (4, 8, 8))
    loss = torch.nn.functional.cross_entropy(prior(codes), codes).item()
    assert all(torch.equal(before[name], p) for name, p in prior.named_parameters())
    assert loss == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.3)


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_attention_is_sdpa(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal=causal), expected)


@pytest.mark.parametrize(("length", "window"), [(33, 4), (33, 11), (33, 16), (33, 40), (600, 300)])
def test_attention_in_a_window_is_attention_under_a_mask(length: int, window: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, length, 8, dtype=torch.float64)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & torch.ones(length, length, dtype=torch.bool).triu(-window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attend(q, k, v, causal=True, window=window), expected)


def test_an_image_depends_on_its_own_seed_alone() -> None:
    prior = make("bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    together = prior.sample(3, condition, labels, seeds=[1, 2, 3])
    alone = prior.sample(1, [c[1:2] for c in condition], labels[1:2], seeds=[2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, prior.sample(3, condition, labels, seeds=[4, 5, 6]))


def test_wrong_inputs_are_refused() -> None:
    prior = make("bottom, classes, ratio 4")
    _, condition, labels = inputs(prior)
    with pytest.raises(UserError, match="the condition has shapes"):
        prior.sample(BATCH, (), labels, seeds=[1, 2, 3])
    with pytest.raises(UserError, match="3 classes: give labels"):
        prior.sample(BATCH, condition, None, seeds=[1, 2, 3])
    with pytest.raises(UserError, match="from 0 to 2"):
        prior.sample(BATCH, condition, torch.tensor([0, 1, 3]), seeds=[1, 2, 3])
