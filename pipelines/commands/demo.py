"""`vqvae2 demo`: the whole method on images that come with the package, by the demo recipe."""

import logging
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pipelines.cli import COMMANDS, function_of, load_recipe, recipe_section
from pipelines.config import DemoConfig
from prior.manifest import read_manifest
from vqvae2.common.config import from_dict
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import best_validation
from vqvae2.common.runs import RunRecord

logger = logging.getLogger(__name__)
IMAGES = files("pipelines") / "demo_data" / "fashion_mnist.parquet"
SUMMARY = """
Made in {root}/:
  vqvae/ codes/ prior_0/ prior_1/       each stage's artifacts, metrics.jsonl and images/
  pipeline/                             all of it, for VQVAE2Pipeline.from_pretrained
  reconstructions/reconstructions.png   held-out images above their reconstructions
  samples/samples.png                   new images, one row per class

Held out: reconstruction MSE {mse:.4f} (pixels in [-1, 1])
{levels}

Sample more:  vqvae2 sample --pipeline {root}/pipeline --labels sneaker bag --guidance-scale 2 \\
    --seed 1 --output-dir {root}/more"""


@writes_output
def demo(config: DemoConfig) -> None:
    """Train the autoencoder, extract its codes, train both priors, assemble, reconstruct, sample.
    Raises `Stopped` at SIGTERM or Ctrl-C; running it again continues."""
    root = Path(config.output_dir)
    run = RunRecord("demo", config, "demo_config.yaml")
    run.check(root)
    run.write(root)
    budget, made = config.budget, {"vqvae": f"{root}/vqvae"}
    codes, priors = f"{root}/codes", [f"{root}/prior_0", f"{root}/prior_1"]
    with as_file(IMAGES) as images:
        data = {"path": str(images)}
        _run("train", budget, data=data, output_dir=made["vqvae"])
        _run("extract", budget, **made, data=data, output_dir=codes)
        for level, folder in enumerate(priors):
            _run("train-prior", budget, **made, level=str(level), codes=codes, output_dir=folder)
        _run("assemble", budget, **made, priors=priors, output_dir=f"{root}/pipeline")
        if not (shown := root / "reconstructions" / "reconstructions.png").exists():
            options = {"data": data, "held_out": True, "output_dir": str(shown.parent)}
            _run("reconstruct", budget, **made, **options)
    if not (shown := root / "samples" / "samples.png").exists():
        _run("sample", budget, pipeline=f"{root}/pipeline", output_dir=str(shown.parent))
    logger.info(summary(root))


def demo_recipe(budget: float) -> dict[str, Any]:
    """The demo recipe with this share of its training steps."""
    recipe = load_recipe("demo")
    for section in recipe.values():
        if "num_steps" in section:
            section["num_steps"] = max(1, round(section["num_steps"] * budget))
    return recipe


def _run(command: str, budget: float, **settings: Any) -> None:
    """A subcommand with the demo recipe's section and these settings."""
    section = recipe_section(demo_recipe(budget), command, settings.get("level", "")) | settings
    logger.info(f"\nvqvae2 {command} -> {settings['output_dir']}")
    function_of(command)(from_dict(COMMANDS[command][0], section, "recipe demo"))


def summary(root: Path) -> str:
    """The last screen: what was made, how good it is, and what to do next."""
    manifest, stage_1 = read_manifest(root / "codes"), best_validation(root / "vqvae")
    levels = []
    for level, size in enumerate(manifest.codebook_sizes):
        prior, (height, width) = best_validation(root / f"prior_{level}"), manifest.grids[level]
        name, used = ("top", "bottom")[level], stage_1[f"perplexity_{level}"]
        bits, alone = prior["bits_per_code"], f"by frequency alone {prior['unigram_bits']:.2f}"
        codes = f"{name:<7} {height} x {width} codes: perplexity {used:.0f} of {size}"
        levels.append(f"  {codes}; the prior needs {bits:.2f} bits per code ({alone})")
    return SUMMARY.format(root=root, mse=stage_1["mse"], levels="\n".join(levels))
