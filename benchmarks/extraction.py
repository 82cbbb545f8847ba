"""What preparation and extraction hold in memory, and how long they take, as the data grows.

    python benchmarks/extraction.py [--images 2000] [--size 32]

1x, 4x and 16x images (coloured noise through JPEG) are written as WebDataset shards of 500. Each
stage runs in a process of its own, so that its peak memory is its own. What one process holds
should not grow, and the time should grow with the images.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PER_SHARD = 500
STAGE = """
import resource, sys, time
from pipelines.cli import main
began = time.perf_counter()
assert main(sys.argv[1:]) == 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("FIGURES", time.perf_counter() - began, peak)
"""


def write_shards(folder: Path, number: int, size: int) -> Path:
    """Tar shards of JPEG files."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for first in range(0, number, PER_SHARD):
        with tarfile.open(folder / f"{first // PER_SHARD:05d}.tar", "w") as archive:
            for i in range(first, min(first + PER_SHARD, number)):
                file = io.BytesIO()
                coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                coarse.resize((size * 2, size * 2), Image.Resampling.BICUBIC).save(file, "JPEG")
                member = tarfile.TarInfo(f"{i:09d}.jpg")
                member.size = len(file.getvalue())
                archive.addfile(member, io.BytesIO(file.getvalue()))
    return folder


def run(*arguments: object) -> tuple[float, float]:
    """Seconds and peak MiB of a command."""
    program = [sys.executable, "-c", STAGE, *map(str, arguments)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    lines = result.stdout.splitlines()
    figures = next(line for line in lines if line.startswith("FIGURES")).split()
    return float(figures[1]), float(figures[2])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="images at 1x")
    size_help = "pixels that the model sees; the files have twice as many"
    parser.add_argument("--size", type=int, default=32, help=size_help)
    options = parser.parse_args()
    image = ["--image.size", options.size, "--image.channels", 3]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_shards(root / "data_1", options.images, options.size)
        train = ["train", "--config", "tiny", *image, "--num-steps", 2, "--data.path", data]
        run(*train, "--output-dir", root / "vqvae")
        extract = ["extract", "--vqvae", root / "vqvae"]
        prepare = ["prepare", *image, "--image.background", "black"]  # as in the recipe
        print(f"{'images':>8} {'stage':>20} {'seconds':>8} {'images/s':>9} {'peak MiB':>9}")
        for factor in (1, 4, 16):
            number, x = options.images * factor, root / f"x{factor}"
            if factor > 1:
                data = write_shards(root / f"data_{factor}", number, options.size)
            stages = {
                "prepare (stream)": [*prepare, "--data.streaming", "--data.path", data],
                "extract (stream)": [*extract, "--data.streaming", "--data.path", data],
                "extract (prepared)": [*extract, "--data.path", x / "prepare (stream)"],
            }
            for name, arguments in stages.items():
                seconds, peak = run(*arguments, "--output-dir", x / name)
                figures = f"{seconds:8.1f} {number / seconds:9.0f} {peak:9.0f}"
                print(f"{number:8d} {name:>20} {figures}", flush=True)


if __name__ == "__main__":
    main()
