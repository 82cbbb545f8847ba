"""`vqvae2 extract` beside the extraction loop of the widely used implementation, in fp32.

    python benchmarks/extraction_peer.py --images FOLDER --vqvae RUN [--rounds 5]

FOLDER holds a folder for each class. The loop does the work of rosinality/vq-vae-2-pytorch's:
batches of 128 from 4 workers, transforms as torchvision computes them, `encode` with autograd on,
one pickled row per image into LMDB (pip install lmdb). Both run as commands, in turns. `loop`
counts the seconds of the loop alone; `CPU` is user and system time, which other programs disturb
less.
"""

import argparse
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

BATCH, WORKERS, MAP_BYTES = 128, 4, 100 << 30


class Row(NamedTuple):
    """What is pickled."""

    top: np.ndarray
    bottom: np.ndarray
    filename: str


def run_loop(folder: Path, size: int, output: str) -> None:
    """The loop: codes of all images into an LMDB; prints the seconds that it took."""
    import lmdb
    import torch
    from textbook import TextbookVQVAE2
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset):
        """What ImageFolder, Resize, CenterCrop, ToTensor and Normalize do to a file."""

        paths = sorted(folder.glob("*/*"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
            path = self.paths[index]
            with open(path, "rb") as file:
                image = Image.open(file).convert("RGB")
            scale = size / min(image.size)
            if scale != 1:
                width, height = (int(scale * side) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (round((side - size) / 2) for side in image.size)
            image = image.crop((left, top, left + size, top + size))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
            mean = torch.tensor([0.5, 0.5, 0.5]).view(-1, 1, 1)
            return pixels.clone().sub_(mean).div_(mean), f"{path.parent.name}/{path.name}"

    model = TextbookVQVAE2().eval()
    loader = DataLoader(Images(), batch_size=BATCH, num_workers=WORKERS)
    began, index = time.perf_counter(), 0
    with lmdb.open(output, map_size=MAP_BYTES).begin(write=True) as transaction:
        for images, names in loader:
            codes = [level.detach().numpy() for level in model.encode(images)[3:]]
            for row in map(Row, *codes, names):
                transaction.put(str(index).encode(), pickle.dumps(row))
                index += 1
        transaction.put(b"length", str(index).encode())
    print(time.perf_counter() - began)


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and output of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, output


def main() -> None:
    """Print medians, and how many times as fast ours is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--vqvae", help="a trained autoencoder with the default layers and --size")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        run_loop(options.images, options.size, options.loop)
        return
    figures: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            images = ["--images", str(options.images), "--size", str(options.size)]
            peer = timed([sys.executable, __file__, *images, "--loop", f"{folder}/lmdb"])
            command = [sys.executable, "-m", "pipelines.cli", "extract", "--vqvae", options.vqvae]
            flags = ["--data.path", str(options.images), "--output-dir", f"{folder}/codes"]
            ours = timed([*command, *flags])
        row = {"loop": float(peer[2]), "their wall": peer[0], "their CPU": peer[1]}
        for name, seconds in {**row, "our wall": ours[0], "our CPU": ours[1]}.items():
            figures.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in figures.items()}
    print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items()))
    for theirs, own in (("loop", "our wall"), ("their wall", "our wall"), ("their CPU", "our CPU")):
        print(f"{theirs} / {own}: {medians[theirs] / medians[own]:.2f}")


if __name__ == "__main__":
    main()
