"""Perceptual and adversarial terms: who learns from what, from when on, and what is said when weights are missing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import command as run_here
from tests.conftest import vqvae2
from tests.test_training import (
    STEPS,
    assert_same_run,
    kill_when,
    line_count,
    metrics,
    train_command,
)
from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.errors import UserError
from vqvae2.config import DiscriminatorConfig, PerceptualConfig
from vqvae2.discriminator import AdversarialPair, PatchDiscriminator
from vqvae2.losses import RAMP, make_adversarial_term, make_loss
from vqvae2.perceptual import load_perceptual

IMAGES = (
    torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    - 1
)


def make_pair(
    start: int, *, weight: float = 0.8
) -> tuple[AdversarialPair, DiscriminatorConfig, object]:
    torch.manual_seed(0)
    image = PreprocessingConfig(size=(32,))
    model = VQVAE2(
        VQVAE2Config(
            image=image,
            codebook_sizes=(16,),
            code_dims=(8,),
            hidden_channels=16,
            residual_channels=8,
            num_residual_blocks=1,
        )
    )
    config = DiscriminatorConfig(weight=weight, hidden_channels=8, num_layers=2)
    pair = AdversarialPair(model, config).double().train()
    return (
        pair,
        config,
        make_loss(
            "mse",
            (16, 16),
            adversarial=make_adversarial_term(config, model.last_layer, start=start),
        ),
    )


def gradients(module: nn.Module) -> list[Tensor]:
    return [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for parameter in module.parameters()
    ]


def test_each_term_reaches_its_own_network_alone() -> None:
    pair, config, loss_fn = make_pair(start=-RAMP)
    state = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    loss, figures = loss_fn(pair, {"images": IMAGES})
    loss.backward()
    found = gradients(pair.autoencoder), gradients(pair.discriminator)

    # The same by hand: first the discriminator alone, then the autoencoder against a discriminator that cannot move.
    pair.load_state_dict(state)
    pair.zero_grad()
    reconstruction, levels = pair.autoencoder(IMAGES)
    real, fake = pair.discriminator(IMAGES), pair.discriminator(reconstruction.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    hinge.backward()
    torch.testing.assert_close(found[1], gradients(pair.discriminator))
    assert not any(gradient.any() for gradient in gradients(pair.autoencoder))
    generator = -pair.discriminator(reconstruction).mean()
    fidelity = F.mse_loss(reconstruction, IMAGES) + levels[0].loss + levels[1].loss
    (fidelity + config.weight * figures["adaptive_weight"] * generator).backward()
    torch.testing.assert_close(found[0], gradients(pair.autoencoder))


def test_the_adaptive_weight_makes_both_pull_equally_at_the_last_layer() -> None:
    pair, _, loss_fn = make_pair(start=-RAMP)
    _, figures = loss_fn(pair, {"images": IMAGES})
    last_layer = pair.autoencoder.last_layer
    pulls = [
        torch.autograd.grad(figures[name], last_layer, retain_graph=True)[0].norm()
        for name in ("reconstruction", "generator")
    ]
    torch.testing.assert_close(
        figures["adaptive_weight"] * pulls[1], pulls[0], rtol=1e-2, atol=0
    )  # to the 1e-4 in the quotient


def test_before_its_start_the_discriminator_learns_and_is_not_heard() -> None:
    """From the same state each time: up to the start the autoencoder's gradients are those without a discriminator, one batch later they are not."""
    pair, _, loss_fn = make_pair(start=7)
    state = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    plain = VQVAE2(pair.autoencoder.config).double().train()
    plain.load_state_dict(pair.autoencoder.state_dict())
    make_loss("mse", (16, 16))(plain, {"images": IMAGES})[0].backward()
    for number in (0, 7, 8):
        pair.load_state_dict(state)
        pair.num_forwards.fill_(number)
        pair.zero_grad()
        loss_fn(pair, {"images": IMAGES})[0].backward()
        same = [
            torch.allclose(a, b, rtol=1e-9, atol=0)
            for a, b in zip(gradients(pair.autoencoder), gradients(plain), strict=True)
        ]
        assert all(same) if number <= 7 else not any(same[-4:])
        assert all(gradient.any() for gradient in gradients(pair.discriminator))


def test_a_verdict_is_on_one_image_alone() -> None:
    discriminator = PatchDiscriminator(3, DiscriminatorConfig(hidden_channels=8)).double()
    torch.testing.assert_close(discriminator(IMAGES)[1:2], discriminator(IMAGES[1:2]))


