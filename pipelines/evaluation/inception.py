"""Inception-v3 as the published FID uses it: the TensorFlow graph of 2015 in PyTorch's names.

It differs from torchvision's network (Szegedy et al. 2015) in how it resizes images, in averages
that leave the padding out, and in one pooling that takes the maximum. The files of pytorch-fid and
torch-fidelity hold its weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 299  # pixels of its input
FID_WEIGHTS = "6726825d"  # how the SHA-256 of the weights of the published FID begins
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    f"pt_inception-2015-12-05-{FID_WEIGHTS}.pth"
)

# Branches of convolutions, as "name width@kernel ..."; `+` joins two that read the same input.
A = "1x1 64@1 | 5x5 48@1 64@5 | 3x3dbl 64@1 96@3 96@3"
B = "3x3 384@3 | 3x3dbl 64@1 96@3 96@3"
C = "1x1 192@1 | 7x7 {0}@1 {0}@1,7 192@7,1 | 7x7dbl {0}@1 {0}@7,1 {0}@1,7 {0}@7,1 192@1,7"
D = "3x3 192@1 320@3 | 7x7x3 192@1 192@1,7 192@7,1 192@3"
E = "1x1 320@1 | 3x3 384@1 384@1,3+384@3,1 | 3x3dbl 448@1 384@3 384@1,3+384@3,1"

BLOCKS = {  # name: the branches, their kind of pooling, the width of the convolution behind it
    "Mixed_5b": (A, "mean", 32),
    "Mixed_5c": (A, "mean", 64),
    "Mixed_5d": (A, "mean", 64),
    "Mixed_6a": (B, "halve", 0),
    "Mixed_6b": (C.format(128), "mean", 192),
    "Mixed_6c": (C.format(160), "mean", 192),
    "Mixed_6d": (C.format(160), "mean", 192),
    "Mixed_6e": (C.format(192), "mean", 192),
    "Mixed_7a": (D, "halve", 0),
    "Mixed_7b": (E, "mean", 192),
    "Mixed_7c": (E, "maximum", 192),
}


class Inception(nn.Module):
    """Images to 2048 features and 1008 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, "32@3", stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(32, "32@3", padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, "64@3")
        self.Conv2d_3b_1x1 = _Convolution(64, "80@1")
        self.Conv2d_4a_3x3 = _Convolution(80, "192@3", padded=False)
        width = 192
        for name, (branches, pooling, pooled) in BLOCKS.items():
            block = _Block(width, branches, pooling, pooled)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008)

    def features(self, images: Tensor) -> Tensor:
        """RGB `(B, 3, H, W)` uint8 to `(B, 2048)`."""
        x = (resize(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def head(self, features: Tensor) -> Tensor:
        """Features to logits `(B, 1008)`, without the bias, as the published inception score."""
        return features @ self.fc.weight.T


class _Convolution(nn.Module):
    """Convolution, batch norm, ReLU; `what` is the width and the kernel, such as 192@7,1."""

    def __init__(self, inputs: int, what: str, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        width, _, kernel = what.partition("@")
        sides = [int(side) for side in kernel.split(",")]
        size = (sides[0], sides[-1])
        padding = (size[0] // 2, size[1] // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, int(width), size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(int(width), eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches of convolutions beside a pooling, their outputs joined along the channels.

    A block that halves the grid does so in the last convolution of each branch.
    """

    def __init__(self, inputs: int, branches: str, pooling: str, pooled: int) -> None:
        super().__init__()
        self.pooling, self.width = pooling, pooled or inputs
        self.chains: list[list[list[str]]] = []  # names, of those that read the same input together
        for branch in branches.split(" | "):
            name, *steps = branch.split(" ")
            chain: list[list[str]] = []
            width, twins = inputs, [""]
            for number, step in enumerate(steps, start=1):
                twins = step.split("+")
                place = f"branch{name}" + (f"_{number}" if len(steps) > 1 else "")
                chain.append([place] if len(twins) == 1 else [f"{place}a", f"{place}b"])
                halve = pooling == "halve" and number == len(steps)
                options: dict[str, Any] = {"stride": 2, "padded": False} if halve else {}
                for key, twin in zip(chain[-1], twins, strict=True):
                    self.add_module(key, _Convolution(width, twin, **options))
                width = int(step.split("@")[0])
            self.chains.append(chain)
            self.width += width * len(twins)
        if pooled:
            self.branch_pool = _Convolution(inputs, f"{pooled}@1")

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for chain in self.chains:
            hidden = [x]
            for names in chain:
                hidden = [self.get_submodule(name)(hidden[0]) for name in names]
            outputs += hidden
        if self.pooling == "halve":
            return torch.cat([*outputs, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self.pooling == "mean":  # the padding does not count
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


def resize(images: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, C, 299, 299)` as TensorFlow 1 did: linear, by the pixels' corners."""
    rows, columns = (_weights(side, images) for side in images.shape[2:])
    return rows @ images @ columns.T


def _weights(side: int, like: Tensor) -> Tensor:
    """How much each of `side` pixels counts in each new one, `(299, side)`."""
    places = torch.arange(SIZE, dtype=like.dtype, device=like.device) * (side / SIZE)
    left = places.floor().clamp(max=side - 1)
    right = (left + 1).clamp(max=side - 1)
    share = (places - left)[:, None]
    weights = F.one_hot(left.long(), side) * (1 - share)
    return weights + F.one_hot(right.long(), side) * share
