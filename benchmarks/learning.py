"""What the priors learn in equal time: bits per held-out code.

    python benchmarks/learning.py --codes runs/x/codes         # five minutes per model, every level
    python benchmarks/learning.py --codes runs/x/codes runs/y/codes --levels top --seconds 60

Compared are both families, and a transformer that does not know rows and columns. The models take
turns, so that other load on the machine affects all of them alike; only the time of a model's own
steps counts. The learning rate follows that time, not the number of steps. Settings are the
defaults of `vqvae2 train-prior`, without the weights' moving average, which a rate that ends at
zero makes needless. "Frequencies" is the entropy of the held-out codes' own frequencies: what a
code costs without a model of its neighbours.
"""

import argparse
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from prior import TrainPriorConfig, TransformerPrior, TransformerPriorConfig, make_prior
from prior.base import Prior
from prior.manifest import CodeDataset, parse_level, read_manifest
from prior.probes import dataset_rows, nats_per_code
from prior.training import make_loss, prior_config
from prior.transformer import Positions
from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.common.fit import make_optimizer
from vqvae2.common.loading import ShuffledLoader


class RasterTransformer(TransformerPrior):
    """The transformer prior over a plain sequence: it does not know which codes are neighbours.

    Rotary positions are those of Su et al. 2021 (section 3.2.2) in one dimension, and every
    position has a learned vector of its own, also in the network that reads the condition. A
    coarser code still conditions the positions that it covers.
    """

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        width, head_dim = config.network.width, config.network.width // config.network.num_heads
        self.positions = sequence_positions(config.num_positions, width)
        self.angles = sequence_angles(config.num_positions, head_dim)
        if self.condition is None:
            return
        for level, grid in enumerate(config.grids[:-1]):
            self.condition.positions[level] = sequence_positions(math.prod(grid), width)
            angles = sequence_angles(math.prod(grid), head_dim)
            self.condition.register_buffer(f"angles_{level}", angles, persistent=False)


def sequence_positions(length: int, width: int) -> Positions:
    """A learned vector per position: a grid of one row."""
    positions = Positions(1, length, width)
    nn.init.normal_(positions.columns, std=0.02)
    return positions


def sequence_angles(length: int, head_dim: int) -> Tensor:
    """What `prior.transformer.rotary_angles` gives, `(2, T, d)`, for positions in a row."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** -torch.arange(0, 1, 2 / head_dim)
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosines, cosines], dim=1), torch.cat([-sines, sines], dim=1)])


class Run:
    """A model in training, and the seconds that its steps took."""

    def __init__(
        self,
        name: str,
        model: Prior,
        config: TrainPriorConfig,
        batches: Iterator[Any],
        seconds: float,
    ) -> None:
        self.name, self.model, self.config = name, model.train(), config
        self.batches, self.budget = batches, seconds
        self.loss_fn = make_loss(model.config, token_corruption=config.token_corruption)
        self.optimizer = make_optimizer(model, config)
        self.seconds, self.bits = 0.0, list[float]()

    def step(self) -> None:
        """One update; the learning rate rises for 2 % of the time, then falls along a cosine."""
        batch, started = next(self.batches), time.perf_counter()
        share = min(1.0, self.seconds / self.budget)
        for group in self.optimizer.param_groups:
            warm, cosine = min(1.0, (share + 1e-3) / 0.02), 0.5 * (1 + math.cos(math.pi * share))
            group["lr"] = self.config.learning_rate * warm * cosine
        loss, figures = self.loss_fn(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.bits.append(figures["bits_per_code"].item())
        if len(self.bits) > 1:  # the first step also loads libraries
            self.seconds += time.perf_counter() - started


def make_models(
    options: argparse.Namespace, folder: Path, level: str
) -> tuple[TrainPriorConfig, dict[str, Prior]]:
    """The models to compare, with fresh weights."""
    manifest = read_manifest(folder)
    make_config = partial(
        TrainPriorConfig,
        codes=str(folder),
        level=level,
        output_dir="",
        batch_size=options.batch_size,
    )
    config = make_config(family="transformer")
    facts = prior_config(config, manifest)
    torch.manual_seed(options.seed)
    models = {
        "transformer": make_prior(facts),
        "PixelSNAIL": make_prior(prior_config(make_config(family="pixelsnail"), manifest)),
        "transformer, 1-D positions": RasterTransformer(cast(TransformerPriorConfig, facts)),
    }
    return config, models


def print_level(options: argparse.Namespace, folder: Path, level: str) -> None:
    """Train all models on one level, and print their table."""
    manifest = read_manifest(folder)
    number = parse_level(level, manifest.num_levels)
    train = CodeDataset(folder, manifest, "train", num_levels=number + 1)
    held_out = CodeDataset(folder, manifest, "validation", num_levels=number + 1)
    config, models = make_models(options, folder, level)
    runs = []
    for name, model in models.items():
        batches = ShuffledLoader(train, options.batch_size, seed=options.seed).start_at(0)
        runs.append(Run(name, model, config, batches, options.seconds))

    # The model that has used the least time takes the next step.
    while (run := min(runs, key=lambda run: run.seconds)).seconds < options.seconds:
        run.step()

    # The table: codes by their frequencies, then each model.
    height, width = manifest.grids[number]
    rows = min(len(held_out), options.held_out)
    size = manifest.codebook_sizes[number]
    print(f"\n{folder}, level {number}: {height} x {width} codes of {size}")
    print(f"{len(train)} training rows, {rows} held out")
    titles = f"{'parameters':>11}{'steps':>8}{'seconds':>9}{'held-out bits':>15}{'training':>10}"
    print(f"{'bits per code':28}{titles}")
    bits, training_bits = held_out.unigram_bits(number, train), train.unigram_bits(number, train)
    print(f"{'frequencies':28}{'':28}{bits:15.3f}{training_bits:10.3f}")
    for run in runs:
        with torch.no_grad():
            sampled = dataset_rows(run.model, held_out, rows)
            bits = nats_per_code(run.model.eval(), sampled) / math.log(2)
        parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
        training_bits = fmean(run.bits[-max(1, len(run.bits) // 10) :])
        figures = f"{parameters:9.2f} M{len(run.bits):8}{run.seconds:9.0f}"
        print(f"{run.name:28}{figures}{bits:15.3f}{training_bits:10.3f}", flush=True)


def main() -> None:
    """Print a table per folder and level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codes", type=Path, nargs="+", required=True, help="code datasets of vqvae2 extract")
    add("--levels", nargs="+", help="top, bottom or numbers; all levels if not given")
    add("--seconds", type=float, default=300, help="of training, per model and level (default 300)")
    add("--batch-size", type=int, default=64)
    add("--held-out", type=int, default=2048, help="held-out rows to score (default 2048)")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("Training bits are means over a model's last tenth of steps, with its dropout.")
    for folder in options.codes:
        for level in options.levels or map(str, range(read_manifest(folder).num_levels)):
            print_level(options, folder, level)


if __name__ == "__main__":
    main()