def thin_vgg(path: Path, *, judged: bool = False) -> Path:
    """A file with the layout of torchvision's VGG-16, and few channels."""
    generator = torch.Generator().manual_seed(0)
    state, before = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    widths = {0: 4, 2: 4, 5: 6, 7: 6, 10: 8, 12: 8, 14: 8, 17: 8, 19: 8, 21: 8, 24: 8, 26: 8, 28: 8}
    for number, width in widths.items():
        state[f"features.{number}.weight"] = (
            torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        )
        state[f"features.{number}.bias"] = torch.zeros(width)
        before = width
    if judged:
        state |= {
            f"lin{stage}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
            for stage, width in enumerate((4, 6, 8, 8, 8))
        }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_perceptual_distance(suffix: str, channels: int, tmp_path: Path) -> None:
    distance = load_perceptual(
        PerceptualConfig(
            weight=1, weights_file=str(thin_vgg(tmp_path / f"vgg{suffix}", judged=channels == 3))
        )
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, channels, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, channels, 32, 32, generator=generator)
    near, far = (distance(images + scale * noise, images) for scale in (0.1, 0.5))
    assert distance(images, images).item() == 0 < near.item() < far.item()
    blurred = images.clone().requires_grad_()
    distance(blurred, images + 0.1 * noise).backward()
    assert blurred.grad is not None
    assert blurred.grad[:, : min(channels, 3) if channels != 2 else 1].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_stages_of_a_vgg_are_those_of_the_layout(tmp_path: Path) -> None:
    distance = load_perceptual(
        PerceptualConfig(weight=1, weights_file=str(thin_vgg(tmp_path / "vgg.pth")))
    )
    shapes = [tuple(features.shape) for features in distance.network(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(1, 4, 32, 32), (1, 6, 16, 16), (1, 8, 8, 8), (1, 8, 4, 4), (1, 8, 2, 2)]


def test_missing_or_wrong_weights_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name, said in (
        (None, "weights_file says no file"),
        ("nothing.pth", "no such file"),
        ("text.pth", "cannot be read"),
        ("other.pth", "of a VGG"),
    ):
        with pytest.raises(UserError, match=said):
            load_perceptual(PerceptualConfig(weight=1, weights_file=name and str(tmp_path / name)))
    for network in (
        "lpips",
        "timm/resnet18.a1_in1k",
    ):  # installed or not, there are no weights here
        with pytest.raises(UserError, match=r"perceptual\.network is|torchvision cannot"):
            load_perceptual(PerceptualConfig(weight=1, network=network))


def test_killed_and_continued_with_everything_on(photos: Path, tmp_path: Path) -> None:
    vgg = thin_vgg(tmp_path / "vgg.pth")
    options = ("--perceptual.weight", 0.1, "--perceptual.weights-file", vgg, "--discriminator.weight", 0.8, "--discriminator.start-step", 10,
               "--discriminator.hidden-channels", 8, "--discriminator.num-layers", 1)  # fmt: skip
    run_here(*train_command(photos, tmp_path / "whole", *options))
    killed = tmp_path / "killed"
    kill_when(lambda: line_count(killed) >= 9, *train_command(photos, killed, *options))
    vqvae2(*train_command(photos, killed, *options))
    assert_same_run(tmp_path / "whole", killed)
    names = load_file(killed / "model.safetensors")
    assert names.keys() == VQVAE2.from_pretrained(killed).state_dict().keys()
    last = metrics(killed)[-1]
    assert {"perceptual", "generator", "discriminator", "adaptive_weight"} <= {
        name for line in metrics(killed) for name in line
    }
    assert (last["step"], "validation/perceptual" in last) == (STEPS, True)
    averaged = torch.load(
        sorted((killed / "checkpoints").iterdir())[-1] / "custom_checkpoint_0.pkl",
        weights_only=False,
    )["averaged"]
    assert all(
        torch.equal(tensor, averaged[f"autoencoder.{name}"]) for name, tensor in names.items()
    ), "the last weights are kept"


def test_an_image_too_small_to_judge_is_refused(photos: Path, tmp_path: Path) -> None:
    refused = vqvae2(
        *train_command(photos, tmp_path / "x", "--discriminator.weight", 0.8), check=False
    )
    assert (refused.returncode, "discriminator.num_layers is 3" in refused.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
