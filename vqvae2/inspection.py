"""What a trained autoencoder has learned: use of its codebooks, each level's share, quality."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqvae2.codebook_stats import carriers, perplexity, usage, verdict
from vqvae2.common.loading import some_rows
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import in_rows, num_columns, sheet, to_pil
from vqvae2.data import ImageDataset, to_images
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer

BATCH = 64  # images
Figures = dict[str, dict[str, dict[str, float]]]  # title of a table -> row -> column -> value
ERRORS = ("kept", "shuffled", "most frequent", "alone kept")


class InformationSplit(NamedTuple):
    """Mean squared errors in [-1, 1] with the codes of levels kept or taken away."""

    kept: float  # all codes kept: the reconstruction
    shuffled: tuple[float, ...]  # per level: its codes taken from another image
    neutral: tuple[float, ...]  # per level: its codes replaced by each position's most frequent one
    alone: tuple[float, ...]  # per level: all *other* levels' codes replaced so


class Inspection(NamedTuple):
    """Figures over a whole set of N images."""

    counts: tuple[Tensor, ...]  # how often each code occurs, (K,) per level
    codes: tuple[Tensor, ...]  # (N, h, w) per level, on the CPU
    neutral_codes: tuple[Tensor, ...]  # the most frequent code of each position, (h, w) per level
    split: InformationSplit
    psnr: float  # mean of 10 log10(4 / MSE), in decibels: [-1, 1] is 2 from end to end
    ssim: float  # mean structural similarity, at most 1


@torch.no_grad()
def inspect(model: VQVAE2, images: ImageDataset, device: torch.device) -> Inspection:
    """Look at a model through a set of images, at least two of them."""
    # Encode all images.
    starts = range(0, len(images), BATCH)
    batches = [range(start, min(start + BATCH, len(images))) for start in starts]
    encoded: list[list[Tensor]] = []
    for rows in progress_bar(batches, desc="encoding", leave=False):
        levels = model.encode(_load(images, rows, device))
        encoded.append([level.codes.cpu() for level in levels])
    codes = tuple(torch.cat(level) for level in zip(*encoded, strict=True))  # (N, h, w) each
    neutral = tuple(level.mode(dim=0).values for level in codes)
    sizes = model.config.codebook_size_per_level
    pairs = zip(codes, sizes, strict=True)
    counts = tuple(torch.bincount(level.flatten(), minlength=size) for level, size in pairs)

    # Decode them, also with some levels' codes replaced, and sum what is measured. Images may be in
    # the order of their classes, so the other image is far away.
    others = [level.roll(len(images) // 2, dims=0) for level in codes]
    kept = psnr = similarity = 0.0
    sums = {kind: [0.0] * len(codes) for kind in ("shuffled", "neutral", "alone")}
    for rows in progress_bar(batches, desc="decoding", leave=False):
        originals = _load(images, rows, device)
        own = [level[rows.start : rows.stop].to(device) for level in codes]
        strange = [level[rows.start : rows.stop].to(device) for level in others]
        decoded, errors = _decode(model, own, originals)
        kept += errors.sum().item()
        psnr += (10 * torch.log10(4 / errors.clamp(min=1e-12))).sum().item()
        similarity += ssim(decoded, originals).sum().item()
        for level in range(len(codes)):
            rest = [*range(level), *range(level + 1, len(codes))]
            shuffled = replace_levels(own, strange, [level])
            without = replace_levels(own, neutral, [level])
            alone = replace_levels(own, neutral, rest)
            for totals, variant in zip(sums.values(), (shuffled, without, alone), strict=True):
                totals[level] += _decode(model, variant, originals)[1].sum().item()

    # Means over the images.
    number = len(images)
    kinds = [tuple(total / number for total in totals) for totals in sums.values()]
    split = InformationSplit(kept / number, *kinds)
    return Inspection(counts, codes, neutral, split, psnr / number, similarity / number)


def _decode(model: VQVAE2, codes: Sequence[Tensor], originals: Tensor) -> tuple[Tensor, Tensor]:
    """Images from codes, and their mean squared errors `(B,)`."""
    decoded = model.decode_codes(codes).clamp(-1, 1)
    return decoded, (decoded - originals).square().mean(dim=(1, 2, 3))


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
        looked_up = cast(Quantizer, model.quantizers[number]).lookup(level_codes)
        left_out = model.config.level_dropout > 0 and number > level
        embeddings.append(torch.zeros_like(looked_up) if left_out else looked_up)
    return model.decode(embeddings)


@torch.no_grad()
def reconstruction_sheet(
    model: VQVAE2, images: ImageDataset, device: torch.device, *, num_images: int
) -> Image.Image:
    """Originals above their reconstructions, some of the set, in whole rows."""
    columns = num_columns(min(num_images, len(images)), 2)
    number = min(num_images, len(images)) // columns * columns
    originals = _load(images, some_rows(len(images), number), device)
    above, below = to_pil(originals), to_pil(model(originals).reconstruction)
    rows: list[Sequence[Image.Image]] = []
    for pair in zip(in_rows(above, columns), in_rows(below, columns), strict=True):
        rows += pair
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
    """What a code stands for, `(n, C, 2s, 2s)` for stride s: a cell, and half a cell around it, of
    each of the first `number` images that have the code."""
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


def make_figures(names: Sequence[str], found: Inspection) -> Figures:
    """The tables of numbers."""
    split, levels = found.split, {}
    codebooks: dict[str, dict[str, float]] = {}
    for level, (name, counts) in enumerate(zip(names, found.counts, strict=True)):
        used = round(usage(counts) * len(counts))
        codebooks[name] = {"codes": len(counts), "used": used, "perplexity": perplexity(counts)}
        codebooks[name]["codes that carry 95 %"] = carriers(counts)
        errors = split.kept, split.shuffled[level], split.neutral[level], split.alone[level]
        levels[name] = dict(zip(ERRORS, errors, strict=True))
    quality = {"MSE": split.kept, "PSNR (dB)": found.psnr, "SSIM": found.ssim}
    return {
        "Reconstruction": {"all levels": quality},
        "Codebooks": codebooks,
        "Information split: MSE with a level's codes ...": levels,
    }


def make_verdicts(names: Sequence[str], found: Inspection) -> list[str]:
    """What the figures mean, and which setting to change where something is wrong."""
    sentences = [verdict(name, counts)[1] for name, counts in zip(names, found.counts, strict=True)]
    ratios = [shuffled / max(found.split.kept, 1e-12) for shuffled in found.split.shuffled]
    if max(ratios) < 1.05:
        return [*sentences, "No level carries anything yet: train longer."]
    for name, ratio in zip(names, ratios, strict=True):
        other = "another image's codes there"
        judged = f"is needed: {other} multiply the error by {ratio:.1f}."
        if ratio < 1.05:
            judged = f"carries almost nothing: {other} change the error by {ratio - 1:.1%}; make "
            judged += "the other levels' grids (model.strides) or codebook_sizes smaller."
        sentences.append(f"{name}: {judged}")
    return sentences
