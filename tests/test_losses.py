"""Perceptual and adversarial terms: who learns from what and when, and what weights are needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.cli import load_recipe
from tests.conftest import command, kill_when, vqvae2
from tests.test_model import SMALL
from tests.test_training import (
    STEPS,
    assert_same_run,
    last_checkpoint,
    line_count,
    metrics,
    train_command,
)
from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.errors import UserError
from vqvae2.config import DiscriminatorConfig, PerceptualConfig
from vqvae2.discriminator import RAMP, AdversarialPair, PatchDiscriminator
from vqvae2.efficientnet import EfficientNet
from vqvae2.losses import make_adversarial_term, make_loss
from vqvae2.perceptual import load_perceptual

IMAGES = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
ADVERSARY = DiscriminatorConfig(weight=0.8, hidden_channels=8, num_layers=2)


def make_pair(*, start: int) -> tuple[AdversarialPair, Callable]:
    """A pair in float64, and its loss with a discriminator that counts from batch `start` on."""
    torch.manual_seed(0)
    model = VQVAE2(VQVAE2Config(**(SMALL | {"image": PreprocessingConfig(size=(32,))})))
    pair = AdversarialPair(model, ADVERSARY).double().train()
    pair.start = start
    term = make_adversarial_term(ADVERSARY, model.last_layer)
    return pair, make_loss("mse", (16, 16), adversarial=term)


def gradients(module: nn.Module) -> list[Tensor]:
    parameters = module.parameters()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


# The discriminator


def test_each_term_reaches_its_own_network_alone() -> None:
    pair, loss_fn = make_pair(start=-RAMP)
    state = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    loss, figures = loss_fn(pair, {"images": IMAGES})
    loss.backward()
    found = gradients(pair.autoencoder), gradients(pair.discriminator)

    # By hand: first the discriminator alone.
    pair.load_state_dict(state)
    pair.zero_grad()
    reconstruction, levels = pair.autoencoder(IMAGES)
    real, fake = pair.discriminator(IMAGES), pair.discriminator(reconstruction.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    hinge.backward()
    torch.testing.assert_close(found[1], gradients(pair.discriminator))
    assert not any(gradient.any() for gradient in gradients(pair.autoencoder))

    # Then the autoencoder against a discriminator that cannot move.
    generator = -pair.discriminator(reconstruction).mean()
    fidelity = F.mse_loss(reconstruction, IMAGES) + levels[0].loss + levels[1].loss
    (fidelity + ADVERSARY.weight * figures["adaptive_weight"] * generator).backward()
    torch.testing.assert_close(found[0], gradients(pair.autoencoder))


def test_the_adaptive_weight_makes_both_pull_equally_at_the_last_layer() -> None:
    pair, loss_fn = make_pair(start=-RAMP)
    _, figures = loss_fn(pair, {"images": IMAGES})

    def pull(name: str) -> Tensor:
        last_layer = pair.autoencoder.last_layer
        return torch.autograd.grad(figures[name], last_layer, retain_graph=True)[0].norm()

    weighted = figures["adaptive_weight"] * pull("generator")
    # Equal but for the 1e-4 in the quotient.
    torch.testing.assert_close(weighted, pull("reconstruction"), rtol=1e-2, atol=0)


def test_before_its_start_the_discriminator_learns_and_does_not_count() -> None:
    """From the same state: up to the start the autoencoder's gradients are those without a
    discriminator, one batch later they are not."""
    pair, loss_fn = make_pair(start=7)
    state = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    plain = VQVAE2(pair.autoencoder.config).double().train()
    plain.load_state_dict(pair.autoencoder.state_dict())
    make_loss("mse", (16, 16))(plain, {"images": IMAGES})[0].backward()
    for number in (0, 7, 8):
        pair.load_state_dict(state)
        pair.num_forwards.fill_(number)
        pair.number = None  # as in a process that continues
        pair.zero_grad()
        loss_fn(pair, {"images": IMAGES})[0].backward()
        both = zip(gradients(pair.autoencoder), gradients(plain), strict=True)
        same = [torch.allclose(one, other, rtol=1e-9, atol=0) for one, other in both]
        assert all(same) if number <= 7 else not any(same[-4:])
        assert all(gradient.any() for gradient in gradients(pair.discriminator))


def test_the_start_and_the_ramp_are_counted_in_steps_of_several_parts() -> None:
    ramps: list[list[float]] = []
    for parts in (1, 4):
        model = VQVAE2(VQVAE2Config(**(SMALL | {"image": PreprocessingConfig(size=(32,))})))
        pair = AdversarialPair(model, replace(ADVERSARY, start_step=3), parts).double()
        ramps.append([])
        for step in (1, 3, 4, 3 + RAMP // 2, 3 + RAMP):
            pair.num_forwards.fill_((step - 1) * parts)
            pair.number = None
            output = pair(IMAGES)
            assert (output.fooling is None) == (step <= 3)
            ramps[-1].append(output.ramp.item())
    assert ramps[0] == ramps[1] == pytest.approx([0, 0, 1 / RAMP, 0.5, 1])


def test_a_logit_depends_on_one_image_alone() -> None:
    discriminator = PatchDiscriminator(3, ADVERSARY).double()
    torch.testing.assert_close(discriminator(IMAGES)[1:2], discriminator(IMAGES[1:2]))


def test_an_image_too_small_to_judge_is_refused(photos: Path, tmp_path: Path) -> None:
    words = train_command(photos, tmp_path / "x", "--discriminator.weight", 0.8)
    refused = vqvae2(*words, check=False)
    assert (refused.returncode, "discriminator.num_layers is 3" in refused.stderr) == (2, True)
    assert not (tmp_path / "x").exists()


# The perceptual loss


def thin_vgg(path: Path, *, judged: bool = False) -> Path:
    """A file with the layout of torchvision's VGG-16, and few channels."""
    generator = torch.Generator().manual_seed(0)
    state, before = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    widths = {0: 4, 2: 4, 5: 6, 7: 6} | dict.fromkeys((10, 12, 14, 17, 19, 21, 24, 26, 28), 8)
    for number, width in widths.items():
        kernels = torch.randn(width, before, 3, 3, generator=generator)
        state[f"features.{number}.weight"] = kernels * (2 / (9 * before)) ** 0.5
        state[f"features.{number}.bias"] = torch.zeros(width)
        before = width
    for stage, width in enumerate((4, 6, 8, 8, 8) if judged else ()):
        state[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def perceptual(path: Path) -> nn.Module:
    return load_perceptual(PerceptualConfig(weight=1, weights_file=str(path)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_distance_grows_with_the_difference(suffix: str, channels: int, tmp_path: Path) -> None:
    distance = perceptual(thin_vgg(tmp_path / f"vgg{suffix}", judged=channels == 3))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, channels, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, channels, 32, 32, generator=generator)
    near, far = (distance(images + scale * noise, images) for scale in (0.1, 0.5))
    assert distance(images, images).item() == 0 < near.item() < far.item()

    # The gradient reaches the colours of the reconstruction, and no weight.
    changed = images.clone().requires_grad_()
    distance(changed, images + 0.1 * noise).backward()
    assert changed.grad is not None
    colours = 1 if channels == 2 else min(channels, 3)
    assert changed.grad[:, :colours].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_with_the_learned_weights_the_distance_is_lpips(tmp_path: Path) -> None:
    """By hand, from Zhang et al. 2018, equation 1."""
    path = thin_vgg(tmp_path / "vgg.pth", judged=True)
    distance, state = perceptual(path), torch.load(path, weights_only=True)
    one, other = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = torch.zeros(())
    features = [(image / 2 + 0.5 - mean) / std for image in (one, other)]
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for stage, numbers in enumerate(stages):
        for number in numbers:
            kernels, bias = (state[f"features.{number}.{name}"] for name in ("weight", "bias"))
            features = [F.relu(F.conv2d(x, kernels, bias, padding=1)) for x in features]
        unit = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in features]
        weighted = state[f"lin{stage}.model.1.weight"] * (unit[0] - unit[1]).square()
        expected += weighted.sum(dim=1).mean()
        features = [F.max_pool2d(x, 2) for x in features]
    torch.testing.assert_close(distance(one, other), expected, atol=1e-6, rtol=1e-5)


def test_the_stages_of_a_vgg_are_those_of_the_layout(tmp_path: Path) -> None:
    distance = perceptual(thin_vgg(tmp_path / "vgg.pth"))
    shapes = [tuple(features.shape) for features in distance.network(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(1, 4, 32, 32), (1, 6, 16, 16), (1, 8, 8, 8), (1, 8, 4, 4), (1, 8, 2, 2)]


def test_efficientnet_needs_no_file_and_sees_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("vqvae2.perceptual.efficientnet_file", lambda: Path("package.pth"))
    monkeypatch.setattr("vqvae2.perceptual.load_efficientnet", lambda: EfficientNet().eval())
    distance = load_perceptual(PerceptualConfig(weight=0.01, network="efficientnet"))
    shapes = [tuple(maps.shape[1:]) for maps in distance.network(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(16, 16, 16), (24, 8, 8), (40, 4, 4), (112, 2, 2), (320, 1, 1)]

    # Its maps are those that its features come from.
    network = distance.network
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    (*_, last) = network(pixels / 127.5 - 1)
    features = F.relu6(network._bn1(network._conv_head(last))).mean(dim=(2, 3))
    torch.testing.assert_close(features, network.features(pixels), atol=1e-4, rtol=1e-3)

    # The distance grows with the difference, and its gradient reaches images of any channels.
    for channels, side in ((1, 16), (4, 33)):
        images = torch.rand(2, channels, side, side) * 2 - 1
        changed = (images + 0.1 * torch.randn_like(images)).requires_grad_()
        distance(changed, images).backward()
        assert changed.grad is not None
        assert changed.grad.isfinite().all()
        assert distance(images, images).item() == 0 < distance(changed, images).item()
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    with pytest.raises(UserError, match="left out with the network efficientnet"):
        PerceptualConfig(network="efficientnet", weights_file="vgg16.pth")


def test_missing_or_wrong_weights_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights_file is not set"):
        load_perceptual(PerceptualConfig(weight=1))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "flat.pth")
    for name, sentence in (
        ("nothing.pth", "there is no file"),
        ("text.pth", "cannot be read"),
        ("other.pth", "no weights of a VGG"),
        ("flat.pth", "no weights of a VGG"),
    ):
        with pytest.raises(UserError, match=sentence):
            perceptual(tmp_path / name)


# Both in a training


@pytest.mark.parametrize(("start", "warned"), [(2, False), (3, True)])
def test_a_discriminator_that_never_counts_is_warned_of(
    start: int, warned: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_command(photos, tmp_path / "run")
    flags = ("--discriminator.weight", 0.8, "--discriminator.num-layers", 1, "--num-steps", 2)
    command(*words, *flags, "--discriminator.start-step", start)
    text = capsys.readouterr()
    assert ("lower --discriminator.start-step" in text.out + text.err) == warned


def test_killed_and_continued_with_everything_on(photos: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    vgg = {"weight": 0.1, "weights_file": str(thin_vgg(tmp_path / "vgg.pth"))}
    adversary = {"weight": 0.8, "start_step": 10, "hidden_channels": 8, "num_layers": 1}
    recipe["train"] |= {"perceptual": vgg, "discriminator": adversary, "code_noise": 0.5}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(recipe))

    def words(output_dir: Path) -> list[object]:
        usual = train_command(photos, output_dir)
        return [tmp_path / "all.yaml" if word == "tiny" else word for word in usual]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(*words(whole))
    kill_when(lambda: line_count(killed) >= 9, *words(killed))
    vqvae2(*words(killed))
    assert_same_run(whole, killed)

    # Another network under the same name is noticed.
    thin_vgg(tmp_path / "vgg.pth", judged=True)
    command(*words(killed), "--num-steps", STEPS + 1, code=2)
    thin_vgg(tmp_path / "vgg.pth")

    # All terms are reported, and the last weights are kept.
    names = {name for line in metrics(killed) for name in line}
    assert {"perceptual", "generator", "discriminator", "adaptive_weight"} <= names
    last = metrics(killed)[-1]
    assert (last["step"], "validation/perceptual" in last) == (STEPS, True)
    weights = load_file(killed / "model.safetensors")
    assert weights.keys() == VQVAE2.from_pretrained(killed).state_dict().keys()
    averaged = load_file(last_checkpoint(killed) / "averaged.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, averaged[f"autoencoder.autoencoder.{name}"]), name
