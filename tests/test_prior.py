"""What a prior promises: it never sees the future, it sees all of its condition, and sampling through caches is exact."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from prior import (
    Known,
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    Prior,
    SamplingConfig,
    TransformerConfig,
    TransformerPriorConfig,
)
from prior.attention import attend
from prior.config import PriorConfig
from prior.packed_linear import can_pack
from prior.registry import FAMILIES, load_prior, make_prior
from vqvae2.common.errors import UserError

# Name -> facts: one level without and with classes, two and three levels, other vocabularies and stride ratios, not square.
PRIORS = {
    "top": {"grids": ((4, 5),), "codebook_sizes": (11,)},
    "top, classes": {"grids": ((4, 4),), "codebook_sizes": (11,), "class_names": ("a", "b", "c")},
    "bottom": {"grids": ((2, 3), (4, 6)), "codebook_sizes": (17, 7)},
    "bottom, classes, ratio 4": {
        "grids": ((1, 2), (4, 8)),
        "codebook_sizes": (600, 512),
        "class_names": ("a", "b", "c"),
    },
    "third of three, classes": {
        "grids": ((1, 1), (2, 2), (4, 4)),
        "codebook_sizes": (5, 6, 7),
        "class_names": ("a", "b", "c"),
        "label_dropout": 0.1,
    },
}
# Family -> a small network of it.
FAMILY = {
    "transformer": TransformerConfig(
        width=32, num_layers=3, num_heads=2, num_condition_layers=1, dropout=0.0
    ),
    "transformer, window": TransformerConfig(
        width=32, num_layers=8, num_heads=2, num_condition_layers=1, dropout=0.0, attention_rows=1
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
BATCH = 3
each_prior = pytest.mark.parametrize("name", PRIORS)
each_family = pytest.mark.parametrize("family", FAMILY)


def make(family: str, name: str, **network: int) -> Prior:
    """A prior of a family over the codes of that name, in evaluation mode, with larger weights than at the start of a training: every path carries weight."""
    facts = PRIORS[name]
    config_class = CONFIGS[type(FAMILY[family])]
    return perturbed(
        config_class(
            level=len(facts["grids"]) - 1,
            network=dataclasses.replace(FAMILY[family], **network),
            **facts,
        )
    )


def perturbed(config: PriorConfig) -> Prior:
    torch.manual_seed(0)
    prior = make_prior(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return prior.eval()


def inputs(prior: Prior) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(1)
    *condition, codes = [
        torch.randint(k, (BATCH, *grid))
        for k, grid in zip(prior.config.codebook_sizes, prior.config.grids, strict=True)
    ]
    return codes, condition, torch.tensor([0, 1, 2]) if prior.config.num_classes else None


def changed_at(codes: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Other codes at one position of `(B, h, w)`, in raster order."""
    changed = codes.clone().flatten(1)
    changed[:, position] = (changed[:, position] + 1) % size
    return changed.view_as(codes)


@torch.no_grad()
def visible(prior: Prior) -> torch.Tensor:
    """`(T, T)` bool: whether position t's logits change with the code at s, at `[t, s]`."""
    codes, condition, labels = inputs(prior)
    logits = prior(codes, condition, labels)
    size, length = prior.config.codebook_sizes[-1], prior.config.num_positions
    changes = [
        (prior(changed_at(codes, s, size), condition, labels) != logits)
        .any(dim=1)
        .any(dim=0)
        .flatten()
        for s in range(length)
    ]
    return torch.stack(changes, dim=1)


def assert_steps_are_the_forward(prior: Prior, tolerance: float) -> None:
    codes, condition, labels = inputs(prior)
    flat = codes.flatten(1)
    with torch.no_grad():
        logits = prior(codes, condition, labels).flatten(2)
        state = prior.start(BATCH, condition, labels)
        for position in range(flat.shape[1]):
            step = prior.step(state, position, flat[:, position - 1] if position else None)
            torch.testing.assert_close(step, logits[..., position], atol=tolerance, rtol=0)


