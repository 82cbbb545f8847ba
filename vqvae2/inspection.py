"""What a trained autoencoder has learned: use of its codebooks, each level's share, quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from vqvae2.common.pictures import sheet, to_pil
from vqvae2.data import ImageDataset, to_images
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer


@dataclass(frozen=True)
class InformationSplit:
    """Mean squared errors in [-1, 1] with the codes of levels kept or taken away."""

    kept: float
    """All codes kept: the reconstruction."""
    shuffled: tuple[float, ...]
    """Per level: its codes taken from another image."""
    neutral: tuple[float, ...]
    """Per level: its codes replaced by the most frequent one of each position."""
    alone: tuple[float, ...]
    """Per level: all *other* levels' codes replaced so."""


@dataclass(frozen=True)
class Inspection:
    """Figures over a whole set of images."""

    counts: tuple[Tensor, ...]
    """How often each code occurs, `(K,)` per level."""
    codes: tuple[Tensor, ...]
    """All codes, `(N, h, w)` per level, on the CPU."""
    neutral_codes: tuple[Tensor, ...]
    """The most frequent code of each position, `(h, w)` per level."""
    split: InformationSplit
    psnr: float
    """Mean over the images of 10 log10(4 / MSE), in decibels: [-1, 1] is 2 from end to end."""
    ssim: float
    """Mean structural similarity, at most 1."""


@torch.no_grad()
def inspect(
    model: VQVAE2,
    images: ImageDataset,
    device: torch.device,
    *,
    batch_size: int = 64,
    show_progress: bool = True,
) -> Inspection:
    """Look at a model through a set of images, at least two of them."""
    # Encode all images.
    starts = range(0, len(images), batch_size)
    batches = [range(start, min(start + batch_size, len(images))) for start in starts]
    encoded: list[list[Tensor]] = []
    for rows in tqdm(batches, desc="encoding", disable=not show_progress, leave=False):
        levels = model.encode(_load(images, rows, device))
        encoded.append([level.codes.cpu() for level in levels])
    codes = tuple(torch.cat(level) for level in zip(*encoded, strict=True))  # (N, h, w) each
    neutral = tuple(level.mode(dim=0).values for level in codes)
    counts: list[Tensor] = []
    for level_codes, size in zip(codes, model.config.codebook_size_per_level, strict=True):
        counts.append(torch.bincount(level_codes.flatten(), minlength=size))

    # Decode them with some levels' codes taken away, and sum the errors of each such variant.
    errors: dict[str, float] = {}
    signal, similarity = 0.0, 0.0
    for rows in tqdm(batches, desc="decoding", disable=not show_progress, leave=False):
        originals = _load(images, rows, device)
        own = [level[rows.start : rows.stop].to(device) for level in codes]
        strange = [level.roll(-1, dims=0)[rows.start : rows.stop].to(device) for level in codes]
        for name, variant in _variants(own, strange, neutral).items():
            decoded = model.decode_codes(variant).clamp(-1, 1)
            per_image = (decoded - originals).square().mean(dim=(1, 2, 3))
            errors[name] = errors.get(name, 0.0) + per_image.sum().item()
            if name == "kept":
                signal += (10 * torch.log10(4 / per_image.clamp(min=1e-12))).sum().item()
                similarity += ssim(decoded, originals).sum().item()

    # Means over the images.
    means = {name: total / len(images) for name, total in errors.items()}
    kinds: list[tuple[float, ...]] = []
    for kind in ("shuffled", "neutral", "alone"):
        kinds.append(tuple(means[f"{kind}_{level}"] for level in range(len(codes))))
    split, number = InformationSplit(means["kept"], *kinds), len(images)
    return Inspection(tuple(counts), codes, neutral, split, signal / number, similarity / number)


