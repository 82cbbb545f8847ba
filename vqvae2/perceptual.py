"""How different two images look to a network that was trained on photographs; networks come from local files alone, nothing is downloaded."""

import importlib.util
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.errors import UserError
from vqvae2.config import PerceptualConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_perceptual(config: PerceptualConfig) -> nn.Module:
    """The network that the configuration names, frozen: reconstructions and images `(B, C, H, W)` in [-1, 1] to their mean distance `()`.

    Raises:
        UserError: its weights are not on this machine, or not what they should be, or its package is not installed.
    """
    if config.network == "lpips":
        distance: nn.Module = LPIPS(_lpips_network())
    elif config.network.startswith("timm/"):
        distance = _timm_distance(config.network.removeprefix("timm/"), config.weights_file)
    else:
        distance = _vgg_distance(config.weights_file)
    return distance.requires_grad_(False).eval()


def as_rgb(images: Tensor) -> Tensor:
    """Three channels of `(B, C, H, W)`: grey (with or without alpha) three times, else the first three."""
    return images[:, :1].expand(-1, 3, -1, -1) if images.shape[1] < 3 else images[:, :3]


class FeatureDistance(nn.Module):
    """The squared difference of feature maps whose vectors were scaled to length 1, summed over layers (Zhang et al. 2018, equation 1).

    Args:
        network: RGB images to a list of feature maps `(B, channels, h, w)`.
        layer_weights: per layer, how much each channel counts `(channels,)`, as LPIPS learned it from people's judgement; without it 1.
        mean, std: what the network was trained to expect, for images in [0, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layer_weights: list[Tensor] | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.network, self.num_layers = network, len(layer_weights or [])
        for number, weights in enumerate(layer_weights or []):
            self.register_buffer(f"layer_weights_{number}", weights)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """`(B, C, H, W)` twice to `()`; the gradient reaches the reconstruction alone."""
        with torch.no_grad():
            wanted = self._features(images)
        distance = reconstruction.new_zeros(())
        for number, (one, other) in enumerate(
            zip(self._features(reconstruction), wanted, strict=True)
        ):
            squares = (one - other).square()
            if self.num_layers:
                squares = squares * getattr(self, f"layer_weights_{number}")[:, None, None]
            distance = distance + reduce(squares, "b c h w -> b h w", "sum").mean()
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        scaled = (as_rgb(images) / 2 + 0.5 - self.mean) / self.std  # type: ignore[operator]
        return [F.normalize(features.to(images.dtype), dim=1) for features in self.network(scaled)]


class VGGFeatures(nn.Module):
    """The convolutions of a VGG (Simonyan and Zisserman 2015), built as its weights say; gives what comes before each pooling and at the end."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        numbers = sorted(int(name.split(".")[0]) for name in state if name.endswith(".weight"))
        self.convolutions = nn.ModuleDict()
        for number in numbers:
            out_channels, in_channels, *_ = state[f"{number}.weight"].shape
            self.convolutions[str(number)] = nn.Conv2d(
                in_channels, out_channels, kernel_size=3, padding=1
            )
        self.convolutions.load_state_dict(dict(state))
        # In torchvision's numbering a ReLU follows each convolution, and where there is a gap of one more, a pooling.
        self.ends_stage = [after - number == 3 for number, after in pairwise(numbers)] + [True]

    def forward(self, images: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` to one feature map per stage."""
        found, features = [], images.contiguous(memory_format=torch.channels_last)
        for convolution, ends_stage in zip(
            self.convolutions.values(), self.ends_stage, strict=True
        ):
            features = F.relu(convolution(features))
            if ends_stage:
                found.append(features)
                features = F.max_pool2d(features, 2) if min(features.shape[2:]) > 1 else features
        return found


class LPIPS(nn.Module):
    """LPIPS as torchmetrics or lpips compute it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """`(B, C, H, W)` twice to `()`."""
        return self.network(as_rgb(reconstruction), as_rgb(images)).mean().to(images.dtype)


def _vgg_distance(weights_file: str | None) -> nn.Module:
    if weights_file is None:
        raise UserError(
            "perceptual.network is 'vgg', but perceptual.weights_file says no file: fetch torchvision's weights "
            "(https://download.pytorch.org/models/vgg16-397923af.pth) and give their path."
        )
    state = _read_weights(Path(weights_file).expanduser())
    kernels = {
        name.removeprefix("features."): tensor
        for name, tensor in state.items()
        if re.fullmatch(r"(features\.)?\d+\.(weight|bias)", name)
    }
    if not kernels or any(
        tensor.ndim != 4 for name, tensor in kernels.items() if name.endswith("weight")
    ):
        raise UserError(
            f"{weights_file} does not hold the weights of a VGG without batch normalisation (features.0.weight, ...): give torchvision's vgg16 file."
        )
    try:
        network = VGGFeatures(kernels)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{weights_file} does not hold the weights of a VGG ({str(error).splitlines()[0]}): give torchvision's vgg16 file."
        ) from None
    learned = [
        state[name].flatten()
        for name in sorted(state)
        if re.fullmatch(r"lin\d\.model\.1\.weight", name)
    ]
    return FeatureDistance(
        network, layer_weights=learned or None, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"perceptual.weights_file is {path}, but there is no such file: check the path."
        )
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # both libraries raise many kinds
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): give a state dict as .pth or .safetensors."
        ) from None


def _lpips_network() -> nn.Module:
    _need("torchvision", "perceptual.network is 'lpips'")
    try:
        from torchvision.models import VGG16_Weights
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torchvision cannot be imported ({error}): install the version that was made for torch {torch.__version__}."
        ) from None

    backbone = (
        Path(torch.hub.get_dir())
        / "checkpoints"
        / VGG16_Weights.DEFAULT.url.rsplit("/", maxsplit=1)[-1]
    )
    if not backbone.is_file():
        raise UserError(
            f"perceptual.network is 'lpips', whose backbone is not at {backbone}: fetch {VGG16_Weights.DEFAULT.url} and put it there."
        )
    if importlib.util.find_spec("lpips") is not None:
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False)
    _need("torchmetrics", "perceptual.network is 'lpips'")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net


def _timm_distance(name: str, weights_file: str | None) -> nn.Module:
    _need("timm", f"perceptual.network is 'timm/{name}'")
    import timm

    settings: Any = (
        timm.get_pretrained_cfg(name) if timm.is_model(name.split(".", maxsplit=1)[0]) else None
    )
    if settings is None:
        raise UserError(
            f"perceptual.network is 'timm/{name}', but timm knows no such model: see timm.list_models(pretrained=True)."
        )
    found = weights_file or (
        try_to_load_from_cache(settings.hf_hub_id, "model.safetensors")
        if settings.hf_hub_id
        else None
    )
    if not isinstance(found, str) or not Path(found).is_file():
        fetch = (
            f"run `hf download {settings.hf_hub_id} model.safetensors`, or "
            if settings.hf_hub_id
            else ""
        )
        raise UserError(
            f"perceptual.network is 'timm/{name}', but its weights are not at {weights_file or 'hand in the cache of the Hub'}: "
            f"{fetch}give a file as perceptual.weights_file."
        )
    try:
        network = timm.create_model(
            name, pretrained=True, features_only=True, pretrained_cfg_overlay={"file": found}
        )
    except RuntimeError as error:
        raise UserError(
            f"{found} does not hold the weights of timm's {name} ({str(error).splitlines()[0]}): give the right file."
        ) from None
    return FeatureDistance(
        network, layer_weights=None, mean=tuple(settings.mean), std=tuple(settings.std)
    )


def _need(package: str, reason: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{reason}, which needs {package}: pip install {package}, or use --perceptual.network vgg with a weights file."
        )
