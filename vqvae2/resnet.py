"""The networks of VQGAN (Esser et al. 2021) and of LlamaGen (Sun et al. 2024), for any number of
levels. With one level they are theirs, layer for layer; `pipelines.importers` reads their weights.

On the grid of the top there is attention: after each residual block, and in a *middle* (a residual
block, attention, a residual block). Upsampling repeats pixels, which leaves no checkerboards.

Letters: B batch, h w a grid, C channels of a layer, E width of the features.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.config import VQVAE2Config
from vqvae2.paper import Network

FEW_CHANNELS = 128  # below which, on a CPU, it pays to move pixels instead of computing in fp32


class GroupNorm(nn.GroupNorm):
    """Of 32 groups, or as many as divide the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, h, w)` to the same shape."""
        normalize = super().forward
        if features.is_cuda or torch.compiler.is_compiling():
            return normalize(features)

        # Under autocast, backwards, torch's kernel for bf16 in channels_last takes up to 40 times
        # as long as others.
        if torch.is_grad_enabled():
            if features.dtype == self.weight.dtype:
                return normalize(features)
            if features.shape[1] < FEW_CHANNELS:
                normal = normalize(features.contiguous())
                return normal.contiguous(memory_format=torch.channels_last)
            return normalize(features.float()).to(features.dtype)

        # The threads share the pixels of a batch. If a thread's share ended inside an image, its
        # sums would depend on its place: then each image is computed on its own.
        if len(features) % torch.get_num_threads() == 0:
            return normalize(features)
        return torch.cat([normalize(image) for image in features.split(1)])


class ResidualBlock(nn.Module):
    """x + conv3x3(SiLU(norm(conv3x3(SiLU(norm(x))))))."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(before), conv3x3(before, after)
        self.norm2, self.conv2 = GroupNorm(after), conv3x3(after, after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """`(B, before, h, w)` to `(B, after, h, w)`."""
        changes = self.conv1(F.silu(self.norm1(features)))
        changes = self.conv2(F.silu(self.norm2(changes)))
        return self.shortcut(features) + changes


class Attention(nn.Module):
    """x + attention of every pixel to all pixels, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, h, w)` to the same shape."""
        normal, height = self.norm(features), features.shape[2]
        q, k, v = (
            rearrange(layer(normal), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v)
        )
        read = F.scaled_dot_product_attention(q, k, v)
        return features + self.proj_out(rearrange(read, "b 1 (h w) c -> b c h w", h=height))


class Downsample(nn.Conv2d):
    """A convolution of stride 2, padded only on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, 2h, 2w)` to `(B, C, h, w)`."""
        return super().forward(F.pad(features, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """A convolution of the image with each pixel repeated twice in both directions.

    Computed at once, as the transposed convolution of stride 2 that it is: two neighbours that show
    the same pixel add up their kernel's values, so that four products remain of nine.
    """

    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        in_a_row = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        self.register_buffer("sums", torch.kron(in_a_row, in_a_row).T, persistent=False)  # (9, 16)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, C, 2h, 2w)`."""
        with torch.autocast(features.device.type, enabled=False):
            kernel = rearrange(self.weight, "o i h w -> i o (h w)") @ self.sums
        kernel = rearrange(kernel, "i o (h w) -> i o h w", h=4)
        return F.conv_transpose2d(features, kernel, self.bias, stride=2, padding=1)


def make_encoder(in_channels: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, in_channels, s*h, s*w)` to `(B, E, h, w)`, s the level's stride.

    Only the encoder that reads images has residual blocks on its finest grid: what the others
    read comes out of such blocks already.
    """
    widths = _widths(level, config)[::-1]  # fine to coarse
    channels, layers = widths[0], [conv3x3(in_channels, widths[0])]
    for step, width in enumerate(widths):
        if step:
            layers.append(Downsample(channels))
        if step or level == config.num_levels - 1:
            coarsest = level == 0 and step == len(widths) - 1
            layers += _blocks(channels, width, config.num_residual_blocks, coarsest)
            channels = width
    if level == 0:
        layers += _middle(channels)
    return Network(
        *layers, GroupNorm(channels), nn.SiLU(), conv3x3(channels, config.hidden_channels)
    )


def make_decoder(in_channels: int, out: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, in_channels, h, w)` to `(B, out, s*h, s*w)`: an encoder mirrored."""
    widths, hidden = _widths(level, config), config.hidden_channels
    channels = widths[0]
    layers = [nn.Conv2d(in_channels, hidden, kernel_size=1), conv3x3(hidden, channels)]
    if level == 0:
        layers += _middle(channels)
    for step, width in enumerate(widths):
        if step:
            layers.append(Upsample(channels))
        if step < len(widths) - 1 or level == config.num_levels - 1:
            coarsest = level == 0 and step == 0
            layers += _blocks(channels, width, config.num_residual_blocks + 1, coarsest)
            channels = width
    return Network(*layers, GroupNorm(channels), nn.SiLU(), conv3x3(channels, out))


def make_upsampler(channels: int, level: int, config: VQVAE2Config) -> Network:
    """`(B, channels, h, w)` to `(B, channels, s*h, s*w)`."""
    steps = range(int(math.log2(config.strides[level])))
    return Network(*(Upsample(channels) for _ in steps))


def conv3x3(before: int, after: int) -> nn.Module:
    """A convolution that keeps the grid."""
    return nn.Conv2d(before, after, kernel_size=3, padding=1)


def _widths(level: int, config: VQVAE2Config) -> tuple[int, ...]:
    """Channels at the resolutions from a level's grid to the next finer one, or to the image."""
    first = int(math.log2(math.prod(config.strides[:level])))
    return config.widths[first : first + int(math.log2(config.strides[level])) + 1]


def _blocks(before: int, after: int, number: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in range(number):
        layers.append(ResidualBlock(before if block == 0 else after, after))
        if attention:
            layers.append(Attention(after))
    return layers


def _middle(channels: int) -> list[nn.Module]:
    before, after = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
    return [before, Attention(channels), after]
