"""Whether the input keeps up: training steps on images from a folder and on a batch in memory.

    python benchmarks/input_rate.py --data.path photos --image.size 64

Blocks of steps run in turns; figures are medians. Pictures are decoded and resized once, in the
first epoch, and then come from memory.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice, repeat
from statistics import median
from typing import Any

import torch

from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.accelerate import keep_freed_memory, native_bf16
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import ImagesConfig
from vqvae2.data import load_images
from vqvae2.losses import make_loss


def make_step(image: PreprocessingConfig) -> Any:
    """A training step as `fit` makes it."""
    torch.manual_seed(0)
    model = VQVAE2(VQVAE2Config(image=image)).train()
    loss_fn = make_loss("mse", model.config.codebook_size_per_level)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16()):
            loss, _ = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Any, batches: Iterator[dict[str, torch.Tensor]], number: int) -> float:
    """Time of this many steps."""
    started = time.perf_counter()
    for batch in islice(batches, number):
        step(batch)
    return time.perf_counter() - started


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data.path", dest="path", required=True)
    parser.add_argument("--image.size", dest="size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="per block")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()
    image = PreprocessingConfig(size=(options.size,))
    images = load_images(ImagesConfig(path=options.path), image).train
    step = make_step(image)
    loader = ShuffledLoader(images, options.batch_size)
    from_folder, in_memory = loader.start_at(0), repeat(next(loader.start_at(0)))
    first_epoch = len(images) // options.batch_size
    cold = seconds(step, from_folder, first_epoch) / first_epoch
    folder, memory = [], []
    for _ in range(options.rounds):
        folder.append(seconds(step, from_folder, options.steps) / options.steps)
        memory.append(seconds(step, in_memory, options.steps) / options.steps)
    rates = {
        "first epoch, decoding": cold,
        "folder, later epochs": median(folder),
        "one batch in memory": median(memory),
    }
    for name, value in rates.items():
        rate, share = options.batch_size / value, median(memory) / value
        print(f"{name:24} {rate:8.1f} images/s   {share:6.1%} of the rate in memory")


if __name__ == "__main__":
    main()
