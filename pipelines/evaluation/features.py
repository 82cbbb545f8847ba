"""What images are compared by: networks that turn them into features, and what is kept of these.

Nothing is downloaded: weights come from a local file or from an installed package.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.evaluation import inception
from pipelines.evaluation.classifier import ClassifierConfig
from pipelines.evaluation.inception import Inception
from pipelines.evaluation.network_files import load_network
from pipelines.model_index import part_hash
from vqvae2.common.artifact import load_all_weights, read_weights
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, whole_file
from vqvae2.common.pictures import as_rgb, to_bytes
from vqvae2.efficientnet import efficientnet_file, load_efficientnet, smooth_resize

logger = logging.getLogger(__name__)
VERSION = 1  # of the networks and resizing here: a new number where features change
LANES = 16  # images that go through a network together, always: the last bits depend on it
CHOICES = "choose classifier, inception, efficientnet, timm:NAME or a TorchScript or ONNX file"


class Extractor:
    """A frozen network: images to features.

    Args:
        name: as the user gives it.
        network: `features(images)` gives `(B, dim)`; `head(features)`, if there is one, logits.
        weights_hash: SHA-256 of the weights.
        example: images `(1, C, H, W)` uint8 of the kind that the network takes.
        version: of what turns images into features, besides the weights.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        *,
        weights_hash: str,
        example: Tensor,
        device: str | torch.device = "cpu",
        version: str = str(VERSION),
    ) -> None:
        self.name, self.version, self.weights_hash = name, version, weights_hash
        self.device, self.channels = device, example.shape[1]
        self.network = network.eval().requires_grad_(False).to(device)
        self.dim = self._features(example).shape[1]

    @property
    def is_published(self) -> bool:
        """Whether these are the features of the FID, KID and inception scores in papers."""
        return self.name == "inception" and self.weights_hash.startswith(inception.FID_WEIGHTS)

    @property
    def distance_name(self) -> str:
        """Name of the Frechet distance: "FID" only where it can be compared with that of papers."""
        return "FID" if self.is_published else f"FD ({self.name})"

    @property
    def kernel_distance_name(self) -> str:
        """Name of the kernel distance, likewise."""
        return "KID" if self.is_published else f"KD ({self.name})"

    @property
    def identity(self) -> str:
        """Equal exactly for extractors whose features may be compared."""
        return f"{self.name} {self.version} {self.weights_hash}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, uint8, or floats in [-1, 1] that are rounded to it, to features
        `(B, dim)` in fp32 on the CPU. They do not depend on which images are given together."""
        if images.dtype != torch.uint8:
            images = to_bytes(images)
        if self.channels == 3:
            images = as_rgb(images)
        features = [torch.empty(0, self.dim)]
        for rows in images.split(LANES):
            padding = (0, 0, 0, 0, 0, 0, 0, LANES - len(rows))
            features.append(self._features(F.pad(rows, padding))[: len(rows)].cpu())
        return torch.cat(features)

    def _features(self, images: Tensor) -> Tensor:
        try:
            features = self.network.features(images.to(self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of a network of the user's own
            what = f"{self.name} cannot compute features of {tuple(images.shape)} images"
            reason = " ".join(str(error).split())
            raise UserError(f"{what} ({reason:.300}): give a network for this size.") from None
        if not isinstance(features, Tensor) or features.shape[:1] + features.shape[2:] != (
            len(images),
        ):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise UserError(
                f"{self.name} makes {shape} of {tuple(images.shape)} images: one row of features "
                "for each image, (B, D), is expected of a network."
            )
        return features.float()

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor | None:
        """Of the classes that the network knows, `(B, classes)`, from its features; or None."""
        head, config = (getattr(self.network, name, None) for name in ("head", "config"))
        if isinstance(config, ClassifierConfig) and not config.of_labels:
            return None
        return None if head is None else head(features.to(self.device)).softmax(dim=1).cpu()


def make_extractor(
    name: str,
    weights_file: str | Path | None = None,
    *,
    classifier: Any = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """The extractor of a name.

    Args:
        name: `classifier`, `inception`, `efficientnet`, `timm:NAME`, or the path of a TorchScript
            or ONNX file, which is called with RGB `(B, 3, H, W)` uint8.
        weights_file: for `inception` and `timm:NAME`.
        classifier: a trained `Classifier`, for `classifier`.

    Raises:
        UserError: an unknown name, a missing package, or a file that is not what is needed.
    """
    # Which names take a file of weights.
    takes_file = name == "inception" or name.startswith("timm:")
    path = Path(weights_file or "").expanduser()
    if takes_file and weights_file is None:
        source = inception.URL if name == "inception" else "the model's weights"
        raise UserError(f"{name} needs --weights-file: download {source} and give its path.")
    if not takes_file and weights_file is not None:
        raise UserError(f"{name} takes no --weights-file: leave it out.")

    # The network, and what names its weights.
    shape, version = (3, 64, 64), str(VERSION)
    network: Any
    if name == "classifier":
        network, weights_hash = classifier, part_hash(classifier)
        shape = (classifier.config.channels, *classifier.config.size)
    elif name == "inception":
        advice = f"give --weights-file the path of {inception.URL}"
        network = Inception()
        load_all_weights(network, path, advice)
        weights_hash = file_hash(path)
    elif name == "efficientnet":
        network, weights_hash = load_efficientnet(), file_hash(efficientnet_file())
    elif name.startswith("timm:"):
        network = _Timm(name.removeprefix("timm:"), path)
        weights_hash, version = file_hash(path), f"{VERSION}, timm {network.version}"
    elif Path(name).expanduser().is_file():
        path = Path(name).expanduser()
        network, weights_hash, name = _NetworkFile(path), file_hash(path), path.name
    else:
        raise UserError(f"there are no features {name!r}: {CHOICES}.")
    example = torch.zeros(1, *shape, dtype=torch.uint8)
    return Extractor(
        name, network, weights_hash=weights_hash, example=example, device=device, version=version
    )


class _Timm(nn.Module):
    """A model of timm with the weights of a local file, and the preprocessing that it names."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, path: Path) -> None:
        super().__init__()
        # The package and the weights, which go before any address that it knows.
        state = read_weights(path, "correct --weights-file")
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
            reason = str(error).splitlines()[0]
            raise UserError(
                f"timm cannot be imported ({reason}): install timm, and the torchvision that "
                "belongs to this torch."
            ) from None
        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}: choose one of timm.list_models().")
        try:
            given = {"state_dict": state}
            self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given)
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise UserError(
                f"{path} holds no weights of {name} ({reason}): give its own."
            ) from None

        # How it wants images, and what it tells apart.
        self.version = timm.__version__
        data = timm.data.resolve_model_data_config(self.model)
        self.size = tuple(data["input_size"][1:])
        self.register_buffer("mean", torch.tensor(data["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(data["std"])[:, None, None])
        classes = self.model.get_classifier()
        if isinstance(classes, nn.Linear):
            self.head = classes

    def features(self, images: Tensor) -> Tensor:
        """RGB `(B, 3, H, W)` uint8 to `(B, D)`: what the model's classifier reads."""
        x = (smooth_resize(images, self.size) / 255 - self.mean) / self.std
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


class _NetworkFile(nn.Module):
    """A network of another program."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.module = load_network(path)
        try:
            self.features(torch.zeros(LANES, 3, 64, 64, dtype=torch.uint8))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise UserError(
                f"{path} fails on RGB images (B, 3, H, W) of bytes ({reason}): save a network that "
                "takes them, of any size and in batches of any."
            ) from None

    def features(self, images: Tensor) -> Tensor:
        return self.module(images)


def kept_arrays(
    folder: Path,
    extractor: Extractor,
    images_hash: str,
    compute: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What was computed from a set of images with an extractor: from `folder`, else computed now.

    Args:
        images_hash: of the images' content: what it is kept by, with the extractor's identity.
        compute: features, or whatever else, by name.
    """
    key = hashlib.sha256(f"{extractor.identity} {images_hash}".encode()).hexdigest()
    path = folder / f"{key[:32]}.npz"
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        pass
    except Exception as error:  # of many kinds, for the bytes may be anything
        logger.warning("%s cannot be read (%s): made again.", path, type(error).__name__)
    arrays = compute()
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return arrays
