"""`vqvae2 demo`: the whole method on images that come with the package, by the demo recipe."""

import logging
from dataclasses import replace
from functools import partial
from importlib.resources import as_file
from pathlib import Path
from typing import Any

from pipelines.commands.evaluate import quick_figures
from pipelines.commands.run import run_stages, threads_for
from pipelines.config import DemoConfig, PlanConfig
from pipelines.evaluation.report import as_text
from pipelines.file_names import sample_files
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.plan.stages import stages_of
from pipelines.recipes import DEMO_IMAGES, demo_recipe
from prior.manifest import read_manifest
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.files import read_json, write_json
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import best_validation
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.vocabulary import INDEX_NAME
from vqvae2.config import ImagesConfig
from vqvae2.data import load_images

logger = logging.getLogger(__name__)
RECORD, FIGURES = "demo_config.yaml", "figures.json"
SUMMARY = """
Made in {root}/:
  vqvae/ codes/ prior_0/ prior_1/       each stage's artifacts, metrics.jsonl and images/
  pipeline/                             all of it, for VQVAE2Pipeline.from_pretrained
  reconstructions/reconstructions.png   held-out images above their reconstructions
  samples/samples.png                   new images, one row per class

Held out: reconstruction MSE {mse:.4f} (pixels in [-1, 1])
{levels}

Against held-out images. FD: how far they are, 0 at best; precision: the share that looks real;
recall: the share of real images that look like one of these
{figures}

Sample more:  vqvae2 sample --pipeline {root}/pipeline --labels sneaker bag --guidance-scale 2 \\
    --temperature 1.0 0.8 --seed 1 --output-dir {root}/more"""


@writes_output
def demo(config: DemoConfig) -> None:
    """Train the autoencoder, extract its codes, train both priors, assemble, reconstruct, sample.
    Raises `Stopped` at SIGTERM or Ctrl-C; running it again continues."""
    root = Path(config.output_dir)
    run = RunRecord("demo", config, RECORD)
    run.check(root)
    threads = on_main_process(processes(), partial(find_threads, root, config))
    run = replace(run, notes={"num_threads": threads})
    on_main_process(processes(), partial(run.write, root))
    recipe = demo_recipe(config.budget, threads)
    with as_file(DEMO_IMAGES) as images:
        run_stages(recipe, root, {"path": str(images)})
        figures_file, index = root / FIGURES, root / "pipeline" / INDEX_NAME
        if not figures_file.exists() or figures_file.stat().st_mtime < index.stat().st_mtime:
            logger.info("\nHow good are they?")
            figures = measure(root, ImagesConfig(path=str(images)))
            on_main_process(processes(), lambda: write_json(figures_file, figures))
    logger.info(summary(root))


def measure(root: Path, data: ImagesConfig) -> dict[str, Any]:
    """A few figures of samples and, beside them, of reconstructions and real images."""
    pipeline = VQVAE2Pipeline.from_pretrained(root / "pipeline").to(processes().device)
    splits = load_images(data, pipeline.vqvae.config.image)
    return quick_figures(pipeline, splits, [*sample_files(root / "samples").values()])


def find_threads(root: Path, config: DemoConfig) -> int:
    """The number of threads of a demo that was begun here, else the one that is fastest now."""
    path = root / RECORD
    if path.exists():
        return int(read_record(path).get("num_threads", 0))
    first = stages_of(PlanConfig(recipe="", planned=config))[0]
    threads = threads_for(first)
    if threads:
        logger.info("One thread: with other programs running, more are slower now.")
    return threads


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
    values = {"mse": stage_1["mse"], "levels": "\n".join(levels)}
    return SUMMARY.format(root=root, figures=as_text(read_json(root / FIGURES)), **values)
