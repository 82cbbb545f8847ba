"""How different two images look to a network that was trained on photographs."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.artifact import read_weights
from vqvae2.common.errors import UserError
from vqvae2.common.pictures import as_rgb
from vqvae2.config import PerceptualConfig
from vqvae2.efficientnet import efficientnet_file, load_efficientnet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


def perceptual_file(config: PerceptualConfig) -> Path:
    """The file of the network's weights. Raises a `UserError` if none is named or installed."""
    if config.network == "efficientnet":
        return efficientnet_file()
    if config.weights_file is None:
        advice = f"download {URL} and give its path, or take --perceptual.network efficientnet"
        raise UserError(f"perceptual.weights_file is not set: {advice}.")
    return Path(config.weights_file).expanduser()


def load_perceptual(config: PerceptualConfig) -> "FeatureDistance":
    """The `FeatureDistance` that the configuration names, frozen: with LPIPS's weights if the file
    has them.

    Raises:
        UserError: no weights file, or one that does not hold the weights of such a network.
    """
    path = perceptual_file(config)
    if config.network == "efficientnet":
        return FeatureDistance(load_efficientnet()).requires_grad_(False).eval()
    state = read_weights(path, f"give perceptual.weights_file the path of {URL}")

    # Torchvision's names: features.0.weight, ...; LPIPS's: lin0.model.1.weight, ...
    convolutions: dict[str, Tensor] = {}
    layer_weights: list[Tensor] = []
    for name in sorted(state):
        if re.fullmatch(r"(features\.)?\d+\.(weight|bias)", name):
            convolutions[name.removeprefix("features.")] = state[name]
        if re.fullmatch(r"lin\d\.model\.1\.weight", name):
            layer_weights.append(state[name].flatten())
    try:
        network = VGGFeatures(convolutions)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds no weights of a VGG ({reason}): give {URL}.") from None
    return FeatureDistance(network, layer_weights).requires_grad_(False).eval()


class FeatureDistance(nn.Module):
    """The squared difference of feature vectors of length 1, summed over the layers.

    Args:
        network: RGB images in [-1, 1] to feature maps `(B, channels, h, w)`.
        layer_weights: how much each channel of each layer counts `(channels,)` in LPIPS (Zhang et
            al. 2018, equation 1); without them every channel counts 1.
    """

    def __init__(self, network: nn.Module, layer_weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.network, self.num_weights = network, len(layer_weights)
        for number, weights in enumerate(layer_weights):
            self.register_buffer(f"layer_weights_{number}", weights[:, None, None])

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to their mean distance `()`; no gradient to `images`."""
        with torch.no_grad():
            others = self._features(images)
        distance = reconstruction.new_zeros(())
        for number, one in enumerate(self._features(reconstruction)):
            squares = (one - others[number]).square()
            if self.num_weights:
                squares = squares * getattr(self, f"layer_weights_{number}")
            distance = distance + reduce(squares, "b c h w -> b h w", "sum").mean()
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        maps = self.network(as_rgb(images))
        return [F.normalize(features.to(images.dtype), dim=1) for features in maps]


class VGGFeatures(nn.Module):
    """The convolutions of a VGG (Simonyan and Zisserman 2015), sized as their weights are.

    `state` has `N.weight` and `N.bias` in torchvision's numbering: a ReLU follows each convolution,
    and a pooling where there is a gap of one more. Raises KeyError, ValueError or RuntimeError if
    these are not the weights of a VGG.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        numbers = sorted(int(name.split(".")[0]) for name in state if name.endswith(".weight"))
        if not numbers:
            raise ValueError("no weight is named features.0.weight, features.2.weight, ...")
        self.convolutions = nn.ModuleDict()
        for number in numbers:
            out_channels, in_channels, _, _ = state[f"{number}.weight"].shape
            self.convolutions[str(number)] = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.convolutions.load_state_dict(dict(state))
        self.ends_stage = [after - number == 3 for number, after in pairwise(numbers)] + [True]

    def forward(self, images: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` in [-1, 1] to what comes before each pooling and at the end."""
        scaled = (images / 2 + 0.5 - self.mean) / self.std
        stages, features = [], scaled.contiguous(memory_format=torch.channels_last)
        for convolution, ends in zip(self.convolutions.values(), self.ends_stage, strict=True):
            features = F.relu(convolution(features))
            if ends:
                stages.append(features)
                features = F.max_pool2d(features, 2) if min(features.shape[2:]) > 1 else features
        return stages
