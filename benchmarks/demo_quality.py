"""Are the demo's samples what was asked for? A classifier of real images judges class-conditional samples.

    python benchmarks/demo_quality.py --pipeline runs/demo/pipeline

It trains a small convolutional classifier on the real training images that come with the package (kept in --classifier for the next
time), prints how often it is right on real held-out images, on their reconstructions, and how often it gives samples the class that they
were asked to be; and how varied the samples of a class are beside real images of it (mean distance between pairs, in pixels and in the
classifier's features).
"""

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pipelines import VQVAE2Pipeline
from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.common.metrics import draw_panel
from vqvae2.config import DataConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, load_images, to_images


class Classifier(nn.Module):
    """Three stages of two 3x3 convolutions on 32 x 32 grey images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 48), (48, 96), (96, 192)):
            for width in (before, after):
                layers += [
                    nn.Conv2d(width, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
            layers += [nn.MaxPool2d(2), nn.Dropout2d(0.1)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 1, 32, 32)` to logits `(B, num_classes)`."""
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, shift each by up to two pixels, and blank a square of 8 pixels."""
    images = torch.where(
        torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images
    )
    padded = F.pad(images, (2, 2, 2, 2), value=-1)
    out = []
    for image, (down, right, y, x) in zip(
        padded, torch.randint(0, 5, (len(images), 4), generator=generator).tolist(), strict=True
    ):
        cut = image[:, down : down + 32, right : right + 32].clone()
        cut[:, 6 * y : 6 * y + 8, 6 * x : 6 * x + 8] = -1
        out.append(cut)
    return torch.stack(out)


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, num_epochs: int
) -> Classifier:
    """AdamW with a one-cycle learning rate."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier(num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = num_epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(num_epochs), desc="training the classifier", unit="epoch"):
        order = torch.randperm(len(images), generator=generator)
        for first in range(0, len(images) - 127, 128):
            chosen = order[first : first + 128]
            batch = augment(images[chosen], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: Classifier, images: Tensor) -> Tensor:
    """The classes `(B,)` of images `(B, 1, 32, 32)`."""
    return torch.cat([model(part).argmax(dim=1) for part in images.split(200)])


@torch.no_grad()
def diversity(model: Classifier, images: Tensor) -> tuple[float, float]:
    """Mean distance between pairs of images: root mean square over pixels, and in the classifier's features."""
    pixels, features = images.flatten(1), model.features(images)
    return torch.pdist(pixels).mean().item() / pixels.shape[1] ** 0.5, torch.pdist(
        features
    ).mean().item()


def tensors(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images in [-1, 1] and labels of a set."""
    batch = dataset.__getitems__(range(len(dataset)))
    return to_images(batch["images"]), batch["labels"]


def compare_settings(
    pipeline: VQVAE2Pipeline, model: Classifier, options: argparse.Namespace
) -> None:
    """Samples at several temperatures and guidance scales: how many are as asked, how many in the worst class, how diverse; a table and a plot."""
    num_classes = len(pipeline.class_names)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {
        "as asked": {},
        "lowest class": {},
        "diversity of features": {},
    }
    print("temperature  guidance   as asked   lowest class   diversity of features")
    for temperature in (0.8, 0.9, 1.0):
        for scale in (1.0, 1.5, 2.0, 3.0):
            settings = {
                "temperature": temperature,
                "guidance_scale": scale,
                "seed": options.seed,
                "lanes": 100,
            }
            samples = pipeline(options.num_images, output_type="pt", **settings).images
            asked = torch.arange(options.num_images) % num_classes
            right = (judge(model, samples) == asked).float()
            of_class = [right[asked == label].mean().item() for label in range(num_classes)]
            diverse = (
                sum(diversity(model, samples[asked == label])[1] for label in range(num_classes))
                / num_classes
            )
            found = {
                "as asked": right.mean().item(),
                "lowest class": min(of_class),
                "diversity of features": diverse,
            }
            print(
                f"{temperature:11.1f} {scale:9.1f} {found['as asked']:10.1%} {found['lowest class']:14.1%} {diverse:23.2f}",
                flush=True,
            )
            for name, value in found.items():
                curves[name].setdefault(f"T = {temperature}", []).append((scale, value))
    panels = [draw_panel(name, lines, x_name="guidance") for name, lines in curves.items()]
    page = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height), "white")
    for i, panel in enumerate(panels):
        page.paste(panel, (i * panel.width, 0))
    page.save(options.table)
    print(f"{options.table}: the same as curves.")


def main() -> None:
    """Judge, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", default="runs/demo/pipeline")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], help="one value, or one per level"
    )
    parser.add_argument(
        "--guidance-scale", type=float, nargs="+", default=[1.5], help="one value, or one per level"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--classifier", type=Path, default=Path("runs/demo_quality_classifier.pt"))
    parser.add_argument(
        "--table",
        type=Path,
        help="compare temperatures and guidance scales instead, and draw them in this PNG file",
    )
    options = parser.parse_args()
    keep_freed_memory()

    data = DataConfig(path=str(files("pipelines") / "demo_data" / "fashion_mnist.parquet"))
    splits = load_images(
        data, PreprocessingConfig(size=(32,), channels=1, fit="pad", background="black")
    )
    real, real_labels = tensors(splits.validation)
    if options.classifier.exists():
        model = Classifier(len(splits.class_names))
        model.load_state_dict(torch.load(options.classifier, weights_only=True))
        model.eval()
    else:
        model = train_classifier(
            *tensors(splits.train), len(splits.class_names), num_epochs=options.epochs
        )
        options.classifier.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.classifier)

    pipeline = VQVAE2Pipeline.from_pretrained(options.pipeline)
    if options.table is not None:
        compare_settings(pipeline, model, options)
        return
    with torch.no_grad():
        reconstructions = torch.cat(
            [pipeline.vqvae(part).reconstruction for part in real.split(100)]
        )
    settings = {
        "temperature": options.temperature,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "lanes": 100,
    }
    samples = pipeline(options.num_images, output_type="pt", show_progress=True, **settings).images
    asked = torch.arange(options.num_images) % len(splits.class_names)
    on_real, on_reconstructions, on_samples = (
        judge(model, real) == real_labels,
        judge(model, reconstructions) == real_labels,
        judge(model, samples) == asked,
    )

    print(
        f"\n{'':12} {'right on':>9} {'recon-':>8} {'samples':>8}    diversity: pixels          features"
    )
    print(
        f"{'class':12} {'real':>9} {'struct.':>8} {'as asked':>8}    real / samples         real / samples"
    )
    for label, name in enumerate(splits.class_names):
        of_class, sampled = real_labels == label, asked == label
        number = int(sampled.sum())
        (real_pixels, real_features), (pixels, features) = (
            diversity(model, real[of_class][:number]),
            diversity(model, samples[sampled]),
        )
        print(
            f"{name:12} {on_real[of_class].float().mean():9.1%} {on_reconstructions[of_class].float().mean():8.1%} "
            f"{on_samples[sampled].float().mean():8.1%}    {real_pixels:.3f} / {pixels:.3f}          {real_features:.2f} / {features:.2f}"
        )
    print(
        f"{'all':12} {on_real.float().mean():9.1%} {on_reconstructions.float().mean():8.1%} {on_samples.float().mean():8.1%}"
    )


if __name__ == "__main__":
    main()
