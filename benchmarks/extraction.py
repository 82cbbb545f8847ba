"""What preparation and extraction hold in memory, and how long they take, as the data grows: 1x, 4x, 16x images in tar shards.

    python benchmarks/extraction.py [--images 2000] [--size 32]

Images are drawn anew (coloured noise through JPEG) and written as WebDataset shards of 500; each stage runs in a process of its own, so that its
peak memory is its own. What one process must hold should not grow, and the time should grow with the images.
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
print("FIGURES", time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
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
    result = subprocess.run(
        [sys.executable, "-c", STAGE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(result.stderr)
    figures = next(
        line for line in result.stdout.splitlines() if line.startswith("FIGURES")
    ).split()
    return float(figures[1]), float(figures[2])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="images at 1x")
    parser.add_argument(
        "--size",
        type=int,
        default=32,
        help="pixels that the model sees; the files have twice as many",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first = write_shards(root / "data_1", options.images, options.size)
        model = [
            "--config",
            "tiny",
            "--model.image.size",
            options.size,
            "--model.image.channels",
            3,
            "--num-steps",
            2,
        ]
        run("train", *model, "--data.path", first, "--output-dir", root / "vqvae")
        print(f"{'images':>8} {'stage':>20} {'seconds':>8} {'images/s':>9} {'peak MiB':>9}")
        for factor in (1, 4, 16):
            number = options.images * factor
            shards = (
                first
                if factor == 1
                else write_shards(root / f"data_{factor}", number, options.size)
            )
            image = [
                "--image.size",
                options.size,
                "--image.channels",
                3,
                "--image.background",
                "black",
            ]  # as the recipe
            stages = {
                "prepare (stream)": [
                    "prepare",
                    *image,
                    "--data.streaming",
                    "--data.path",
                    shards,
                    "--output-dir",
                    root / f"prepared_{factor}",
                ],
                "extract (stream)": [
                    "extract",
                    "--data.streaming",
                    "--data.path",
                    shards,
                    "--output-dir",
                    root / f"stream_{factor}",
                ],
                "extract (files)": [
                    "extract",
                    "--data.path",
                    shards,
                    "--output-dir",
                    root / f"files_{factor}",
                ],
                "extract (prepared)": [
                    "extract",
                    "--data.path",
                    root / f"prepared_{factor}",
                    "--output-dir",
                    root / f"again_{factor}",
                ],
            }
            for name, arguments in stages.items():
                model_flag = ["--vqvae", root / "vqvae"] if name.startswith("extract") else []
                seconds, peak = run(*arguments, *model_flag)
                print(
                    f"{number:8d} {name:>20} {seconds:8.1f} {number / seconds:9.0f} {peak:9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