def _variants(
    own: Sequence[Tensor], strange: Sequence[Tensor], neutral: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Every way of replacing levels' codes `(B, h, w)` by a stranger's or by neutral ones."""
    variants = {"kept": list(own)}
    for level in range(len(own)):
        others = [*range(level), *range(level + 1, len(own))]
        variants[f"shuffled_{level}"] = replace_levels(own, strange, [level])
        variants[f"neutral_{level}"] = replace_levels(own, neutral, [level])
        variants[f"alone_{level}"] = replace_levels(own, neutral, others)
    return variants


def replace_levels(
    codes: Sequence[Tensor], replacements: Sequence[Tensor], levels: Sequence[int]
) -> list[Tensor]:
    """Codes `(B, h, w)` of every level, some levels' replaced; `(h, w)` replaces every image's."""
    result = list(codes)
    for level in levels:
        result[level] = replacements[level].to(codes[level].device).expand_as(codes[level])
    return result


@torch.no_grad()
def decode_level(
    model: VQVAE2, codes: Sequence[Tensor], neutral: Sequence[Tensor], level: int
) -> Tensor:
    """Images `(B, C, H, W)` from one level's codes, all others at their most frequent ones.

    A model that was trained with level dropout can decode without finer levels: they are left out.
    """
    others = [other for other in range(len(codes)) if other != level]
    embeddings: list[Tensor] = []
    for number, level_codes in enumerate(replace_levels(codes, neutral, others)):
        found = cast(Quantizer, model.quantizers[number]).lookup(level_codes)
        left_out = model.config.level_dropout and number > level
        embeddings.append(torch.zeros_like(found) if left_out else found)
    return model.decode(embeddings)


@torch.no_grad()
def reconstruction_sheet(
    model: VQVAE2, images: ImageDataset, device: torch.device, *, num_images: int
) -> Image.Image:
    """Originals above their reconstructions, evenly spread over the set, in rows of eight."""
    number = min(num_images, len(images))
    indices = [i * len(images) // number for i in range(number)]
    originals = _load(images, indices, device)
    above, below = to_pil(originals), to_pil(model(originals).reconstruction)
    rows: list[list[Image.Image]] = []
    for first in range(0, number, 8):
        rows += [above[first : first + 8], below[first : first + 8]]
    return sheet(rows, ["original", "reconstruction"] * (len(rows) // 2))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity `(B,)` of images `(B, C, H, W)` in [-1, 1] (Wang 2004, equation 13).

    A Gaussian window of at most 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03.
    """
    # Values from 0, as the measure wants; float64, as variances are small differences.
    a, b = images.double() + 1, others.double() + 1
    width = min(11, *a.shape[2:])
    width -= 1 - width % 2
    offsets = torch.arange(width, device=a.device, dtype=a.dtype) - width // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        flat = rearrange(x, "b c h w -> (b c) 1 h w")
        flat = F.conv2d(F.conv2d(flat, window[None, None, :, None]), window[None, None, None, :])
        return rearrange(flat, "(b c) 1 h w -> b c h w", b=len(x))

    # Means, variances and covariance under it.
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a**2) - mean_a**2 + (blur(b**2) - mean_b**2)
    covariance = blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = numerator / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return similarity.mean(dim=(1, 2, 3))


def code_patches(images: ImageDataset, codes: Tensor, code: int, *, number: int) -> Tensor:
    """What a code stands for, `(n, C, 2s, 2s)` for stride s: cells with half a cell around them.

    One cell of each of the first images that have the code, so that the patches differ.
    """
    patches: list[Tensor] = []
    for image in (codes == code).flatten(1).any(dim=1).nonzero()[:number, 0].tolist():
        row, column = (codes[image] == code).nonzero()[0].tolist()
        pixels = to_images(images.__getitems__([image])["images"])
        height, width = pixels.shape[2] // codes.shape[1], pixels.shape[3] // codes.shape[2]
        y, x = height // 2, width // 2
        padded = F.pad(pixels, (x, x, y, y), mode="replicate")
        across = slice(column * width, (column + 1) * width + 2 * x)
        patches.append(padded[0, :, row * height : (row + 1) * height + 2 * y, across])
    return torch.stack(patches) if patches else torch.empty(0)


def _load(images: ImageDataset, rows: Sequence[int], device: torch.device) -> Tensor:
    return to_images(images.__getitems__(rows)["images"].to(device))
