"""What a trained autoencoder has learned: how its codebooks are used, what each level carries, how well images come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from vqvae2.data import ImageDataset, to_images
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer

Change = Callable[[list[Tensor]], list[Tensor]]  # of a batch's codes


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
    """Mean over the images of 10 log10(4 / MSE), in decibels: the peak-to-peak range of [-1, 1] is 2."""
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
    ranges = [
        range(first, min(first + batch_size, len(images)))
        for first in range(0, len(images), batch_size)
    ]
    parts: list[list[Tensor]] = []
    for rows in tqdm(ranges, desc="encoding", disable=not show_progress, leave=False):
        parts.append([level.codes.cpu() for level in model.encode(_load(images, rows, device))])
    codes = [torch.cat(level) for level in zip(*parts, strict=True)]
    sizes = model.config.codebook_size_per_level
    counts = tuple(
        torch.bincount(c.flatten(), minlength=k) for c, k in zip(codes, sizes, strict=True)
    )
    neutral = tuple(c.mode(dim=0).values for c in codes)

    # Every way of taking levels away, as a change of a batch's codes; an image's stranger is the next image of the set.
    levels = range(len(codes))
    ways: dict[str, Change] = {"kept": lambda batch: batch}
    for level in levels:
        ways[f"neutral_{level}"] = partial(replace_levels, neutral=neutral, levels=[level])
        ways[f"alone_{level}"] = partial(
            replace_levels, neutral=neutral, levels=[other for other in levels if other != level]
        )
    errors = dict.fromkeys([*ways, *(f"shuffled_{level}" for level in levels)], 0.0)
    signal, similarity = 0.0, 0.0
    for rows in tqdm(ranges, desc="decoding", disable=not show_progress, leave=False):
        originals = _load(images, rows, device)
        own = [c[rows.start : rows.stop].to(device) for c in codes]
        strange = [c.roll(-1, dims=0)[rows.start : rows.stop].to(device) for c in codes]
        variants = {name: change(own) for name, change in ways.items()}
        variants |= {
            f"shuffled_{level}": [strange[i] if i == level else own[i] for i in levels]
            for level in levels
        }
        for name, variant in variants.items():
            decoded = model.decode_codes(variant).clamp(-1, 1)
            per_image = (decoded - originals).square().mean(dim=(1, 2, 3))
            errors[name] += per_image.sum().item()
            if name == "kept":
                signal += (10 * torch.log10(4 / per_image.clamp(min=1e-12))).sum().item()
                similarity += ssim(decoded, originals).sum().item()
    mean = {name: total / len(images) for name, total in errors.items()}
    per_level = {
        kind: tuple(mean[f"{kind}_{level}"] for level in levels)
        for kind in ("shuffled", "neutral", "alone")
    }
    return Inspection(
        counts,
        tuple(codes),
        neutral,
        InformationSplit(kept=mean["kept"], **per_level),
        signal / len(images),
        similarity / len(images),
    )


def replace_levels(
    codes: Sequence[Tensor], neutral: Sequence[Tensor], levels: Sequence[int]
) -> list[Tensor]:
    """Codes `(B, h, w)` of every level, with those of some levels replaced by neutral ones `(h, w)`."""
    return [neutral[i].to(c.device).expand_as(c) if i in levels else c for i, c in enumerate(codes)]


@torch.no_grad()
def decode_level(
    model: VQVAE2, codes: Sequence[Tensor], neutral: Sequence[Tensor], level: int
) -> Tensor:
    """Images `(B, C, H, W)` from one level alone: coarser levels at their most frequent codes, finer ones left out.

    A model that was trained with level dropout knows how to do without finer levels; any other gets their most frequent codes as well.
    """
    others = [other for other in range(len(codes)) if other != level]
    embeddings = [
        cast(Quantizer, model.quantizers[i]).lookup(c)
        for i, c in enumerate(replace_levels(codes, neutral, others))
    ]
    if model.config.level_dropout:
        embeddings = [e if i <= level else torch.zeros_like(e) for i, e in enumerate(embeddings)]
    return model.decode(embeddings)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity `(B,)` of images `(B, C, H, W)` in [-1, 1] (Wang et al. 2004, equation 13), mean over pixels and channels.

    A Gaussian window of 11 pixels and sigma 1.5 (smaller where the image is), K1 = 0.01, K2 = 0.03. The measure is meant for values from 0 to
    the data range, so images are moved to [0, 2].
    """
    images, others = (
        images.double() + 1,
        others.double() + 1,
    )  # variances are small differences of large numbers
    width = min(11, images.shape[-1], images.shape[-2])
    width -= 1 - width % 2
    offsets = torch.arange(width, device=images.device, dtype=images.dtype) - width // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        flat = rearrange(x, "b c h w -> (b c) 1 h w")
        flat = F.conv2d(F.conv2d(flat, window[None, None, :, None]), window[None, None, None, :])
        return rearrange(flat, "(b c) 1 h w -> b c h w", b=len(x))

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    a, b = blur(images), blur(others)
    var_a, var_b, covariance = (
        blur(images**2) - a**2,
        blur(others**2) - b**2,
        blur(images * others) - a * b,
    )
    similarity = (
        (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.mean(dim=(1, 2, 3))


def code_patches(images: ImageDataset, codes: Tensor, code: int, *, number: int) -> Tensor:
    """What a code stands for: the cells of the first images that have it, with half a cell of their surroundings, `(n, C, 2s, 2s)` for stride s."""
    found = (codes == code).nonzero()
    _, first = torch.unique(
        found[:, 0], return_inverse=True
    )  # one cell per image, so that the patches differ
    cells = (
        found[[int((first == i).nonzero()[0]) for i in range(min(number, int(first.max()) + 1))]]
        if len(found)
        else found
    )
    patches = []
    for image, row, column in cells.tolist():
        pixels = to_images(images.__getitems__([image])["images"])
        stride_y, stride_x = pixels.shape[2] // codes.shape[1], pixels.shape[3] // codes.shape[2]
        margin_y, margin_x = stride_y // 2, stride_x // 2
        padded = F.pad(pixels, (margin_x, margin_x, margin_y, margin_y), mode="replicate")
        patches.append(
            padded[
                0,
                :,
                row * stride_y : (row + 1) * stride_y + 2 * margin_y,
                column * stride_x : (column + 1) * stride_x + 2 * margin_x,
            ]
        )
    return torch.stack(patches) if patches else torch.empty(0)


def _load(images: ImageDataset, rows: range, device: torch.device) -> Tensor:
    return to_images(images.__getitems__(rows)["images"].to(device))