@each_family
@each_prior
def test_causal_bit_for_bit(family: str, name: str) -> None:
    """Changing a code leaves the logits at and before its position as they are, to the last bit, and changes those after it."""
    prior = make(family, name)
    assert not visible(prior).triu().any()
    # In double, so that no change is lost to rounding where attention hardly looks.
    assert torch.equal(
        visible(prior.double()),
        torch.ones(prior.config.num_positions, prior.config.num_positions, dtype=torch.bool).tril(
            -1
        ),
    )


@each_family
@each_prior
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.3}, {"temperature": 0.0}],
    ids=str,
)
def test_cached_sampling_is_the_plain_loop(family: str, name: str, sampling: dict) -> None:
    prior = make(family, name)
    _, condition, labels = inputs(prior)
    options = {"sampling": SamplingConfig(**sampling), "seeds": [5, 6, 7]}
    cached = prior.sample(BATCH, condition, labels, **options)
    assert torch.equal(cached, prior.sample_plain(BATCH, condition, labels, **options))
    assert tuple(cached.shape[1:]) == prior.config.grids[-1]


@each_family
def test_guided_sampling_is_the_plain_loop(family: str) -> None:
    prior = make(family, "third of three, classes")
    _, condition, labels = inputs(prior)
    options = {"sampling": SamplingConfig(guidance_scale=2.5), "seeds": [5, 6, 7]}
    cached = prior.sample(BATCH, condition, labels, **options)
    assert torch.equal(cached, prior.sample_plain(BATCH, condition, labels, **options))
    assert not torch.equal(cached, prior.sample(BATCH, condition, labels, seeds=[5, 6, 7]))
    assert not torch.equal(
        cached, prior.sample(BATCH, condition, torch.full_like(labels, 3), **options)
    )  # 3: no label


@each_family
@pytest.mark.parametrize("name", ["top", "bottom, classes, ratio 4"])
def test_known_codes_stay_and_the_rest_follows_them(family: str, name: str) -> None:
    prior = make(family, name)
    codes, condition, labels = inputs(prior)
    known = Known(codes, torch.rand(codes.shape) < 0.5)
    cached = prior.sample(BATCH, condition, labels, seeds=[5, 6, 7], known=known)
    assert torch.equal(cached[known.mask], codes[known.mask])
    assert torch.equal(
        cached, prior.sample_plain(BATCH, condition, labels, seeds=[5, 6, 7], known=known)
    )
    assert not torch.equal(
        cached[~known.mask], prior.sample(BATCH, condition, labels, seeds=[5, 6, 7])[~known.mask]
    )


@each_family
@each_prior
def test_steps_give_the_logits_of_the_forward(family: str, name: str) -> None:
    prior = make(family, name)
    assert_steps_are_the_forward(prior, 1e-5)
    assert_steps_are_the_forward(prior.double(), 1e-10)


@each_family
@pytest.mark.parametrize(
    "name", [name for name, facts in PRIORS.items() if len(facts["grids"]) > 1]
)
def test_every_position_sees_every_coarser_code_and_the_label(family: str, name: str) -> None:
    prior = make(family, name)
    codes, condition, labels = inputs(prior)
    with torch.no_grad():
        logits = prior(codes, condition, labels)
        for level, grid in enumerate(condition):
            for position in range(grid[0].numel()):
                changed = [*condition]
                changed[level] = changed_at(grid, position, prior.config.codebook_sizes[level])
                assert (prior(codes, changed, labels) != logits).any(dim=1).all()
        if labels is not None:
            assert (prior(codes, condition, (labels + 1) % 3) != logits).any(dim=1).all()


@each_family
@each_prior
def test_every_parameter_receives_a_gradient(family: str, name: str) -> None:
    assert_every_parameter_receives_a_gradient(make(family, name))


def assert_every_parameter_receives_a_gradient(prior: Prior) -> None:
    codes, condition, labels = inputs(prior)
    torch.nn.functional.cross_entropy(prior.train()(codes, condition, labels), codes).backward()
    for parameter_name, parameter in prior.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@each_family
