"""What the audit feeds to a prior: rows of codes, and copies of it that take seconds.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from prior.base import Prior, nats_of
from prior.config import PriorConfig
from prior.manifest import CodeDataset
from prior.vector import with_vectors
from vqvae2.common.torch_settings import evaluating, exact_convolutions

MOST_ROWS = 64  # in one forward; grids of at most this many codes are checked code by code
MOST_LOGITS = 2**26  # in one forward
WORK = 1e11  # multiplications in one forward: about a second on two CPU cores


class Rows(NamedTuple):
    """What a prior reads: codes `(B, h, w)`, all coarser levels' codes (and vectors `(B, V)`, if it
    has any: `Prior.forward`), labels `(B,)` or None, and views `(B,)` or None for originals."""

    codes: Tensor
    condition: list[Tensor]
    labels: Tensor | None
    views: Tensor | None = None


def random_rows(prior: Prior, number: int) -> Rows:
    """Random codes and labels, always the same; torch's own random numbers are left alone."""
    generator, config = torch.Generator().manual_seed(0), prior.config

    def integers(high: int, *grid: int) -> Tensor:
        return torch.randint(high, (number, *grid), generator=generator).to(prior.device)

    levels = zip(config.codebook_sizes, config.grids, strict=True)
    *condition, codes = [integers(size, *grid) for size, grid in levels]
    labels = integers(config.num_classes) if config.num_classes else None
    if config.vector_size:  # the last row's is hidden
        vectors = torch.randn(number, config.vector_size, generator=generator)
        vectors[-1] = torch.nan
        condition.append(vectors.to(prior.device))
    return Rows(codes, condition, labels)


def rows_for(
    prior: Prior, codes: Sequence[Tensor], labels: Tensor, vectors: Tensor | None = None
) -> Rows:
    """What a prior reads of codes `(B, h, w)` of every level, coarse to fine, labels `(B,)` and
    vectors `(B, V)` (None hides them), on its device."""
    batch = {"codes": codes, "labels": labels, "vectors": vectors}
    return send_to_device(rows_of(prior.config, batch), prior.device)


def rows_of(config: PriorConfig, batch: Mapping[str, Any]) -> Rows:
    """What a prior of this configuration reads of a batch of a `CodeDataset`."""
    *condition, codes = batch["codes"][: config.level + 1]
    labels = batch["labels"] if config.num_classes else None
    condition = with_vectors(config, condition, len(codes), batch.get("vectors"))
    views = None
    if config.views:  # of a dataset without others, all are originals
        views = batch.get("views", torch.zeros(len(codes), dtype=torch.int64, device=codes.device))
    return Rows(codes, condition, labels, views)


def dataset_rows(prior: Prior, codes: CodeDataset, number: int) -> Rows:
    """Real codes for a prior, from rows spread over a code dataset."""
    batch = send_to_device(codes.__getitems__(spread(len(codes), number)), prior.device)
    return rows_of(prior.config, batch)


@torch.no_grad()
def fresh_copy(prior: Prior, device: torch.device | None = None, *, noise: bool) -> Prior:
    """A prior of the same configuration with fresh weights, always the same, in evaluation mode. A
    large one gets smaller grids. Noise (0.1 on vectors; on matrices and kernels 0.5 / sqrt(inputs),
    which deep networks do not amplify) keeps weights of zero from hiding what is behind them."""
    # Grids halved, while all sides can be, until a forward of 3 rows is affordable.
    grids = prior.config.grids
    while 3 * prior.num_parameters * math.prod(grids[-1]) > WORK:
        if any(side % 2 or side < 4 for grid in grids for side in grid):
            break
        grids = tuple(tuple(side // 2 for side in grid) for grid in grids)
    config: Any = dataclasses.replace(prior.config, grids=grids)
    window = getattr(config.network, "attention_rows", 0)
    if window:  # the same share of the grid, else a smaller grid would have no window
        window = max(1, window * grids[-1][0] // prior.config.grids[-1][0])
        network = dataclasses.replace(config.network, attention_rows=window)
        config = dataclasses.replace(config, network=network)

    # Weights from a fixed seed.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        fresh = type(prior)(config).eval()
        for weight in fresh.parameters() if noise else ():
            size = 0.1 if weight.ndim < 2 else 0.5 * weight[0].numel() ** -0.5
            weight.add_(size * torch.randn(weight.shape))
    return fresh.to(device or prior.device)


def affordable_rows(prior: Prior) -> int:
    """Rows that one forward may have, so that all checks take seconds (or a few training steps)."""
    length, size = prior.config.num_positions, prior.config.codebook_sizes[-1]
    most = min(MOST_ROWS, WORK // (prior.num_parameters * length), MOST_LOGITS // (length * size))
    return int(max(3, most))


def spread(length: int, number: int) -> list[int]:
    """At most `number` of the indices below `length`, evenly spread from the first to the last."""
    number = min(length, number)
    return [i * (length - 1) // max(1, number - 1) for i in range(number)]


def place(position: Tensor | int, grid: tuple[int, ...]) -> str:
    """A position in words."""
    return "row {}, column {}".format(*divmod(int(position), grid[1]))


def change_one_each(codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes `(B, h, w)` with another number at one position of each row; these positions `(B,)`."""
    flat = codes.flatten(1).clone()
    positions = torch.tensor(spread(flat.shape[1], len(flat)), device=codes.device)
    flat[torch.arange(len(flat), device=codes.device), positions] += 1
    return flat.view_as(codes) % size, positions


def changed_logits(prior: Prior, rows: Rows, **changes: Any) -> Tensor:
    """Where other inputs change a row's logits, even by a bit: `(B, T)`. Both batches have the same
    shape and order, as kernels may give other last bits at another place."""
    return (prior(*rows) != prior(*rows._replace(**changes))).any(dim=1).flatten(1)


def nats_per_code(prior: Prior, rows: Rows) -> float:
    """Mean negative log-likelihood of a code."""
    return nats_per_row(prior, rows).sum().item() / rows.codes.numel()


@exact_convolutions()
def nats_per_row(prior: Prior, rows: Rows) -> Tensor:
    """Negative log-likelihood of each row's codes, the sum over its positions: `(B,)` float64."""
    sums: list[Tensor] = []
    for codes, logits in _logits(prior, rows):
        sums.append(nats_of(logits, codes).sum(dim=(1, 2), dtype=torch.float64))
    return torch.cat(sums)


@exact_convolutions()
def nats_per_position(prior: Prior, rows: Rows) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each code, and what the prior expected of it before it was seen
    (its entropy), in nats: `(B, h, w)` each."""
    seen: list[Tensor] = []
    expected: list[Tensor] = []
    for codes, logits in _logits(prior, rows):
        log_p = logits.movedim(1, -1).log_softmax(dim=-1)  # (few, h, w, K)
        seen.append(-log_p.gather(-1, codes[..., None])[..., 0])
        expected.append(-(log_p.exp() * log_p).sum(dim=-1))
    return torch.cat(seen), torch.cat(expected)


@torch.no_grad()
def _logits(prior: Prior, rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes `(few, h, w)` and their logits `(few, K, h, w)`, as many rows at once as fit; without
    dropout."""
    for few in torch.arange(len(rows.codes), device=prior.device).split(affordable_rows(prior)):
        labels = rows.labels[few] if rows.labels is not None else None
        views = rows.views[few] if rows.views is not None else None
        condition = [given[few] for given in rows.condition]
        with evaluating(prior):
            logits = prior(rows.codes[few], condition, labels, views)
        yield rows.codes[few], logits.float()
