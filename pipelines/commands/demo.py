"""The whole method on images that come with the package: the staged commands one after the other, with the demo recipe."""

import json
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pipelines.cli import COMMANDS, function_of, load_recipe, recipe_section
from pipelines.config import DemoConfig
from prior.manifest import read_manifest
from vqvae2.common.config import from_dict
from vqvae2.common.runs import RunRecord


def demo(config: DemoConfig) -> None:
    """Train the autoencoder, extract its codes, train both priors, assemble, reconstruct and sample.

    Raises:
        Stopped: SIGTERM or Ctrl-C came; running it again continues.
    """
    root = Path(config.output_dir)
    run = RunRecord("demo", config, "demo_config.yaml")
    run.check(root)
    run.write(root)
    vqvae, codes, priors = f"{root}/vqvae", f"{root}/codes", [f"{root}/prior_0", f"{root}/prior_1"]
    with as_file(files("pipelines") / "demo_data" / "fashion_mnist.parquet") as images:
        data = {"path": str(images)}
        _run("train", config, data=data, output_dir=vqvae)
        _run("extract", config, vqvae=vqvae, data=data, output_dir=codes)
        for level, folder in enumerate(priors):
            _run(
                "train-prior", config, level=str(level), codes=codes, vqvae=vqvae, output_dir=folder
            )
        _run("assemble", config, vqvae=vqvae, priors=priors, output_dir=f"{root}/pipeline")
        if not (root / "reconstructions" / "reconstructions.png").exists():
            _run(
                "reconstruct",
                config,
                vqvae=vqvae,
                images=str(images),
                held_out=True,
                output_dir=f"{root}/reconstructions",
            )
    if not (root / "samples" / "samples.png").exists():
        _run("sample", config, pipeline=f"{root}/pipeline", output_dir=f"{root}/samples")
    print(summary(root))


def _run(command: str, config: DemoConfig, **settings: Any) -> None:
    """A subcommand with the demo recipe's section and these settings."""
    section = {**recipe_section(load_recipe("demo"), command, settings.get("level")), **settings}
    if "num_steps" in section:
        section["num_steps"] = max(1, round(section["num_steps"] * config.budget))
    print(f"\nvqvae2 {command} -> {settings['output_dir']}", file=sys.stderr)
    function_of(command)(from_dict(COMMANDS[command][0], section, "recipe demo"))


def best_validation(run: Path) -> dict[str, float]:
    """The held-out figures of the weights that a run folder holds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(
        (line for line in lines if "validation/loss" in line),
        key=lambda line: line["validation/loss"],
    )
    return {name.removeprefix("validation/"): value for name, value in best.items()}


def summary(root: Path) -> str:
    """The last screen: what was made, how good it is, and what to do next."""
    manifest = read_manifest(root / "codes")
    stage_1 = best_validation(root / "vqvae")
    lines = [
        "",
        f"Made in {root}/:",
        "  vqvae/ codes/ prior_0/ prior_1/                    each stage's artifacts, metrics.jsonl and images/",
        "  pipeline/                                          all of it in one folder, for VQVAE2Pipeline.from_pretrained",
        "  reconstructions/reconstructions.png                held-out images above their reconstructions",
        "  samples/samples.png                                new images, one row per class",
        "",
        f"Held out: reconstruction MSE {stage_1['mse']:.4f} (pixels in [-1, 1])",
    ]
    for level, (size, (height, width)) in enumerate(
        zip(manifest.codebook_sizes, manifest.grids, strict=True)
    ):
        prior = best_validation(root / f"prior_{level}")
        name = ("top", "bottom")[level]
        lines.append(
            f"  {name:<7} {height} x {width} codes: perplexity {stage_1[f'perplexity_{level}']:.0f} of {size}; "
            f"the prior needs {prior['bits_per_code']:.2f} bits per code (by frequency alone {prior['unigram_bits']:.2f})"
        )
    more = f"vqvae2 sample --pipeline {root}/pipeline --labels sneaker bag --guidance-scale 2 --seed 1 --output-dir {root}/more"
    return "\n".join([*lines, "", f"Sample more:  {more}"])
