"""The audit of a prior: what every family must keep, checked by changing what goes in and looking at the logits that come out.

Two of three public VQ-VAE-2 priors see the future, and all that their users noticed was a splendid loss and samples of noise. So these
checks run before every training (`stop_if_unsound`), and `vqvae2 doctor` runs them on what was trained. They know a prior by its
interface alone: `forward`, `start`, `step`, `sample`.

Letters: B batch, h w the level's code grid, T = h*w positions in raster order, K codebook size.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prior.attention import KVCache, attend, attend_written_out
from prior.base import Prior
from prior.manifest import CodeDataset
from prior.sampling import SamplingConfig, probabilities, uniforms
from vqvae2.common.errors import UserError

MOST_ROWS = 64  # in one forward; a grid of at most so many codes is checked code by code
MOST_STEPS = 256  # of cached sampling; a larger grid is checked in its first rows
WORK = 1e11  # multiplications in one forward: about a second on two CPU cores, if need be with fewer rows
STEP_WORK = 5e9  # the same for one row through all steps
MOST_LOGITS = 2**26
ATTENTION_WORK = 1e9  # multiplications in one attention: a fraction of a second on two CPU cores, if need be with fewer heads
MOST_KEYS = 8192  # beyond, attention takes no other ways


class Finding(NamedTuple):
    """What a check found."""

    name: str
    passed: bool
    message: str
    """What was seen; where the check failed also what it means and what to do."""


class Rows(NamedTuple):
    """What a prior is given: codes `(B, h, w)`, the codes of all coarser levels, and labels `(B,)` or None."""

    codes: Tensor
    condition: list[Tensor]
    labels: Tensor | None


# What the checks are asked with.


def random_rows(prior: Prior, number: int) -> Rows:
    """Random codes and labels for a prior, always the same; torch's own random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    config = prior.config
    *condition, codes = [
        torch.randint(size, (number, *grid), generator=generator).to(prior.device)
        for size, grid in zip(config.codebook_sizes, config.grids, strict=True)
    ]
    labels = (
        torch.randint(config.num_classes, (number,), generator=generator).to(prior.device)
        if config.num_classes
        else None
    )
    return Rows(codes, condition, labels)


def dataset_rows(prior: Prior, codes: CodeDataset, number: int) -> Rows:
    """Real codes for a prior, from rows spread over a code dataset."""
    batch = codes.__getitems__(spread(len(codes), number))
    *condition, own = [level.to(prior.device) for level in batch["codes"][: prior.config.level + 1]]
    return Rows(
        own, condition, batch["labels"].to(prior.device) if prior.config.num_classes else None
    )


@torch.no_grad()
def randomised_copy(prior: Prior, device: torch.device | None = None) -> Prior:
    """Another one of the same configuration (on `device`, if given), in evaluation mode, with fresh weights and noise on each.

    A weight that starts at zero (an output layer, a residual branch) would let everything behind it pass unseen, and so would an attention
    that has learned to look elsewhere. Matrices and kernels get noise of 0.5 / sqrt(inputs), with which deep networks do not blow up what
    passes through them, vectors of 0.1. The noise is always the same, and torch's own random numbers stay as they are: a training
    that was audited gives the same bits as one that was not. A large prior is copied with smaller grids: the same layers, in seconds.
    """
    generator = torch.Generator().manual_seed(0)
    copied = fresh_prior(prior, affordable_grids(prior))
    for weight in copied.parameters():
        size = 0.1 if weight.ndim < 2 else 0.5 * weight[0].numel() ** -0.5
        weight.add_(size * torch.randn(weight.shape, generator=generator))
    return copied.to(device or prior.device)