def test_forward_changes_no_parameter_and_starts_near_uniform(family: str) -> None:
    torch.manual_seed(0)
    prior_config = CONFIGS[type(FAMILY[family])]
    prior = make_prior(
        prior_config(
            level=1, grids=((4, 4), (8, 8)), codebook_sizes=(16, 512), class_names=("a", "b", "c")
        )
    )
    before = {name: p.clone() for name, p in prior.named_parameters()}
    codes, condition, labels = inputs(prior)
    loss = torch.nn.functional.cross_entropy(prior(codes, condition, labels), codes)
    assert all(torch.equal(before[name], p) for name, p in prior.named_parameters())
    assert loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.3)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in prior.named_parameters()
    )


@each_family
def test_saved_and_loaded_by_family(family: str, tmp_path: Path) -> None:
    prior = make(family, "bottom, classes, ratio 4")
    prior.save_pretrained(tmp_path)
    again = load_prior(tmp_path)
    assert type(again) is type(prior)
    assert again.config == prior.config
    codes, condition, labels = inputs(prior)
    with torch.no_grad():
        assert torch.equal(again(codes, condition, labels), prior(codes, condition, labels))


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
    assert_steps_are_the_forward(prior, 1e-5)
    seen = visible(prior)
    assert not seen.triu().any()
    assert_every_parameter_receives_a_gradient(prior)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("num_heads", [0, 2])
