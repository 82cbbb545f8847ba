"""What a user would take instead, for the same time: a class-conditional DDPM of diffusers.

    pip install -e ".[benchmark]"
    python benchmarks/ddpm.py --data.path photos --minutes 60 --num-samples 2000 --output-dir ddpm
    vqvae2 evaluate --samples ddpm/samples --pipeline runs/x/pipeline --data.path photos \\
        --output-dir ddpm/evaluation
    vqvae2 evaluate --compare runs/x/evaluation ddpm/evaluation

Noise schedule, optimizer, average of the weights and batch size are those of diffusers' own
training example for unconditional images; the network is its UNet2DModel, of a size that learns
something in an hour on two CPU cores, with classes as that takes them, at a rate of 0.0005. Samples
are drawn by DDIM in `--sampling-steps` steps. Images are prepared by `vqvae2`, at 32 x 32 pixels by
default.

A minute is one in which all `--num-threads` compute: other work on the machine does not count.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.config import DataConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, load_images, to_images


def make_network(options: argparse.Namespace, num_classes: int) -> UNet2DModel:
    """Three resolutions, attention at the middle one."""
    widths = (options.width, 2 * options.width, 2 * options.width)
    return UNet2DModel(
        sample_size=options.size,
        in_channels=options.channels,
        out_channels=options.channels,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=num_classes or None,
    ).to(memory_format=torch.channels_last)


def computed_seconds(options: argparse.Namespace) -> float:
    """CPU time of this process, shared out to its threads."""
    return time.process_time() / options.num_threads


def train(dataset: ImageDataset, num_classes: int, options: argparse.Namespace) -> UNet2DModel:
    """Train for `--minutes`; returns the averaged network."""
    # The learning rate falls to 0 at the end of the time: some steps say how many will fit.
    network = make_network(options, num_classes)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
    )
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    started, limit, probe = computed_seconds(options), 60 * options.minutes, 10
    schedule, step, num_steps = None, 0, probe
    bar = tqdm(desc="ddpm", unit="step")
    while step < num_steps:
        for chosen in torch.randperm(len(dataset)).split(options.batch_size):
            batch = dataset.__getitems__(chosen.tolist())
            images = to_images(batch["images"])
            labels = batch["labels"] if num_classes else None

            # Mean squared error of the predicted noise.
            noise, steps = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
            noised = noising.add_noise(images, noise, steps)
            noised = noised.contiguous(memory_format=torch.channels_last)
            loss = F.mse_loss(network(noised, steps, class_labels=labels).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(network.parameters())

            # How many steps fit into the time; the bar.
            step += 1
            if step == probe:
                num_steps = int(limit / (computed_seconds(options) - started) * probe)
                warmup = min(500, num_steps // 10)
                schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps, 0.5)
                bar.total = num_steps
            if schedule is not None:
                schedule.step()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if step >= num_steps or computed_seconds(options) - started > limit:
                num_steps = step
                break
    bar.close()
    minutes = (computed_seconds(options) - started) / 60
    print(f"{step} steps of {options.batch_size} images in {minutes:.1f} minutes", flush=True)
    average.copy_to(network.parameters())
    return network.eval()


@torch.no_grad()
def sample(
    network: UNet2DModel, names: list[str], classes: Tensor, options: argparse.Namespace
) -> None:
    """PNG files in a folder per class, as often of each as these class numbers are."""
    generator = torch.Generator().manual_seed(options.seed)
    sampler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    sampler.set_timesteps(options.sampling_steps)
    folders = [options.output_dir / "samples" / name for name in names or ["all"]]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    started = computed_seconds(options)
    numbers = torch.arange(options.num_samples)
    places = torch.randint(len(classes), (len(numbers),), generator=generator)
    classes = classes[places]
    for chosen in tqdm(numbers.split(50), desc="sampling", unit="batch"):
        labels = classes[chosen] if names else None
        shape = (len(chosen), options.channels, options.size, options.size)
        images = torch.randn(shape, generator=generator)
        for moment in sampler.timesteps:
            predicted = network(images, moment, class_labels=labels).sample
            images = sampler.step(predicted, moment, images, eta=0.0).prev_sample
        for number, pixels in zip(chosen.tolist(), to_bytes(images), strict=True):
            picture = Image.fromarray(pixels.squeeze(-1).numpy())
            picture.save(folders[classes[number]] / f"{number:06}.png")
    per_image = (computed_seconds(options) - started) / options.num_samples
    print(f"sampling: {1e3 * per_image:.0f} ms per image", flush=True)


def to_bytes(images: Tensor) -> Tensor:
    """`(B, C, H, W)` in [-1, 1] to `(B, H, W, C)` uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)


def main() -> None:
    """Train, then sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data.path", dest="path", required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("ddpm"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--fit", default="pad", help="see vqvae2 train --model.image.fit")
    parser.add_argument("--background", default="black")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)

    data = DataConfig(path=options.path)
    image = PreprocessingConfig(
        size=(options.size,),
        channels=options.channels,
        fit=options.fit,
        background=options.background,
    )
    splits = load_images(data, image)
    names = list(splits.class_names or [])
    network = train(splits.train, len(names), options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(options.output_dir / "network")
    images = splits.train
    classes = torch.tensor([images.label(row) or 0 for row in range(len(images))])
    sample(network, names, classes, options)


if __name__ == "__main__":
    main()
