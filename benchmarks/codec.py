"""How many bits an image takes, beside JPEG, WebP and AVIF, at the same error, on held-out images.

    python benchmarks/codec.py --pipeline runs/demo/pipeline --vqvae runs/demo/vqvae \\
                               --data pipelines/demo_data/fashion_mnist.parquet

The others are given a mosaic of all images, so that their headers cost next to nothing, or with
`--per-file` a file per image, and so are we. PSNR is of the mean squared error of all 8-bit values,
SSIM the mean over the images. Our bits are those of whole archives without names. Also printed: the
cost beyond the entropy that the priors give the codes, and images per second. `--others` names
other images than those that the model was trained on. Run it with OMP_NUM_THREADS=1 to time one
thread.
"""

import argparse
import io
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pipelines import VQVAE2Pipeline
from pipelines.codec import LENGTH, Codec
from vqvae2.common.loading import some_rows
from vqvae2.common.metrics import draw_panel
from vqvae2.common.pictures import to_pil
from vqvae2.config import ImagesConfig
from vqvae2.data import ImageDataset, load_table, to_images
from vqvae2.inspection import ssim
from vqvae2.training_record import find_held_out

QUALITIES = (0, 3, 6, 10, 15, 22, 30, 45, 60, 80)
OTHERS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4},
}
with suppress(ImportError):  # pip install pillow-jxl-plugin
    import pillow_jxl  # noqa: F401

    OTHERS["JPEG XL"] = {"format": "JXL", "effort": 7}
Curve = list[tuple[float, float, float]]  # bits per image, PSNR, SSIM


