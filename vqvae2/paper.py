"""The networks of the VQ-VAE-2 paper, as the widely used implementation has them.

Letters: B batch, h w a level's code grid, s a stride, E hidden width, R residual width.
"""

import math
from itertools import pairwise

from torch import Tensor, nn

from vqvae2.config import VQVAE2Config


class Network(nn.Sequential):
    """Layers one after the other. Dynamo traces no frame of torch's own `nn.Sequential.forward`, so
    that without this one `compile` would leave the layers as they are."""

    def forward(self, features: Tensor, end: int | None = None) -> Tensor:
        """`(B, channels, h, w)` through the layers before `end`, or all."""
        for layer in list(self)[:end]:
            features = layer(features)
        return features


class ResidualBlock(nn.Sequential):
    """x + conv1x1(ReLU(conv3x3(ReLU(x)))): E -> R -> E channels."""

    def __init__(self, config: VQVAE2Config) -> None:
        hidden, residual = config.hidden_channels, config.residual_channels
        conv3x3 = nn.Conv2d(hidden, residual, kernel_size=3, padding=1)
        conv1x1 = nn.Conv2d(residual, hidden, kernel_size=1)
        super().__init__(nn.ReLU(), conv3x3, nn.ReLU(inplace=True), conv1x1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, E, h, w)` to the same shape."""
        return features + super().forward(features)


def make_encoder(in_channels: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, in_channels, s*h, s*w)` to `(B, E, h, w)`, by a strided convolution per factor of 2."""
    hidden, halvings = config.hidden_channels, int(math.log2(config.strides[level]))
    widths = [in_channels, hidden // 2, *[hidden] * (halvings - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(widths[-1], hidden, kernel_size=3, padding=1))
    layers += [ResidualBlock(config) for _ in range(config.num_residual_blocks)]
    return Network(*layers, nn.ReLU(inplace=True))


def make_decoder(in_channels: int, out: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, in_channels, h, w)` to `(B, out, s*h, s*w)`: an encoder mirrored."""
    hidden, halvings = config.hidden_channels, int(math.log2(config.strides[level]))
    widths = [*[hidden] * max(1, halvings - 1), *[hidden // 2] * (halvings > 1), out]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)]
    layers += [ResidualBlock(config) for _ in range(config.num_residual_blocks)] + [nn.ReLU()]
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return Network(*layers[:-1])


def make_upsampler(channels: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, channels, h, w)` to `(B, channels, s*h, s*w)`, by transposed convolutions alone."""
    steps = range(int(math.log2(config.strides[level])))
    return Network(*(nn.ConvTranspose2d(channels, channels, 4, 2, padding=1) for _ in steps))