def fresh_prior(prior: Prior, grids: tuple[tuple[int, ...], ...] | None = None) -> Prior:
    """Another one of the same configuration (with other grids, if given) and fresh weights, in evaluation mode on the CPU."""
    config: Any = dataclasses.replace(prior.config, grids=grids or prior.config.grids)
    window = getattr(config.network, "attention_rows", 0)
    if window:  # a share of the grid, else it would be no window of a smaller one
        window = max(1, window * config.grids[-1][0] // prior.config.grids[-1][0])
        config = dataclasses.replace(
            config, network=dataclasses.replace(config.network, attention_rows=window)
        )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return type(prior)(config).eval()


def affordable_grids(prior: Prior) -> tuple[tuple[int, ...], ...]:
    """The grids of all levels, halved until a forward of three rows is affordable (as long as all sides can be halved)."""
    grids, size = prior.config.grids, sum(p.numel() for p in prior.parameters())
    while 3 * size * math.prod(grids[-1]) > WORK and all(
        side % 2 == 0 and side >= 4 for grid in grids for side in grid
    ):
        grids = tuple(tuple(side // 2 for side in grid) for grid in grids)
    return grids


def affordable_rows(prior: Prior) -> int:
    """How many rows one forward may have, so that all checks together take seconds (or, for a large prior, less than a few training steps)."""
    config = prior.config
    work = sum(p.numel() for p in prior.parameters()) * config.num_positions
    return int(
        max(
            3,
            min(
                MOST_ROWS,
                WORK // work,
                MOST_LOGITS // (config.num_positions * config.codebook_sizes[-1]),
            ),
        )
    )


def affordable_steps(prior: Prior) -> int:
    """How many positions are visited one after the other."""
    return int(
        min(
            prior.config.num_positions,
            MOST_STEPS,
            max(8, STEP_WORK // sum(p.numel() for p in prior.parameters())),
        )
    )


def spread(length: int, number: int) -> list[int]:
    """At most `number` of the indices below `length`, evenly spread, first and last among them (the first alone if it is one)."""
    number = min(length, number)
    return [i * (length - 1) // max(1, number - 1) for i in range(number)]


# The structural checks: they hold for any weights, so they are asked of a randomised copy.


def audit(prior: Prior, device: torch.device | None = None) -> Iterator[Finding]:
    """All structural checks of a prior: its weights are numbers, and a randomised copy of it (on `device`, if given) keeps the rules.

    Nothing is changed: not the prior, not torch's random numbers.
    """
    yield check_weights(prior)
    copied = randomised_copy(prior, device)
    yield check_forward(copied)
    yield check_causality(copied)
    yield check_cached_equals_plain(copied)
    for check in (check_condition_matters, check_labels_matter, check_gradients):
        finding = check(copied)
        if finding is not None:
            yield finding
    yield check_start_loss(copied)
    attention = check_attention(prior, device)
    if attention is not None:
        yield attention


def stop_if_unsound(prior: Prior, device: torch.device) -> None:
    """Refuse to train a prior that fails a structural check.

    Args:
        device: where the training will be, and so where the checks are quick.

    Raises:
        UserError: naming the check that failed, what it means and what to do.
    """
    for finding in audit(prior, device):
        if not finding.passed:
            raise UserError(
                f"{type(prior).__name__} of level {prior.config.level} fails the check {finding.name!r}: {finding.message}"
            )


def check_weights(prior: Prior) -> Finding:
    """Every weight and buffer is finite."""
    state = prior.state_dict()
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        what = f"{len(broken)} of {len(state)} weights hold values that are no numbers, the first is {broken[0]}"
        return Finding(
            "weights",
            False,
            f"{what}: the training diverged or the file is damaged. Train anew at a lower learning rate, or restore it.",
        )
    return Finding("weights", True, f"all {len(state)} are finite.")


@torch.no_grad()
def check_forward(prior: Prior) -> Finding:
    """The forward pass gives finite logits `(B, K, h, w)`, twice the same, and neither it nor a step changes a weight or a buffer."""
    rows = random_rows(prior, 2)
    state = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    first, second = prior(*rows), prior(*rows)
    before = F.pad(rows.codes.flatten(1)[:, :-1], (1, 0), value=prior.config.codebook_sizes[-1])
    prior.step(prior.start(2, rows.condition, rows.labels), 0, before[:, 0])
    changed = [
        name for name, tensor in prior.state_dict().items() if not torch.equal(state[name], tensor)
    ]
    expected = (2, prior.config.codebook_sizes[-1], *prior.config.grids[-1])
    if tuple(first.shape) != expected:
        return Finding(
            "forward",
            False,
            f"the logits have the shape {tuple(first.shape)}, but {expected} is due: correct what forward returns.",
        )
    if not first.isfinite().all():
        return Finding(
            "forward",
            False,
            "some logits are not finite: the network is numerically unstable; look for divisions, logarithms and large powers.",
        )
    if changed:
        return Finding(
            "forward",
            False,
            f"{changed[0]} is another after a forward pass: using the prior changes it; compute masked weights without storing them.",
        )
    if not torch.equal(first, second):
        return Finding(
            "forward",
            False,
            "the same input gives other logits the second time: something is random in evaluation mode; make it depend on training.",
        )
    return Finding(
        "forward",
        True,
        f"logits of shape {_grid(expected)}, finite, the same twice; no weight changes by being used.",
    )


@torch.no_grad()
def check_causality(prior: Prior) -> Finding:
    """Changing a code leaves the logits at and before its position as they are, to the last bit, and changes those of the next position.

    Each row has one code changed, and is held against itself in a batch of the same shape: kernels may give other last bits at another
    place or in another batch. "Next" is the neighbour to the right, at the end of a row the one below: no limited field of view excuses it.
    """
    config = prior.config
    width, length = config.grids[-1][1], config.num_positions
    positions = torch.tensor(spread(length, affordable_rows(prior)), device=prior.device)
    rows = random_rows(prior, len(positions))
    moved = prior(*rows).flatten(2) != prior(
        _flip(rows.codes, positions, config.codebook_sizes[-1]), rows.condition, rows.labels
    ).flatten(2)
    moved = moved.any(dim=1)  # (B, T): which logits each row's change reached
    leaks = moved & (torch.arange(length, device=prior.device) <= positions[:, None])
    if leaks.any():
        row, seen = leaks.nonzero()[0].tolist()
        own = torch.equal(leaks.nonzero()[:, 1], positions[leaks.nonzero()[:, 0]])
        cause = (
            "Every position reads its own code, so the input is not shifted: position t may read the codes up to t - 1."
            if own
            else "Its loss would be splendid and its samples noise: look at the attention mask, the padding of convolutions, and sums over all positions."
        )
        what = f"changing the code at {_place(positions[row], width)} changes the logits at {_place(seen, width)}: the prior sees what it has to predict"
        return Finding("causality", False, f"{what}. {cause}")
    following = torch.where((positions + 1) % width > 0, positions + 1, positions + width)
    inside = following < length
    deaf = inside & ~moved.gather(1, following.clamp(max=length - 1)[:, None])[:, 0]
    if deaf.any():
        row = int(deaf.nonzero()[0])
        what = f"changing the code at {_place(positions[row], width)} does not change the logits at {_place(following[row], width)}"
        return Finding(
            "causality",
            False,
            f"{what}: the prior ignores a part of the past. The input is shifted too far, or a mask hides too much.",
        )
    said = f"changed {len(positions)} of {length} codes, one at a time: no logit at or before it moved by a bit, and those of the next position did."
    return Finding("causality", True, said)


@torch.no_grad()
def check_cached_equals_plain(prior: Prior, rows: Rows | None = None) -> Finding:
    """Position after position through caches gives the logits of the forward pass, and on small grids `sample` draws what they say.

    Asked of a copy in float64: in float32 a deep network may blow up the rounding, in which the two differ, until it looks like a bug.

    Args:
        rows: what to ask with; random codes if not given.
    """
    prior, rows = copy.deepcopy(prior).double(), rows or random_rows(prior, 2)
    number, steps, width = len(rows.codes), affordable_steps(prior), prior.config.grids[-1][1]
    before = F.pad(rows.codes.flatten(1)[:, :-1], (1, 0), value=prior.config.codebook_sizes[-1])
    plain = prior(*rows).flatten(2)
    state = prior.start(number, rows.condition, rows.labels)
    cached = torch.stack(
        [prior.step(state, t, before[:, t]) for t in range(steps)], dim=2
    )
    scale = plain.abs().max().item()
    errors = (cached - plain[..., :steps]).abs().amax(dim=(0, 1))
    different = ~(errors <= 1e-4 * scale)
    what_to_do = "Samples would not be what the training taught: bring start and step in line with forward (position, condition, label, what is cached)."
    if different.any():
        wrong = int(different.nonzero()[0])
        where = f"at {_place(wrong, width)} the logits of the cached step are off by {errors[wrong]:.2g} (logits reach {scale:.2g})"
        return Finding("cache", False, f"{where}. {what_to_do}")
    said = f"the steps' logits equal the forward pass's at {steps} of {prior.config.num_positions} positions (largest difference {errors.max():.1g})"
    if steps < prior.config.num_positions:
        return Finding("cache", True, f"{said}.")
    wrongly = _first_wrong_draw(prior, rows)
    if wrongly is not None:
        return Finding(
            "cache",
            False,
            f"at {_place(wrongly, width)} sample draws another code than the forward pass's logits say. {what_to_do}",
        )
    return Finding("cache", True, f"{said}, and cached sampling draws the plain loop's codes.")


@torch.no_grad()
def check_condition_matters(prior: Prior) -> Finding | None:
    """Every coarser code reaches some logit, and every position hears of every coarser level. Nothing to check on the top level."""
    config = prior.config
    if not config.level:
        return None
    number = affordable_rows(prior)
    total = checked = 0
    for level, (size, grid) in enumerate(
        zip(config.codebook_sizes[:-1], config.grids[:-1], strict=True)
    ):
        everywhere = random_rows(prior, 2)
        before = prior(*everywhere)
        everywhere.condition[level] = (everywhere.condition[level] + 1) % size
        unmoved = ~(prior(*everywhere) != before).any(dim=1).all(dim=0).flatten()
        if unmoved.any():
            what = f"other codes on the whole level {level} leave the logits at {_place(int(unmoved.nonzero()[0]), config.grids[-1][1])} as they are"
            return Finding(
                "condition",
                False,
                f"{what}: the prior cannot fit its codes to the coarser ones there. Feed the condition to every position.",
            )

        length = grid[0] * grid[1]
        positions = torch.tensor(spread(length, number), device=prior.device)
        rows = random_rows(prior, len(positions))
        before = prior(*rows)
        rows.condition[level] = _flip(rows.condition[level], positions, size)
        unheard = ~(prior(*rows) != before).flatten(1).any(dim=1)
        if unheard.any():
            what = f"changing the code of level {level} at {_place(positions[unheard.nonzero()[0]], grid[1])} changes no logit"
            return Finding(
                "condition",
                False,
                f"{what}: a part of the condition is dropped. Look at how the coarser grid is laid over the finer one.",
            )
        total, checked = total + length, checked + len(positions)
    return Finding(
        "condition",
        True,
        f"changed {checked} of {total} coarser codes, one at a time: each changes logits, and every position hears of them.",
    )


@torch.no_grad()
def check_labels_matter(prior: Prior) -> Finding | None:
    """Another label changes the logits of every position. Nothing to check without labels, or with a single one."""
    config = prior.config
    values = config.num_classes + (
        config.label_dropout > 0
    )  # the last one stands for a hidden label
    if not config.num_classes or values < 2:
        return None
    number = min(values, affordable_rows(prior))
    rows = random_rows(prior, number)
    labels = torch.tensor(spread(values, number), device=prior.device)
    deaf = ~(
        prior(rows.codes, rows.condition, labels)
        != prior(rows.codes, rows.condition, (labels + 1) % values)
    ).any(dim=1).flatten(1)
    if deaf.any():
        row, position = deaf.nonzero()[0].tolist()
        other = (int(labels[row]) + 1) % values
        what = f"the label {other} in place of {int(labels[row])} leaves the logits at {_place(position, config.grids[-1][1])} as they are"
        return Finding(
            "labels",
            False,
            f"{what}: the prior cannot tell the classes apart there. Feed the label to every position.",
        )
    hidden = " (a hidden one is among them)" if config.label_dropout else ""
    return Finding(
        "labels",
        True,
        f"changed {number} of {values} labels{hidden}: every position's logits change.",
    )


def check_gradients(prior: Prior) -> Finding | None:
    """Every weight that is trained receives a gradient. Grids of one row or column are passed over: weights for what lies above or beside wait in vain."""
    if min(prior.config.grids[-1]) < 2:
        return None
    rows = random_rows(prior, 2)
    names, weights = zip(
        *((name, p) for name, p in prior.named_parameters() if p.requires_grad), strict=True
    )
    gradients = torch.autograd.grad(
        F.cross_entropy(prior(*rows).float(), rows.codes), weights, allow_unused=True
    )
    without = [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is None or not gradient.any()
    ]
    broken = [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    if without:
        what = (
            f"{len(without)} of {len(names)} weights receive no gradient, the first is {without[0]}"
        )
        return Finding(
            "gradients",
            False,
            f"{what}: they would stay as they began. Use them in forward, or take them out of the network.",
        )
    if broken:
        return Finding(
            "gradients",
            False,
            f"the gradient of {broken[0]} is not finite: the first step would destroy the weights. Look for a division by zero.",
        )
    return Finding("gradients", True, f"all {len(names)} weights receive one.")


@torch.no_grad()
def check_start_loss(prior: Prior) -> Finding:
    """A prior with fresh weights is near the uniform distribution: on random codes its loss is about ln K.

    Below ln K nothing honest can be, for random codes cannot be foretold; far above it the first steps only shrink the logits.
    """
    fresh = fresh_prior(prior).to(prior.device)
    rows = random_rows(prior, min(8, affordable_rows(prior)))
    loss, uniform = (
        F.cross_entropy(fresh(*rows).float(), rows.codes).item(),
        math.log(prior.config.codebook_sizes[-1]),
    )
    said = f"with fresh weights the loss on random codes is {loss:.3f} nats, ln K = {uniform:.3f}"
    if not loss >= uniform - 0.1:
        return Finding(
            "start",
            False,
            f"{said}: random codes cannot be foretold, so the prior sees them. Look at its masks and shifts.",
        )
    if not loss <= uniform + 1:
        return Finding(
            "start",
            False,
            f"{said}: it starts far from uniform. Initialise the output layer with smaller weights.",
        )
    return Finding("start", True, f"{said}.")


@torch.no_grad()
def check_attention(prior: Prior, device: torch.device | None = None) -> Finding | None:
    """Attention at the prior's real length and window sees what it may and nothing else. Nothing to check without attention.

    The other checks see a large prior on smaller grids, where attention takes other ways (see `attend`). Random queries, keys and values are
    attended to in all ways that a prior uses. Some positions, first and last and those at the window's edges among them, are held against the
    definition. At two of them, one per row of a batch, all keys and values that the position may not see are changed, which must not move a bit.
    """
    facts = prior.attention()
    if facts is None:
        return None
    length = min(prior.config.num_positions, MOST_KEYS)
    reach = facts.window or length  # how many keys before its own a position sees
    edges = {reach - 1, reach, reach + 1, 2 * reach, 2 * reach + 1} & set(range(length))
    positions = sorted({*spread(length, 9), *edges, max(0, length - 2)})
    flipped = [min(reach + 1, length // 2), max(0, length - 2)]
    work = 2 * len(flipped) * length * min(length, 2 * reach) * facts.head_dim
    shape = (
        len(flipped),
        int(max(1, min(facts.num_heads, ATTENTION_WORK // work))),
        length,
        facts.head_dim,
    )
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(
        device or prior.device
    )

    def fault(position: int, what: str) -> Finding:
        where = f"{_place(position, prior.config.grids[-1][1])} of {length} (window {facts.window or 'none'})"
        return Finding(
            "attention",
            False,
            f"{what} at {where}: look at the masks, windows and blocks of attend and KVCache at this length.",
        )

    attended = attend(q, k, v, causal=True, window=facts.window)
    cache = KVCache(length, window=facts.window)
    cache.keys, cache.values = k.clone(), v.clone()
    for t in positions:
        own, seen = slice(t, t + 1), slice(max(0, t - reach), t + 1)
        expected = attend_written_out(
            q[:, :, own].double(), k[:, :, seen].double(), v[:, :, seen].double(), mask=None
        )
        ways = {
            "attention": attended[:, :, own],
            "attention through the cache": cache.attend(
                t, q[:, :, own], k[:, :, own], v[:, :, own]
            ),
            "attention in fixed shapes": cache.attend(
                torch.tensor([t], device=q.device), q[:, :, own], k[:, :, own], v[:, :, own]
            ),
        }
        for name, found in ways.items():
            error = (found - expected).abs().max().item()
            if not error <= 1e-4:
                return fault(t, f"{name} is off by {error:.2g}")

    for row, t in enumerate(flipped):
        for unseen in (slice(0, max(0, t - reach)), slice(t + 1, length)):
            k[row, :, unseen] += 1
            v[row, :, unseen] += 1
    moved = attend(q, k, v, causal=True, window=facts.window) != attended
    for row, t in enumerate(flipped):
        if moved[row, :, t].any():
            return fault(t, "attention changes with keys that it must not see")
    said = f"at {len(positions)} of {length} positions it is what the definition says, and hidden keys do not move a bit"
    return Finding(
        "attention",
        True,
        f"{said} (features per head {facts.head_dim}, heads tried {shape[1]}, window {facts.window or 'none'}).",
    )


# The checks of what a prior has learned: they need its own weights and real codes.


@torch.no_grad()
def check_condition_helps(prior: Prior, rows: Rows) -> Finding | None:
    """A row's own coarser codes make its codes likelier than another row's do. Nothing to check on the top level, or with a single row."""
    number = len(rows.codes)
    if not prior.config.level or number < 2:
        return None
    condition = [
        codes.roll(number // 2, dims=0) for codes in rows.condition
    ]  # half of the rows away: neighbours are often of the same class
    if all(
        torch.equal(mine, others) for mine, others in zip(rows.condition, condition, strict=True)
    ):
        said = f"the coarser codes of all {number} rows are the same, so there is nothing in them to use: see vqvae2 inspect for what each level carries"
        return Finding("condition helps", True, f"{said}.")
    own, other = (
        nats_per_code(prior, rows),
        nats_per_code(prior, rows._replace(condition=condition)),
    )
    said = f"a code costs {own:.3f} nats given the coarser codes of its own image, and {other:.3f} given those of another one"
    if own < other:
        return Finding("condition helps", True, f"{said} ({number} rows).")
    what_to_do = "Train it longer; if that does not help, the rows of the levels do not belong together: extract the codes again."
    return Finding(
        "condition helps",
        False,
        f"{said} ({number} rows): the prior has not learned to use its condition. {what_to_do}",
    )


@torch.no_grad()
def check_beats_frequencies(prior: Prior, rows: Rows, train: CodeDataset) -> Finding:
    """The prior foretells codes better than their frequencies among the training rows do (each code counted once more, so that none has none)."""
    level = prior.config.level
    counts = torch.from_numpy(train.counts(level)).double() + 1
    bits = nats_per_code(prior, rows) / math.log(2)
    unigram = -(counts / counts.sum()).log2()[rows.codes.cpu()].mean().item()
    said = (
        f"a code costs {bits:.3f} bits, by frequency alone {unigram:.3f} ({len(rows.codes)} rows)"
    )
    if bits < unigram:
        return Finding("likelihood", True, f"{said}.")
    return Finding(
        "likelihood",
        False,
        f"{said}: the prior has learned less than to count. Train it longer, or give the codes that it was trained on.",
    )


def nats_per_code(prior: Prior, rows: Rows) -> float:
    """Mean negative log-likelihood of a code."""
    total = 0.0
    for part in torch.arange(len(rows.codes), device=prior.device).split(affordable_rows(prior)):
        labels = rows.labels[part] if rows.labels is not None else None
        logits = prior(rows.codes[part], [codes[part] for codes in rows.condition], labels)
        total += (
            F.cross_entropy(logits.float(), rows.codes[part], reduction="none")
            .sum(dtype=torch.float64)
            .item()
        )
    return total / rows.codes.numel()


# Helpers.


def _flip(codes: Tensor, positions: Tensor, size: int) -> Tensor:
    """Codes `(B, h, w)` with that of row i at positions[i] replaced by the next number."""
    flat = codes.flatten(1).clone()
    flat.scatter_(1, positions[:, None], (flat.gather(1, positions[:, None]) + 1) % size)
    return flat.view_as(codes)


def _first_wrong_draw(prior: Prior, rows: Rows) -> int | None:
    """The first position where `sample` draws what the logits of the forward pass, over the codes that it drew, do not give; None if there is none.

    With causal logits this is the comparison with the plain loop, in one forward instead of T. A random number that lies within rounding
    of the border between two codes may give either.
    """
    number, length = len(rows.codes), prior.config.num_positions
    seeds, near = list(range(number)), 1e-4
    drawn = prior.sample(number, rows.condition, rows.labels, seeds=seeds).flatten(1)
    logits = prior(drawn.view_as(rows.codes), rows.condition, rows.labels).flatten(2)
    chances = probabilities(logits.transpose(1, 2).flatten(0, 1), SamplingConfig())  # (B*T, K)
    upper = chances.cumsum(dim=1).gather(1, drawn.view(-1, 1))[:, 0]
    lower = upper - chances.gather(1, drawn.view(-1, 1))[:, 0]
    numbers = uniforms(seeds, prior.config.level, length).to(prior.device).flatten()
    wrong = ((numbers < lower - near) | (numbers > upper + near)).view(number, length).any(dim=0)
    return int(wrong.nonzero()[0]) if wrong.any() else None


def _place(position: Tensor | int, width: int) -> str:
    row, column = divmod(int(position), width)
    return f"row {row}, column {column}"


def _grid(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
