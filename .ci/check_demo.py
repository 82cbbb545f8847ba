"""The demo left what it promises: all artifacts, pictures that are not blank, figures in bounds."""

import sys
from pathlib import Path

from PIL import Image, ImageStat

from pipelines.commands.demo import best_validation
from prior.manifest import read_manifest

RUN_FILES = "config.json model.safetensors train_config.yaml metrics.jsonl images checkpoints"
OTHER_FILES = """codes/manifest.json codes/train/00000.parquet codes/validation/00000.parquet
pipeline/model_index.json"""

root = Path(sys.argv[1])
files = [f"{run}/{name}" for run in ("vqvae", "prior_0", "prior_1") for name in RUN_FILES.split()]
for name in [*files, *OTHER_FILES.split()]:
    assert (root / name).exists(), f"{name} is missing"
for name in ("reconstructions/reconstructions.png", "samples/samples.png"):
    with Image.open(root / name) as picture:
        assert min(picture.size) > 300, f"{name} has {picture.size} pixels"
        assert ImageStat.Stat(picture.convert("L")).stddev[0] > 30, f"{name} is blank"

manifest = read_manifest(root / "codes")
stage_1 = best_validation(root / "vqvae")
priors = [best_validation(root / f"prior_{level}") for level in (0, 1)]
bits = [round(prior["bits_per_code"], 2) for prior in priors]
print(
    f"held-out MSE {stage_1['mse']:.4f}, bottom perplexity {stage_1['perplexity_1']:.0f}, "
    f"bits per code {bits}"
)
assert stage_1["mse"] < 0.05
assert stage_1["perplexity_1"] > manifest.codebook_sizes[1] / 4
assert all(prior["bits_per_code"] < prior["unigram_bits"] for prior in priors)