def test_pixelsnail_on_any_grid(grid: tuple[int, int], num_heads: int) -> None:
    network = dataclasses.replace(FAMILY["pixelsnail"], num_heads=num_heads)
    prior = perturbed(
        PixelSNAILPriorConfig(level=1, grids=((1, 1), grid), codebook_sizes=(3, 7), network=network)
    )
    assert_steps_are_the_forward(prior, 1e-5)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_pixelsnail_without_attention_sees_the_cone_above_and_all_to_the_left(
    kernel_size: int,
) -> None:
    """Each row up, a causal convolution reaches k//2 columns further to the right; to the left and above that, it sees everything."""
    network = dataclasses.replace(
        FAMILY["pixelsnail"], num_heads=0, num_residual_blocks=4, kernel_size=kernel_size
    )
    prior = perturbed(
        PixelSNAILPriorConfig(level=0, grids=((5, 9),), codebook_sizes=(7,), network=network)
    ).double()
    row, column = torch.arange(45) // 9, torch.arange(45) % 9
    up, right = row[:, None] - row, column - column[:, None]
    assert torch.equal(
        visible(prior), ((up > 0) & (right <= kernel_size // 2 * up)) | ((up == 0) & (right < 0))
    )


def test_pixelsnail_with_attention_sees_every_earlier_code() -> None:
    prior = perturbed(
        PixelSNAILPriorConfig(
            level=0, grids=((5, 9),), codebook_sizes=(7,), network=FAMILY["pixelsnail"]
        )
    ).double()
    assert torch.equal(visible(prior), torch.ones(45, 45, dtype=torch.bool).tril(-1))


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
    seen = torch.ones(length, length, dtype=torch.bool).tril() & torch.ones(
        length, length, dtype=torch.bool
    ).triu(-window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attend(q, k, v, causal=True, window=window), expected)


@each_family
def test_steps_in_bf16_give_nearly_the_logits_of_fp32(family: str) -> None:
    prior = make(family, "bottom, classes, ratio 4")
    codes, condition, labels = inputs(prior)
    flat = codes.flatten(1)
    with torch.no_grad():
        states = [
            prior.start(BATCH, condition, labels, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        for position in range(flat.shape[1]):
            exact, fast = (
                prior.step(state, position, flat[:, position - 1] if position else None)
                for state in states
            )
            assert (exact - fast).square().mean().sqrt() < 0.02 * exact.std()
            assert fast.dtype == torch.float32
            assert not can_pack(torch.bfloat16) or not torch.equal(exact, fast)  # it is used


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        prior = make("transformer", "bottom", checkpoint_activations=again, dropout=0.5).train()
        codes, condition, labels = inputs(prior)
        torch.manual_seed(2)
        torch.nn.functional.cross_entropy(prior(codes, condition, labels), codes).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@each_family
@each_prior
def test_steps_of_fixed_shapes_are_the_steps(family: str, name: str) -> None:
    """What CUDA graphs replay gives the logits of the forward, and of `step`, also when its buffers hold another batch's codes."""
    prior = make(family, name)
    codes, condition, labels = inputs(prior)
    flat, size = codes.flatten(1), prior.config.codebook_sizes[-1]
    with torch.no_grad():
        state = prior.start_static(BATCH, condition, labels)
        for batch in (flat, flat.flip(0)):
            coarser = [level if batch is flat else level.flip(0) for level in condition]
            plain = prior(batch.view_as(codes), coarser, labels).flatten(2)
            prior.restart(state, coarser, labels)
            steps = prior.make_stepper(BATCH, coarser, labels, torch.float32)
            for position in range(flat.shape[1]):
                previous = batch[:, position - 1] if position else None
                before = torch.full((BATCH,), size) if previous is None else previous
                logits = prior.step_static(state, torch.tensor([position]), before)
                torch.testing.assert_close(logits, plain[..., position], atol=1e-5, rtol=0)
                torch.testing.assert_close(logits, steps(position, previous), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "network", [{"num_heads": 0}, {"kernel_size": 3}, {"kernel_size": 13}], ids=str
)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (3, 7), (9, 3)], ids=str)
def test_pixelsnail_of_any_shape_in_fixed_shapes(network: dict, grid: tuple[int, int]) -> None:
    config = dataclasses.replace(FAMILY["pixelsnail"], **network)
    prior = perturbed(
        PixelSNAILPriorConfig(level=1, grids=((1, 1), grid), codebook_sizes=(3, 7), network=config)
    )
    codes, condition, labels = inputs(prior)
    with torch.no_grad():
        plain = prior(codes, condition, labels).flatten(2)
        step = prior.make_static_stepper(BATCH, condition, labels, torch.float32, lambda step: step)
        for position in range(plain.shape[2]):
            logits = step(position, codes.flatten(1)[:, position - 1] if position else None)
            torch.testing.assert_close(logits, plain[..., position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["transformer, window", "pixelsnail"])
def test_one_compiled_step_serves_all_positions_and_batches(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling as on CUDA, but for the kernels: the step is traced as a single graph, once, and draws what sampling draws.

    Its only inputs that may move are the position and the code before it: all else CUDA graphs may read and change where it is.
    """
    prior = (
        make(family, "bottom, classes, ratio 4", num_layers=2)
        if family != "pixelsnail"
        else make(family, "bottom, classes, ratio 4")
    )
    graphs: list[list[torch.Size]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        placeholders = graph.graph.find_nodes(
            op="placeholder"
        )  # what CUDA graphs see as not moving is noted in "tensor_dict"
        graphs.append(
            [
                node.meta["example_value"].shape
                for node in placeholders
                if "_dynamo_static_input_type" not in node.meta["tensor_dict"]
            ]
        )
        return graph.forward

    def compiled(
        batch_size: int, condition: list[torch.Tensor], labels: torch.Tensor, dtype: torch.dtype
    ) -> Callable:
        return prior.make_static_stepper(
            batch_size,
            condition,
            labels,
            dtype,
            partial(torch.compile, backend=backend, fullgraph=True),
        )

    _, condition, labels = inputs(prior)
    batches = [(condition, labels), ([level.flip(0) for level in condition], labels.flip(0))]
    expected = [prior.sample(BATCH, *batch, seeds=[1, 2, 3]) for batch in batches]
    torch._dynamo.reset()
    monkeypatch.setattr(prior, "make_stepper", compiled)
    for batch, codes in zip(batches, expected, strict=True):
        assert torch.equal(prior.sample(BATCH, *batch, seeds=[1, 2, 3]), codes)
    assert [sorted(shapes) for shapes in graphs] == [[(1,), (BATCH,)]]


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
    with pytest.raises(UserError, match="the condition has shapes"):
        prior.sample(BATCH, (), labels, seeds=[1, 2, 3])
    with pytest.raises(UserError, match="3 classes: give labels"):
        prior.sample(BATCH, condition, None, seeds=[1, 2, 3])
    with pytest.raises(UserError, match="from 0 to 2"):
        prior.sample(BATCH, condition, torch.tensor([0, 1, 3]), seeds=[1, 2, 3])