def main() -> None:
    """Print the tables, and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", required=True)
    parser.add_argument(
        "--vqvae", required=True, help="the run folder, which says what it held out"
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", help="images of another kind")
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--per-file", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    pipeline = VQVAE2Pipeline.from_pretrained(options.pipeline)
    settings = pipeline.vqvae.config.image
    held_out, _ = find_held_out(options.vqvae, ImagesConfig(path=options.data), settings)
    sets = {"held-out images": held_out}
    if options.others:
        table = load_table(ImagesConfig(path=options.others), settings)
        sets["other images"] = ImageDataset(table, range(len(table)), settings)
    for name, images in sets.items():
        pixels = images.pixel_rows(some_rows(len(images), options.num_images))
        ours = our_points(pipeline, pixels, per_file=options.per_file)
        curves = {kind: curve(kind, pixels, mosaic=not options.per_file) for kind in OTHERS}
        report(f"{len(pixels)} {name}", ours, curves)
        if options.picture and images is held_out:
            draw(ours, curves, options.picture)


def our_points(
    pipeline: VQVAE2Pipeline, pixels: Tensor, *, per_file: bool
) -> dict[str, tuple[float, float, float]]:
    """Bits, PSNR and SSIM of all levels, of the top alone and by frequency; prints what they cost
    beyond the entropy, and in time."""
    codec, number = Codec(pipeline), len(pixels)
    started = time.perf_counter()
    codes = pipeline.encode(pixels)
    seconds = time.perf_counter() - started
    print(f"\nautoencoder: encodes {number / seconds:,.0f} images per second")
    nats = pipeline.log_likelihood(pixels)
    entropy = -(nats.sum(dim=0) / number / math.log(2))
    assert len(codec.priors) + len(codec.hashes)  # made once
    data = {}
    for kind, fast in (("priors", False), ("frequencies", True)):
        started = time.perf_counter()
        data[kind] = codec.compress(codes, fast=fast)
        middle = time.perf_counter()
        again = codec.decompress(data[kind])
        ended = time.perf_counter()
        assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True))
        rates = f"{number / (middle - started):,.0f} and {number / (ended - middle):,.0f}"
        bits = 8 * len(data[kind]) / number
        print(f"{kind}: {bits:.1f} bits per image, codes and decodes {rates} images per second")
    bits = 8 * len(data["priors"]) / number
    parts = " + ".join(f"{part:.1f}" for part in entropy.tolist())
    print(f"entropy {entropy.sum():.1f} = {parts} bits: {bits / entropy.sum() - 1:.2%} beyond it")

    # Decoded from all levels, or from the beginning of a file.
    points = {"ours": (bits, *quality(pixels, codec.decode(codes)))}
    if per_file:
        singles = zip(*(level.split(1) for level in codes), strict=True)
        size = sum(len(codec.compress(single)) for single in singles)
        return {"ours": (8 * size / number, *points["ours"][1:])}
    points["ours, --fast"] = (8 * len(data["frequencies"]) / number, *points["ours"][1:])
    if pipeline.vqvae.config.level_dropout and len(codes) > 1:
        *_, end = codec.read_header(data["priors"], "")
        for _ in range(0, number, codec.chunk):
            end += LENGTH.size + LENGTH.unpack_from(data["priors"], end)[0]
        points["ours, top level"] = (8 * end / number, *quality(pixels, codec.decode(codes[:1])))
    return points


def quality(pixels: Tensor, images: Tensor) -> tuple[float, float]:
    """PSNR and SSIM of images `(B, C, H, W)` in [-1, 1], as files of 8 bits hold them."""
    seen = images.add(1).mul(127.5).round()
    error = (seen - pixels.float()).square().mean().item()
    similarity = ssim(seen / 127.5 - 1, to_images(pixels)).mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9)), similarity


def curve(kind: str, pixels: Tensor, *, mosaic: bool) -> Curve:
    """Bits per image, PSNR and SSIM at several qualities."""
    number, channels = pixels.shape[:2]
    across = widest_divisor(number) if mosaic else 1
    down = number // across if mosaic else 1
    grid = rearrange(pixels, "(n y x) c h w -> n c (y h) (x w)", y=down, x=across)
    sheets, points = to_pil(to_images(grid)), []
    for level in QUALITIES:
        size, decoded = 0, []
        for sheet in sheets:
            file = io.BytesIO()
            grey = {"subsampling": "4:0:0"} if channels == 1 and kind == "AVIF" else {}
            sheet.save(file, quality=level, **OTHERS[kind], **grey)
            size += file.tell()
            shown = np.asarray(Image.open(file).convert(sheet.mode))
            decoded.append(torch.from_numpy(shown.copy()).view(*shown.shape[:2], channels))
        images = rearrange(
            torch.stack(decoded), "n (y h) (x w) c -> (n y x) c h w", y=down, x=across
        )
        points.append((8 * size / number, *quality(pixels, to_images(images))))
    return points


def widest_divisor(number: int) -> int:
    """The largest divisor up to the square root: a mosaic without holes, as square as can be."""
    return next(across for across in range(math.isqrt(number), 0, -1) if number % across == 0)


def report(title: str, ours: dict[str, tuple[float, float, float]], curves: dict[str, Curve]):
    """A table: our points, and what the others need for the same PSNR, and for the same SSIM."""
    print(f"\n{title}\n\n| | bits per image | PSNR | SSIM |", *[f"{k} |" for k in curves])
    print("|---|" + "---:|" * (3 + len(curves)))
    for name, (bits, psnr, similarity) in ours.items():
        cells = []
        for points in curves.values():
            both = [
                bits_at(points, place, wanted) for place, wanted in ((1, psnr), (2, similarity))
            ]
            cells.append(" / ".join(both))
        print(
            f"| {name} | {bits:.0f} | {psnr:.2f} | {similarity:.3f} |", *[f"{c} |" for c in cells]
        )


def bits_at(points: Curve, place: int, wanted: float) -> str:
    """The bits that reach a quality, between the two nearest points of a curve."""
    rising = sorted(points, key=lambda point: point[place])
    x = [point[place] for point in rising]
    bits = math.exp(np.interp(wanted, x, [math.log(point[0]) for point in rising]))
    sign = "<" if wanted < x[0] else ">" if wanted > x[-1] else ""
    return f"{sign}{bits:.0f}"


def draw(ours: dict[str, tuple[float, float, float]], curves: dict[str, Curve], path: Path) -> None:
    """PSNR over bits per image, up to four times ours."""
    most = 4 * ours["ours"][0]
    shown = {name: [p[:2] for p in points if p[0] <= most] for name, points in curves.items()}
    mine = sorted(point[:2] for name, point in ours.items() if "fast" not in name)
    shown = {"ours": mine, **{name: points for name, points in shown.items() if len(points) > 1}}
    draw_panel("PSNR in dB", shown, x_name="bits per image").save(path)


if __name__ == "__main__":
    main()
