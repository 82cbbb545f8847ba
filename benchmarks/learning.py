"""What the priors learn in equal time: bits per held-out code of both families, and of a transformer that does not know rows and columns.

    python benchmarks/learning.py runs/x/codes                               # five minutes per model, every level
    python benchmarks/learning.py runs/x/codes runs/y/codes --levels top --seconds 60

The models take turns, so that whatever else the machine does falls on all of them alike; only the time of a model's own steps counts. The learning rate
follows that time, not the number of steps. Settings are the defaults of `vqvae2 train-prior`, but for the weights' moving average, which a rate that ends
at zero makes needless. "Frequencies" is the entropy of the held-out codes' own frequencies: what a code costs without a model of its neighbours.
"""

import argparse
import math
import time
from collections.abc import Iterator
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
from vqvae2.common.loading import ShuffledLoader


class RasterTransformer(TransformerPrior):
    """The transformer prior over a mere sequence, the codes in raster order: it is not told which of them lie above each other.

    Rotary positions are those of Su et al. 2021 (section 3.2.2) in one dimension, and every position has a learned vector of its own, in the
    network that reads the condition too. What a coarser code says still stands at the positions that it covers.
    """

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        width, head_dim = config.network.width, config.network.width // config.network.num_heads
        self.positions, self.angles = (
            sequence_positions(config.num_positions, width),
            sequence_angles(config.num_positions, head_dim),
        )
        if self.condition is not None:
            for level, grid in enumerate(config.grids[:-1]):
                self.condition.positions[level] = sequence_positions(math.prod(grid), width)
                self.condition.register_buffer(
                    f"angles_{level}", sequence_angles(math.prod(grid), head_dim), persistent=False
                )


def sequence_positions(length: int, width: int) -> Positions:
    """A learned vector per position: a grid of one row."""
    positions = Positions(1, length, width)
    nn.init.normal_(positions.columns, std=0.02)
    return positions


def sequence_angles(length: int, head_dim: int) -> Tensor:
    """What `prior.transformer.rotary_angles` gives, `(2, T, d)`, for positions in a row."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** -torch.arange(0, 1, 2 / head_dim)
    return torch.stack(
        [
            torch.cat([angles.cos(), angles.cos()], dim=1),
            torch.cat([-angles.sin(), angles.sin()], dim=1),
        ]
    )


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
        self.name, self.model, self.config, self.batches, self.budget = (
            name,
            model.train(),
            config,
            batches,
            seconds,
        )
        self.loss_fn = make_loss(model.config, token_corruption=config.token_corruption)
        groups = [
            {
                "params": [p for p in model.parameters() if p.ndim >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas)
        self.seconds, self.bits = 0.0, list[float]()

    def step(self) -> None:
        """One update. The learning rate rises over the first 2 % of the time and falls to zero along a cosine."""
        batch, started = next(self.batches), time.perf_counter()
        share = min(1.0, self.seconds / self.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.config.learning_rate
                * min(1.0, (share + 1e-3) / 0.02)
                * 0.5
                * (1 + math.cos(math.pi * share))
            )
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
    configs = {
        family: TrainPriorConfig(
            codes=str(folder),
            level=level,
            output_dir="",
            family=family,
            batch_size=options.batch_size,
        )
        for family in ("transformer", "pixelsnail")
    }
    facts = {family: prior_config(config, manifest) for family, config in configs.items()}
    torch.manual_seed(options.seed)
    models = {
        "transformer": make_prior(facts["transformer"]),
        "PixelSNAIL": make_prior(facts["pixelsnail"]),
        "transformer, 1-D positions": RasterTransformer(
            cast(TransformerPriorConfig, facts["transformer"])
        ),
    }
    return configs["transformer"], models


def print_level(options: argparse.Namespace, folder: Path, level: str) -> None:
    """Train all models on one level, and print their table."""
    manifest = read_manifest(folder)
    number = parse_level(level, manifest.num_levels)
    train, held_out = (
        CodeDataset(folder, manifest, split, num_levels=number + 1)
        for split in ("train", "validation")
    )
    config, models = make_models(options, folder, level)
    loaders = {
        name: ShuffledLoader(train, options.batch_size, seed=options.seed).start_at(0)
        for name in models
    }
    runs = [
        Run(name, model, config, loaders[name], options.seconds) for name, model in models.items()
    ]
    while (run := min(runs, key=lambda run: run.seconds)).seconds < options.seconds:
        run.step()
    height, width = manifest.grids[number]
    rows = min(len(held_out), options.held_out)
    print(
        f"\n{folder}, level {number} ({height} x {width} codes of {manifest.codebook_sizes[number]}), {len(train)} training rows, {rows} held out"
    )
    print(
        f"{'':28}{'parameters':>11}{'steps':>8}{'seconds':>9}{'bits per code: held out':>25}{'training':>10}"
    )
    print(
        f"{'frequencies':28}{'':28}{held_out.unigram_bits(number):25.3f}{train.unigram_bits(number):10.3f}"
    )
    for run in runs:
        with torch.no_grad():
            bits = nats_per_code(
                run.model.eval(), dataset_rows(run.model, held_out, rows)
            ) / math.log(2)
        size, last = (
            sum(p.numel() for p in run.model.parameters()),
            run.bits[-max(1, len(run.bits) // 10) :],
        )
        print(
            f"{run.name:28}{size / 1e6:9.2f} M{len(run.bits):8}{run.seconds:9.0f}{bits:25.3f}{fmean(last):10.3f}",
            flush=True,
        )


def main() -> None:
    """Print a table per folder and level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codes", type=Path, nargs="+", help="folders that vqvae2 extract wrote")
    parser.add_argument(
        "--levels", nargs="+", help="top, bottom or numbers; all levels if not given"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="of training, per model and level (default 300)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--held-out",
        type=int,
        default=2048,
        help="rows, spread over the held-out ones (default 2048)",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; training bits are means over a model's last tenth of steps, with its dropout"
    )
    for folder in options.codes:
        for level in options.levels or map(str, range(read_manifest(folder).num_levels)):
            print_level(options, folder, level)


if __name__ == "__main__":
    main()
