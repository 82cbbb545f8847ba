"""How well defects are found: AUROC per image and per pixel, beside PCA and nearest neighbours.

    python benchmarks/anomaly.py --pipeline runs/demo/pipeline --vqvae runs/demo/vqvae \\
                                 --data pipelines/demo_data/fashion_mnist.parquet

Defects are made in held-out images: a patch of another image, noise, a hole, two parts that change
places, a scratch. Or `--data` is a folder as MVTec AD has it (train/good, test/KIND,
ground_truth/KIND), on whose train/good the pipeline was trained. `--others` names images of another
kind; digits are always tried. Also printed: how many normal images are marked at several rates,
with thresholds from others. `--picture` shows some defects and where they are seen.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from pipelines import VQVAE2Pipeline
from pipelines.commands.score import heat
from pipelines.editing import for_masks
from pipelines.scoring import ALL, HEALED, Normal, Scores, around
from vqvae2.common.loading import some_rows
from vqvae2.common.pictures import sheet, to_pil
from vqvae2.config import ImagesConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, load_picture, load_table, to_images
from vqvae2.training_record import find_held_out

KINDS = ("patch", "noise", "hole", "swapped", "scratch")
OTHER_KINDS = ("digits", "others")  # images of other kinds, not defects
Labelled = dict[str, tuple[Tensor, Tensor | None]]  # images (B, C, H, W), and defects (B, H, W)


def main() -> None:
    """Print the tables, and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--vqvae", help="the run folder, which says what it held out")
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", help="images of another kind")
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--num-train", type=int, default=10_000, help="images of the baselines")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    pipeline = VQVAE2Pipeline.from_pretrained(options.pipeline)
    settings, number = pipeline.vqvae.config.image, options.num_images

    # Images: of training, normal ones, and by kind those with defects.
    sets: Labelled = {}
    if (good := Path(options.data) / "train" / "good").is_dir():
        train = some(str(good), settings, options.num_train)
        for kind in sorted((Path(options.data) / "test").iterdir()):
            masks = Path(options.data) / "ground_truth" / kind.name
            sets[kind.name] = some(str(kind), settings), read_masks(masks, settings)
        normal = sets.pop("good")[0]
    elif options.vqvae is None:
        parser.error("--vqvae is needed, but for a folder with train/good")
    else:
        data = ImagesConfig(path=options.data)
        held_out, _ = find_held_out(options.vqvae, data, settings)
        table, unseen = load_table(data, settings), set(held_out.ids)
        rows = [i for i, name in enumerate(table.ids) if name not in unseen]
        train = pixels_of(ImageDataset(table, rows, settings), options.num_train)
        pixels = pixels_of(held_out, 3 * number)  # which may come by class: so every third
        normal, source, donors = (pixels[first : len(pixels) // 3 * 3 : 3] for first in range(3))
        for kind in KINDS:
            sets[kind] = make_defects(kind, source, donors)
    sets["digits"] = digits(number, normal), None
    if options.others:
        sets["others"] = some(options.others, settings, number), None

    # Every method is a function of images: scores (B,) and, for defects, a map (B, H, W).
    methods, seen = [*ours(pipeline).items(), *baselines(pipeline, train).items()], {}
    for name, method in methods:
        seen[name] = {kind: method(images) for kind, (images, _) in sets.items()}
        seen[name]["normal"] = method(normal)
    has_masks = any(masks is not None for _, masks in sets.values())
    for what in (0, 1)[: 1 + has_masks]:
        print("\nAUROC per", ("image", "pixel")[what])
        shown = [kind for kind, (_, masks) in sets.items() if masks is not None or not what]
        print("| |", *[f"{kind} |" for kind in shown], "mean of defects |")
        for name, results in seen.items():
            if results["normal"][what] is None:
                continue
            values = {}
            for kind in shown:
                masks, found, usual = sets[kind][1], results[kind][what], results["normal"][what]
                if what:
                    usual, found = torch.cat([found[~masks], usual.flatten()]), found[masks]
                values[kind] = auroc(usual.numpy(), found.numpy())
            mean = np.mean([value for kind, value in values.items() if kind not in OTHER_KINDS])
            print(f"| {name} |", *[f"{value:.3f} |" for value in values.values()], f"{mean:.3f} |")

    # Marked at a rate, with thresholds from every other image.
    values, maps = seen["score"]["normal"]
    places = maps.amax(dim=(1, 2))
    stored = Normal(None, "", tuple(values[::2].tolist()), tuple(places[::2].tolist()))
    for rate in (rate for rate in (0.02, 0.05, 0.1, 0.2) if rate * (len(stored.scores) + 1) >= 1):
        limits = stored.thresholds(rate)
        pairs = zip((values, places), limits, strict=True)
        shares = [float((each[1::2] > limit).float().mean()) for each, limit in pairs]
        print(f"marked at {rate:.0%}: images {shares[0]:.1%}, places {shares[1]:.1%}")
    if options.picture:
        rows = []
        for kind in (kind for kind, (_, masks) in sets.items() if masks is not None):
            images, masks, maps = *sets[kind], seen["score"][kind][1]
            for of in (to_pil(images), heat(masks.float()), heat(maps / (2 * HEALED))):
                rows.append(of[:8])
        sheet(rows).save(options.picture)


def pixels_of(images: ImageDataset, number: int) -> Tensor:
    """So many of the images in [-1, 1], drawn at random."""
    return to_images(images.pixel_rows(some_rows(len(images), number)))


def some(path: str, settings: PreprocessingConfig, number: int = 10**9) -> Tensor:
    """So many of the images at a path in [-1, 1], drawn at random, or all in order."""
    table = load_table(ImagesConfig(path=path), settings)
    return pixels_of(ImageDataset(table, range(len(table)), settings), number)


def read_masks(folder: Path, settings: PreprocessingConfig) -> Tensor | None:
    """The defects `(B, H, W)` that a folder of masks shows; none of good images."""
    if not folder.is_dir():
        return None
    paths = sorted(folder.iterdir())
    return torch.cat([load_picture(path, for_masks(settings))[:, 0] > 127 for path in paths])


def make_defects(kind: str, source: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
    """Images with one defect each, where something is to be seen; and where it is."""
    random, images = np.random.default_rng(KINDS.index(kind)), source.clone()
    height, width = source.shape[2:]
    background = source[:, :, 0, 0].median(dim=0).values[:, None, None]
    for image, donor in zip(images, donors, strict=True):
        places = ((image - background).abs().amax(dim=0) > 0.4).nonzero()
        y, x = places[random.integers(len(places))].tolist() if len(places) else (0, 0)
        side = int(random.integers(height // 5, height // 3 + 1))
        top, left = (
            min(max(0, y - side // 2), height - side),
            min(max(0, x - side // 2), width - side),
        )
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        if kind == "patch":
            image[window] = donor[window].flip(1)
        elif kind == "noise":
            image[window] = torch.from_numpy(random.uniform(-1, 1, image[window].shape)).float()
        elif kind == "hole":
            image[window] = background.expand_as(image[window])
        elif kind == "swapped":
            down, right = random.integers(height - side), random.integers(width - side)
            other = (slice(None), slice(down, down + side), slice(right, right + side))
            own = image[window].clone()
            image[window], image[other] = image[other].clone(), own
        else:
            angle, colour = random.uniform(0, np.pi), 1.0 if image[0, y, x] < 0.2 else -1.0
            for step in np.arange(-side, side, 0.5):
                down, right = round(y + step * np.sin(angle)), round(x + step * np.cos(angle))
                if 0 <= down < height and 0 <= right < width:
                    image[:, down, right] = colour
    return images, (images != source).any(dim=1)


def digits(number: int, like: Tensor) -> Tensor:
    """Digits, white on black, of several sizes and slopes, of the shape of other images."""
    random, rows = np.random.default_rng(0), []
    height, width = like.shape[2:]
    for i in range(number):
        picture = Image.new("L", (width, height))
        font = ImageFont.load_default(int(random.integers(height * 5 // 8, height * 7 // 8)))
        ImageDraw.Draw(picture).text((width / 2, height / 2), str(i % 10), 255, font, anchor="mm")
        picture = picture.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR)
        rows.append(torch.from_numpy(np.array(picture)))
    return to_images(torch.stack(rows)[:, None]).expand(-1, like.shape[1], -1, -1)


Method = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def ours(pipeline: VQVAE2Pipeline) -> dict[str, Method]:
    """What `vqvae2 score` says with its options, and its parts."""

    @cache
    def of(images: Tensor, labels: str | None = None, redraws: int = 0) -> Scores:
        return pipeline.score(images, labels, redraws)

    def score(labels: str | None = None, redraws: int = 0) -> Method:
        def method(images: Tensor) -> tuple[Tensor, Tensor]:
            scores = of(images, labels, redraws)
            return scores.score, scores.unusual_map

        return method

    def bits(images: Tensor) -> tuple[Tensor, Tensor]:
        scores = of(images)
        maps = [
            F.interpolate(grid[:, None], images.shape[2:], mode="bilinear") * grid[0].numel()
            for grid in scores.bits_map
        ]
        return scores.bits.sum(dim=1), sum(maps)[:, 0]

    def column(name: str) -> Method:
        return lambda images: (torch.from_numpy(of(images).columns(())[name]), None)

    def resampled(images: Tensor) -> tuple[Tensor, Tensor]:
        (drawn,) = pipeline.redraw(images, of(images).unusual_map > HEALED)
        maps = around((drawn - images).square().mean(dim=1), 2)
        return maps.mean(dim=(1, 2)), maps

    methods = {"score": score(), "score --redraws 4": score(None, 4)}
    if pipeline.class_names:
        methods["score --labels all"] = score(ALL)
        methods["score --labels all --redraws 4"] = score(ALL, 4)
    return methods | {
        "bits": bits,
        "excess_bits": column("excess_bits"),
        "bits_per_png_bit": column("bits_per_png_bit"),
        "error": lambda images: (
            of(images).reconstruction_error.mean(dim=(1, 2)),
            around(of(images).reconstruction_error, 2),
        ),
        "resampled difference": resampled,
    }


@torch.no_grad()
def baselines(pipeline: VQVAE2Pipeline, train: Tensor) -> dict[str, Method]:
    """What a user would try first: PCA, and the 5 nearest neighbours by pixels or by features."""
    flat = train.flatten(1)
    torch.manual_seed(0)
    _, _, basis = torch.pca_lowrank(flat, q=64, niter=2)

    def pca(images: Tensor) -> tuple[Tensor, Tensor]:
        centred = images.flatten(1) - flat.mean(dim=0)
        rest = (centred - centred @ basis @ basis.T).view_as(images).square().mean(dim=1)
        return rest.mean(dim=(1, 2)), around(rest, 2)

    def features(images: Tensor) -> Tensor:
        batches = [pipeline.vqvae.encode(few)[-1].embeddings for few in images.split(64)]
        return torch.cat(batches)

    def nearest(describe: Callable[[Tensor], Tensor]) -> Method:
        known = describe(train)

        def method(images: Tensor) -> tuple[Tensor, Tensor]:
            own = describe(images)
            distances, rows = torch.cdist(own.flatten(1), known.flatten(1)).topk(5, largest=False)
            maps = (own - known[rows].mean(dim=1)).square().mean(dim=1, keepdim=True)
            large = F.interpolate(maps, images.shape[2:], mode="bilinear")
            return distances.mean(dim=1), around(large[:, 0], 2)

        return method

    pixels = nearest(lambda images: images)
    return {"PCA": pca, "kNN, pixels": pixels, "kNN, features": nearest(torch.no_grad()(features))}


def auroc(usual: np.ndarray, found: np.ndarray) -> float:
    """How often a found value is above a usual one."""
    _, places, counts = np.unique(
        np.concatenate([usual, found]), return_inverse=True, return_counts=True
    )
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    wins = ranks[len(usual) :].sum() - len(found) * (len(found) + 1) / 2
    return float(wins / (len(usual) * len(found)))


if __name__ == "__main__":
    main()
