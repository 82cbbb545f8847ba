"""What becomes of the textbook's codebooks, and its error, after some steps on images.

    python benchmarks/collapse.py --data.path photos --learning-rate 3e-4
    python benchmarks/collapse.py --data.path photos --learning-rate 2e-3 --cosine

For comparison with `vqvae2 train --num-steps 1500 --batch-size 32` on the same images, of which the
same ones are held out. The textbook's usual learning rate is 3e-4, which stays as it is; --cosine
lowers it to zero over the run, after 100 steps of warm-up, as ours does.
"""

import argparse
import math
from itertools import islice

import torch
from textbook import TextbookVQVAE2
from torch import Tensor
from tqdm.auto import tqdm

from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import DataConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, load_images, to_images

WARMUP = 100


def main() -> None:
    """Train, and print the error and the codes in use on held-out images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data.path", dest="path", required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--background", default="white")
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--cosine", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    settings = PreprocessingConfig(
        size=(options.size,), channels=options.channels, fit="pad", background=options.background
    )
    splits = load_images(DataConfig(path=options.path), settings)
    model = train(splits.train, options)
    error, used = judge(model, splits.validation)
    print(f"held-out MSE {error:.4f}; codes in use: top {used[0]}, bottom {used[1]}")


def train(images: ImageDataset, options: argparse.Namespace) -> TextbookVQVAE2:
    """The loss is the textbook's: squared error, and a quarter of the commitment loss."""
    model = TextbookVQVAE2(options.channels).train()
    optimizer = torch.optim.Adam(model.parameters(), options.learning_rate)

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / WARMUP)
        return rising * (1 + math.cos(math.pi * step / options.num_steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor) if options.cosine else None
    batches = ShuffledLoader(images, options.batch_size).start_at(0)
    for batch in tqdm(islice(batches, options.num_steps), total=options.num_steps, unit="step"):
        originals = to_images(batch["images"])
        reconstruction, commitment = model(originals)
        loss = (reconstruction - originals).square().mean() + 0.25 * commitment
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: TextbookVQVAE2, images: ImageDataset) -> tuple[float, list[int]]:
    """The mean squared error in [-1, 1] of a set, and how many codes of each level it uses."""
    total, codes = 0.0, ([], [])
    for rows in torch.arange(len(images)).split(64):
        originals = to_images(images.pixel_rows(rows.tolist()))
        top, bottom, _, *found = model.encode(originals)
        decoded: Tensor = model.decode(torch.cat([model.upsample(top), bottom], 1))
        total += (decoded.clamp(-1, 1) - originals).square().mean().item() * len(rows)
        for known, level in zip(codes, found, strict=True):
            known.append(level.flatten())
    return total / len(images), [len(torch.cat(level).unique()) for level in codes]


if __name__ == "__main__":
    main()
