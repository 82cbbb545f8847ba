"""Are the demo's samples what was asked for? A classifier judges class-conditional samples.

    python benchmarks/demo_quality.py --pipeline runs/demo/pipeline

It trains a small convolutional classifier on the real training images that come with the package
(kept in --classifier for the next time) and prints how often it is right: on real held-out images,
on their reconstructions, and on samples, whose class is the one that was asked for. It also prints
how varied the samples of a class are beside real images of it: the mean distance between pairs, in
pixels and in the classifier's features.
"""

import argparse
from collections.abc import Sequence
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
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    padded = F.pad(torch.where(mirrored, images.flip(-1), images), (2, 2, 2, 2), value=-1)
    places = torch.randint(0, 5, (len(images), 4), generator=generator).tolist()
    out = []
    for image, (down, right, y, x) in zip(padded, places, strict=True):
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
    """Mean distance between pairs of images: in pixels (root mean square), and in features."""
    pixels, features = images.flatten(1), model.features(images)
    in_pixels = torch.pdist(pixels).mean().item() / pixels.shape[1] ** 0.5
    return in_pixels, torch.pdist(features).mean().item()


def tensors(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images in [-1, 1] and labels of a set."""
    batch = dataset.__getitems__(range(len(dataset)))
    return to_images(batch["images"]), batch["labels"]


def compare_settings(
    pipeline: VQVAE2Pipeline,
    model: Classifier,
    class_names: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Samples at several temperatures and guidance scales: how many are as asked, how many in the
    worst class, how diverse they are; a table and a plot."""
    names = ("as asked", "lowest class", "diversity of features")
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in names}
    classes = range(len(class_names))
    asked = torch.arange(options.num_images) % len(classes)
    print(f"temperature  guidance   {'   '.join(names)}")
    for temperature in (0.8, 0.9, 1.0):
        for scale in (1.0, 1.5, 2.0, 3.0):
            settings = {"temperature": temperature, "guidance_scale": scale, "seed": options.seed}
            settings["labels"] = class_names
            output = pipeline(options.num_images, output_type="pt", lanes=100, **settings)
            right = (judge(model, output.images) == asked).float()
            of_class = [right[asked == label].mean().item() for label in classes]
            diverse = [diversity(model, output.images[asked == label])[1] for label in classes]
            values = (right.mean().item(), min(of_class), sum(diverse) / len(classes))
            row = f"{temperature:11.1f} {scale:9.1f} {values[0]:10.1%} {values[1]:14.1%}"
            print(f"{row} {values[2]:23.2f}", flush=True)
            for name, value in zip(names, values, strict=True):
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
    per_level = {"type": float, "nargs": "+", "help": "one value, or one per level"}
    parser.add_argument("--temperature", default=[1.0], **per_level)
    parser.add_argument("--guidance-scale", default=[1.5], **per_level)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--classifier", type=Path, default=Path("runs/demo_quality_classifier.pt"))
    table = "a PNG file: compare temperatures and guidance scales instead, and plot them in it"
    parser.add_argument("--table", type=Path, help=table)
    options = parser.parse_args()
    keep_freed_memory()

    data = DataConfig(path=str(files("pipelines") / "demo_data" / "fashion_mnist.parquet"))
    image = PreprocessingConfig(size=(32,), channels=1, fit="pad", background="black")
    splits = load_images(data, image)
    real, real_labels = tensors(splits.validation)
    if options.classifier.exists():
        model = Classifier(len(splits.class_names))
        model.load_state_dict(torch.load(options.classifier, weights_only=True))
        model.eval()
    else:
        number = len(splits.class_names)
        model = train_classifier(*tensors(splits.train), number, num_epochs=options.epochs)
        options.classifier.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.classifier)

    pipeline = VQVAE2Pipeline.from_pretrained(options.pipeline)
    if options.table is not None:
        compare_settings(pipeline, model, splits.class_names, options)
        return
    with torch.no_grad():
        batches = [pipeline.vqvae(batch).reconstruction for batch in real.split(100)]
    settings = {"temperature": options.temperature, "guidance_scale": options.guidance_scale}
    settings["labels"] = splits.class_names  # of any order in the pipeline
    samples = pipeline(
        options.num_images, output_type="pt", lanes=100, seed=options.seed, show_progress=True,
        **settings,
    ).images  # fmt: skip
    asked = torch.arange(options.num_images) % len(splits.class_names)
    on_real = (judge(model, real) == real_labels).float()
    on_reconstructions = (judge(model, torch.cat(batches)) == real_labels).float()
    on_samples = (judge(model, samples) == asked).float()

    print(f"\n{'':12} {'':>9} {'right on':>8} {'':>8}    {'diversity: pixels':22} features")
    titles = f"{'class':12} {'real':>9} {'recon.':>8} {'samples':>8}"
    print(f"{titles}    {'real / samples':22} real / samples")
    for label, name in enumerate(splits.class_names):
        of_class, sampled = real_labels == label, asked == label
        real_of_class = real[of_class][: int(sampled.sum())]
        real_pixels, real_features = diversity(model, real_of_class)
        pixels, features = diversity(model, samples[sampled])
        right = [on_real[of_class], on_reconstructions[of_class], on_samples[sampled]]
        varied = f"{real_pixels:.3f} / {pixels:.3f}          {real_features:.2f} / {features:.2f}"
        print(f"{name:12} {as_row(right)}    {varied}")
    print(f"{'all':12} {as_row([on_real, on_reconstructions, on_samples])}")


def as_row(right: list[Tensor]) -> str:
    """The share of ones in each: of real images, reconstructions and samples."""
    real, reconstructions, samples = (values.mean() for values in right)
    return f"{real:9.1%} {reconstructions:8.1%} {samples:8.1%}"


if __name__ == "__main__":
    main()
