"""VQ-VAE-2 as textbooks write it, for comparison.

NCHW, a one-hot quantizer with the whole N x K distance matrix, running averages. Layers and number
of parameters are those of ours by default. Nothing is tuned, and nothing slowed down on purpose.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OneHotQuantizer(nn.Module):
    """Distances to all codes and a one-hot matrix; running averages with Laplace smoothing."""

    def __init__(
        self, codebook_size: int, code_dim: int, decay: float = 0.99, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.codebook_size, self.decay, self.epsilon = codebook_size, decay, epsilon
        codebook = torch.randn(code_dim, codebook_size)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", codebook.clone())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, D, h, w)` to embeddings, commitment loss and codes."""
        features = features.permute(0, 2, 3, 1)
        vectors = features.reshape(-1, features.shape[-1])
        squares, code_squares = vectors.pow(2).sum(1, keepdim=True), self.codebook.pow(2).sum(0)
        codes = (squares - 2 * vectors @ self.codebook + code_squares).argmin(1)
        one_hot = F.one_hot(codes, self.codebook_size).type(vectors.dtype)
        embeddings = F.embedding(codes.view(*features.shape[:-1]), self.codebook.T)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
                self.sums.mul_(self.decay).add_(vectors.T @ one_hot, alpha=1 - self.decay)
                total = self.counts.sum()
                share = (self.counts + self.epsilon) / (total + self.codebook_size * self.epsilon)
                self.codebook.copy_(self.sums / (share * total))
        loss = (embeddings.detach() - features).pow(2).mean()
        passed = features + (embeddings - features).detach()
        return passed.permute(0, 3, 1, 2), loss, codes.view(*features.shape[:-1])


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, residual: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(residual, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + self.layers(x)


class TextbookVQVAE2(nn.Module):
    """Two levels, strides 4 and 2, E = 128, R = 32, D = 64, K = 512."""

    def __init__(
        self, channels: int = 3, e: int = 128, r: int = 32, d: int = 64, k: int = 512
    ) -> None:
        super().__init__()
        conv, up, relu = nn.Conv2d, nn.ConvTranspose2d, nn.ReLU

        def blocks() -> list[nn.Module]:
            return [Block(e, r), Block(e, r), relu()]

        down = [conv(channels, e // 2, 4, 2, 1), relu(), conv(e // 2, e, 4, 2, 1), relu()]
        self.encode_bottom = nn.Sequential(*down, conv(e, e, 3, 1, 1), *blocks())
        down = [conv(e, e // 2, 4, 2, 1), relu()]
        self.encode_top = nn.Sequential(*down, conv(e // 2, e, 3, 1, 1), *blocks())
        self.project_top, self.quantize_top = conv(e, d, 1), OneHotQuantizer(k, d)
        self.decode_top = nn.Sequential(conv(d, e, 3, 1, 1), *blocks(), up(e, d, 4, 2, 1))
        self.project_bottom, self.quantize_bottom = conv(d + e, d, 1), OneHotQuantizer(k, d)
        self.upsample = up(d, d, 4, 2, 1)
        grow = [up(e, e // 2, 4, 2, 1), relu(), up(e // 2, channels, 4, 2, 1)]
        self.decode = nn.Sequential(conv(2 * d, e, 3, 1, 1), *blocks(), *grow)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Embeddings, loss and codes of both levels."""
        bottom = self.encode_bottom(images)
        top, top_loss, top_codes = self.quantize_top(self.project_top(self.encode_top(bottom)))
        both = torch.cat([self.decode_top(top), bottom], 1)
        bottom, bottom_loss, bottom_codes = self.quantize_bottom(self.project_bottom(both))
        return top, bottom, top_loss + bottom_loss, top_codes, bottom_codes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and commitment loss."""
        top, bottom, loss, _, _ = self.encode(images)
        return self.decode(torch.cat([self.upsample(top), bottom], 1)), loss
