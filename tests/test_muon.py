"""Muon: what it does to matrices, and which weights it takes."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from prior.config import (
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    TransformerConfig,
    TransformerPriorConfig,
)
from prior.pixelsnail import PixelSNAIL
from prior.transformer import TransformerPrior
from vqvae2.common.config import TrainingConfig
from vqvae2.common.fit import make_optimizer
from vqvae2.common.muon import MuonAdamW, orthogonalise, orthogonalise_each
from vqvae2.config import DiscriminatorConfig, PreprocessingConfig, VQVAE2Config
from vqvae2.discriminator import AdversarialPair
from vqvae2.model import VQVAE2


@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (40, 12), (16, 16)])
def test_singular_values_become_about_one_and_directions_stay(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns, dtype=torch.float64) * torch.tensor(
        [[[1e-4]], [[1]], [[1e4]]]
    )
    left, values, right = torch.linalg.svd(orthogonalise(matrices), full_matrices=False)
    assert values.min() > 0.3
    assert values.max() < 1.3
    old_left, _, old_right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = old_left @ old_right  # the polar factor
    assert torch.allclose(left @ right, nearest, atol=1e-6)
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_matrices_of_any_shapes_are_computed_together_as_each_alone() -> None:
    """As on a GPU the small ones are: lying, and with zeros around them."""
    torch.manual_seed(0)
    shapes = [(12, 40), (40, 12), (3, 5), (16, 16), (1, 7)]
    matrices = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    for matrix, together in zip(matrices, orthogonalise_each(matrices), strict=True):
        assert torch.allclose(orthogonalise(matrix[None])[0], together, atol=1e-12)


def test_a_step_on_small_matrices_together_is_that_on_each_alone() -> None:
    """Tall, wide and square ones, one of them with its channels last."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.Linear(20, 6), nn.Conv2d(5, 8, 3), nn.Linear(7, 7)]
    layers[2].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = nn.ModuleList(layers)
    twin = copy.deepcopy(ours)
    for model, together in ((ours, False), (twin, True)):
        torch.manual_seed(1)
        optimizer = MuonAdamW([{"params": [x.weight for x in model], "muon": True}], 0.1)
        for _ in range(2):
            for layer in model:
                layer.weight.grad = torch.randn_like(layer.weight)
            key = {"return_value": "small"} if together else {"side_effect": lambda m: m.shape}
            with mock.patch("vqvae2.common.muon._batch_of", **key):
                optimizer.step()
    for one, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # products may be in bf16


def test_a_step_is_that_of_torch() -> None:
    """torch's own Muon, which computes in bf16, and takes one matrix at a time."""
    torch_muon: Any = getattr(torch.optim, "Muon", None)
    if torch_muon is None:
        pytest.skip("torch has Muon from 2.9 on")
    torch.manual_seed(0)
    ours = nn.Linear(24, 40, bias=False)
    theirs = nn.Linear(24, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.2)
    settings = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    pairs = (
        (ours, make_optimizer(ours, config)),
        (theirs, torch_muon(theirs.parameters(), **settings)),
    )
    before = ours.weight.detach().clone()
    for _ in range(3):
        inputs = torch.randn(64, 24)
        for layer, optimizer in pairs:
            layer.zero_grad()
            layer(inputs).square().sum().backward()
            optimizer.step()
    moved = (ours.weight - before).norm()
    assert (ours.weight - theirs.weight).norm() < 0.05 * moved  # bf16 is that rough


def test_a_copy_and_a_loaded_state_go_on_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    groups = [{"params": [layer.weight], "muon": True}, {"params": [layer.bias]}]
    optimizer, inputs = MuonAdamW(groups, 0.1), torch.randn(8, 6)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        layer(inputs).square().sum().backward()
        optimizer.step()
        return [parameter.detach().clone() for parameter in layer.parameters()]

    step()
    weights, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = step()
    layer.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert all(map(torch.equal, step(), expected))
    assert [group["muon"] for group in copy.deepcopy(optimizer).param_groups] == [True, False]


def test_layers_learn_by_muon_and_all_else_by_adamw() -> None:
    """Not biases, embeddings, positions or codebooks; nothing of discriminators and PixelSNAILs."""
    image = PreprocessingConfig(size=(16,), channels=1)
    network = TransformerConfig(width=16, num_layers=1, num_heads=2)
    facts: dict[str, Any] = {"grids": ((2, 2),), "codebook_sizes": (8,), "level": 0}
    prior = TransformerPrior(TransformerPriorConfig(network=network, **facts))
    small = VQVAE2Config(image=image, strides=(2, 4), hidden_channels=16, residual_channels=8)
    pair = AdversarialPair(VQVAE2(small), DiscriminatorConfig(weight=1, hidden_channels=8))
    for model in (prior, pair):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_muon = set()
        for group in make_optimizer(model, TrainingConfig()).param_groups:
            by_muon |= {names[id(p)] for p in group["params"] if group["muon"]}
        assert by_muon == {
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
            and not name.startswith(("discriminator", "embedding", "positions", "labels"))
            and not name.endswith("codebook")
        }
        plain = make_optimizer(model, TrainingConfig(optimizer="adamw"))
        assert not any(group["muon"] for group in plain.param_groups)
    snail = PixelSNAIL(PixelSNAILPriorConfig(network=PixelSNAILConfig(width=16), **facts))
    assert not any(group["muon"] for group in make_optimizer(snail, TrainingConfig()).param_groups)
