"""The audit of a prior: rules that every family must keep, seen in the logits when inputs change.

The checks use a prior's interface alone. They run before every training and in `vqvae2 doctor`: a
prior that sees the future shows nothing but a good loss, until its samples are noise. Letters as in
`prior.probes`.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prior import probes
from prior.attention import KVCache, attend, attend_written_out
from prior.base import Prior
from prior.noise import gumbel
from prior.probes import Rows, place, spread
from prior.sampling import SamplingConfig, draw
from vqvae2.common.checks import Failed, Finding, check
from vqvae2.common.errors import UserError

WINDOW = 5  # positions that are computed together
MOST_STEPS = 256  # of cached sampling; of a larger grid the first rows are checked
MOST_KEYS = 8192  # beyond, attention takes no other code path
STEP_WORK = 5e9  # multiplications for one row through all steps
ATTENTION_WORK = 1e9  # multiplications in one attention
LEAST_GAIN = 0.05  # of bits over frequencies alone, below which a prior knows nothing
logger = logging.getLogger(__name__)


def audit(prior: Prior, device: torch.device | None = None) -> Iterator[Finding]:
    """All structural checks. They hold for any weights, so that most look at a fresh copy (on
    `device`, if given). Neither the prior nor torch's random numbers change."""
    yield check_weights(prior)
    fresh = probes.fresh_copy(prior, device, noise=True)
    checks = [check_forward, check_causality, check_cache, check_condition_matters]
    checks += [check_labels_matter, check_vector_matters, check_views_matter]
    checks += [check_gradients, check_start_loss]
    yield from filter(None, (run(fresh) for run in checks))
    yield from filter(None, [check_attention(prior, device)])


def stop_if_unsound(prior: Prior, device: torch.device) -> None:
    """Raise a `UserError` for a prior that fails a structural check, carried out on `device`."""
    for name, passed, message in audit(prior, device):
        if not passed:
            kind = f"{type(prior).__name__} of level {prior.config.level}"
            raise UserError(f"{kind} fails the check {name!r}: {message}")


def demand(changed: Tensor, expected: Any, causes: Sequence[str], grid: tuple[int, ...]) -> None:
    """Fail unless the expected logits changed, `(B, T)` or `(B, 1)` for any; a cause per row."""
    faults = (changed != expected).nonzero()
    if len(faults):
        row, position = faults[0].tolist()
        verb = "changes" if changed[row, position] else "does not change"
        where = f"the logits at {place(position, grid)}" if changed.shape[1] > 1 else "any logit"
        raise Failed(f"changing {causes[row]} {verb} {where}")


# The structural checks.


@check("weights", "The training diverged or the file is damaged: retrain, or restore the file.")
def check_weights(prior: Prior) -> str:
    """Every weight and buffer is finite."""
    state = prior.state_dict()
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise Failed(f"{len(broken)} of {len(state)} weights are not finite, the first {broken[0]}")
    return f"all {len(state)} are finite"


@check("forward", "Fix `forward`: nothing random and nothing stored in evaluation mode.")
def check_forward(prior: Prior) -> str:
    """Logits `(B, K, h, w)` are finite and the same twice; no forward or step changes a weight."""
    rows, state = probes.random_rows(prior, 2), copy.deepcopy(prior.state_dict())
    first, second = prior(*rows), prior(*rows)
    step = prior.make_stepper(2, rows.condition, rows.labels, compiled=False)
    position = torch.zeros(2, dtype=torch.int64, device=prior.device)
    step(0, position, torch.full_like(position, prior.config.codebook_sizes[-1])[:, None])
    expected = (2, prior.config.codebook_sizes[-1], *prior.config.grids[-1])
    if tuple(first.shape) != expected:
        raise Failed(f"the logits have the shape {tuple(first.shape)}, expected {expected}")
    if not first.isfinite().all():
        raise Failed("some logits are not finite: a division, logarithm or large power")
    for name, tensor in prior.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise Failed(f"{name} changes when the prior is used")
    if not torch.equal(first, second):
        raise Failed("the same input gives other logits the second time")
    return f"logits of shape {expected}, finite, the same twice; using the prior changes no weight"


@check("causality", "A position must see earlier codes only: look at shifts and masks.")
def check_causality(prior: Prior) -> str:
    """Changing a code changes no logit at or before its position, and some at the next position
    (to the right, at the end of a row below: every field of view reaches it)."""
    grid, length = prior.config.grids[-1], prior.config.num_positions
    rows = probes.random_rows(prior, min(length, probes.affordable_rows(prior)))
    codes, positions = probes.change_one_each(rows.codes, prior.config.codebook_sizes[-1])
    changed = probes.changed_logits(prior, rows, codes=codes)
    at, own = torch.arange(length, device=prior.device), positions[:, None]
    following = own + torch.where((own + 1) % grid[1] > 0, 1, grid[1])
    expected = (at == following) | (changed & (at > own))
    demand(changed, expected, [f"the code at {place(t, grid)}" for t in positions], grid)
    seen = f"changed {len(positions)} of {length} codes, one at a time: no logit at or before it"
    return f"{seen} moved by a bit, and those of the next position did"


@check("cache", "Samples would not be what was learned: bring start and step in line with forward.")
def check_cache(prior: Prior, rows: Rows | None = None) -> str:
    """Steps through caches give the forward pass's logits for `rows` (random codes if not given),
    and on small grids `sample` draws from these. In float64: in float32 a deep network may amplify
    rounding until it looks like a bug."""
    prior, rows = copy.deepcopy(prior).double(), rows or probes.random_rows(prior, 2)
    rows = rows._replace(views=None)  # samples are of the original
    grid, length = prior.config.grids[-1], prior.config.num_positions

    # The logits of the steps, one position at a time and in windows.
    steps = int(min(length, MOST_STEPS, max(8, STEP_WORK // prior.num_parameters)))
    plain, flat = prior(*rows).flatten(2), rows.codes.flatten(1)
    scale = plain.abs().max().item()
    for window in {1, min(WINDOW, steps)} if prior.has_windows else {1}:
        cached = _logits_of_steps(prior, rows, steps, window)
        errors = (cached - plain[..., :steps]).abs().amax(dim=(0, 1)).tolist()
        for t, error in enumerate(errors):
            if not error <= 1e-4 * scale:
                off = f"off by {error:.2g} (logits reach {scale:.2g})"
                raise Failed(f"at {place(t, grid)} the logits of the cached step are {off}")
    seen = f"the steps' logits equal the forward pass's at {steps} of {length} positions"
    if steps < length:
        return seen

    # Drawing from the logits over the codes of `sample` gives the same codes. For causal logits
    # this is the comparison with the plain loop, in one forward instead of T.
    seeds = range(len(flat))
    how: Any = {"compiled": False, "window": 0 if prior.has_windows else 1}  # 0 may be `forward`
    codes = prior.sample(len(flat), rows.condition, rows.labels, seeds=seeds, **how)
    logits = prior(codes, rows.condition, rows.labels).flatten(2).transpose(1, 2).flatten(0, 1)
    numbers = torch.tensor(seeds, device=prior.device)
    places = torch.arange(length, device=prior.device).repeat(len(flat), 1)
    noise = gumbel(numbers, prior.config.level, places, logits.shape[1]).flatten(0, 1)
    wrong = (draw(logits, noise, SamplingConfig()) != codes.flatten()).view_as(flat).any(dim=0)
    if wrong.any():
        where = place(wrong.nonzero()[0], grid)
        raise Failed(f"at {where} sample draws another code than the forward pass's logits give")
    return f"{seen}, and sample draws the plain loop's codes"


def _logits_of_steps(prior: Prior, rows: Rows, steps: int, window: int) -> Tensor:
    """`(B, K, steps)`, from steps that are given the codes. Of a window, all codes but the first
    are guessed wrong once before."""
    flat, size = rows.codes.flatten(1), prior.config.codebook_sizes[-1]
    before = F.pad(flat[:, :-1], (1, 0), value=size)
    given = rows.condition, rows.labels
    step = prior.make_stepper(len(flat), *given, window=window, compiled=False)
    logits = []
    for first in range(0, steps, window):
        start = min(first, steps - window)
        right, position = before[:, start : start + window], flat.new_full((len(flat),), start)
        if window > 1:
            wrong = torch.cat([right[:, :1], (right[:, 1:] + 1) % size], dim=1)
            step(first, position, wrong)
        logits.append(step(first, position, right)[:, first - start :])
    return torch.cat(logits, dim=1).transpose(1, 2)


@check("condition", "Feed every coarser code to the network, and the condition to every position.")
def check_condition_matters(prior: Prior) -> str | None:
    """Every coarser code changes some logit, every coarser level those of every position. Nothing
    to check on the top level."""
    config, total, tried = prior.config, 0, 0
    for level, size in enumerate(config.codebook_sizes[:-1]):
        # Other codes everywhere.
        grid, rows = config.grids[level], probes.random_rows(prior, 2)
        condition = list(rows.condition)
        condition[level] = (condition[level] + 1) % size
        changed = probes.changed_logits(prior, rows, condition=condition)
        demand(changed, True, [f"all codes of level {level}"] * 2, config.grids[-1])

        # Another code at one position of each row.
        rows = probes.random_rows(prior, min(math.prod(grid), probes.affordable_rows(prior)))
        condition = list(rows.condition)
        condition[level], positions = probes.change_one_each(condition[level], size)
        changed = probes.changed_logits(prior, rows, condition=condition).any(dim=1, keepdim=True)
        names = [f"the code of level {level} at {place(t, grid)}" for t in positions]
        demand(changed, True, names, grid)
        total, tried = total + math.prod(grid), tried + len(positions)
    seen = f"changed {tried} of {total} coarser codes, one at a time: each changes logits, and"
    return f"{seen} every position depends on every coarser level" if config.level else None


@check("labels", "The prior cannot tell classes apart: feed the label to every position.")
def check_labels_matter(prior: Prior) -> str | None:
    """Another label changes every position's logits. Nothing to check with fewer than two."""
    classes = prior.config.num_classes
    values = classes + (prior.config.label_dropout > 0)  # the last one means no label
    if not classes or values < 2:
        return None
    rows = probes.random_rows(prior, min(values, probes.affordable_rows(prior)))
    labels = torch.tensor(spread(values, len(rows.codes)), device=prior.device)
    others = (labels + 1) % values
    changed = probes.changed_logits(prior, rows._replace(labels=labels), labels=others)
    names = [f"label {label} to {other}" for label, other in zip(labels, others, strict=True)]
    demand(changed, True, names, prior.config.grids[-1])
    return f"changed {len(labels)} of {values} labels: every position's logits change"


@check("vector", "The prior cannot read its condition column: feed it to every position.")
def check_vector_matters(prior: Prior) -> str | None:
    """Every number of a vector changes every position's logits, and hiding it does. Nothing to
    check without vectors."""
    size, grid = prior.config.vector_size, prior.config.grids[-1]
    if not size:
        return None
    rows = probes.random_rows(prior, min(size, probes.affordable_rows(prior)))
    *coarser, vectors = rows.condition
    places = torch.tensor(spread(size, len(vectors)), device=prior.device)
    given = torch.where(vectors.isnan(), 0, vectors)
    others = given.scatter_add(1, places[:, None], torch.ones_like(given))
    causes = [f"number {place} of a vector" for place in places.tolist()]
    base = rows._replace(condition=[*coarser, given])
    demand(probes.changed_logits(prior, base, condition=[*coarser, others]), True, causes, grid)
    hidden = [*coarser, torch.full_like(given, torch.nan)]
    causes = ["a vector to a hidden one"] * len(given)
    demand(probes.changed_logits(prior, base, condition=hidden), True, causes, grid)
    seen = f"changed {len(places)} of {size} numbers, one at a time, and hid all"
    return f"{seen}: every position's logits change"


@check("views", "The prior cannot tell views apart: feed the view to every position.")
def check_views_matter(prior: Prior) -> str | None:
    """Every view changes every position's logits, against the original. Nothing to check where the
    prior is not told views."""
    names, grid = prior.config.views, prior.config.grids[-1]
    if not names:
        return None
    rows = probes.random_rows(prior, min(len(names), probes.affordable_rows(prior)))
    views = 1 + torch.tensor(spread(len(names), len(rows.codes)), device=prior.device)
    causes = [f"the original to the view {names[view - 1]}" for view in views.tolist()]
    demand(probes.changed_logits(prior, rows, views=views), True, causes, grid)
    return f"tried {len(views)} of {len(names)} views: every position's logits change"


@check("gradients", "Use every weight in forward or remove it, and look for divisions by zero.")
def check_gradients(prior: Prior) -> str | None:
    """Every trained weight receives a finite gradient. Nothing to check on grids of one row or
    column, where weights for what lies above or beside get none."""
    if min(prior.config.grids[-1]) < 2:
        return None
    rows = probes.random_rows(prior, 2)
    if prior.config.views:
        rows = rows._replace(views=torch.tensor([1, len(prior.config.views)], device=prior.device))
    weights = {name: weight for name, weight in prior.named_parameters() if weight.requires_grad}
    with torch.enable_grad():
        loss = F.cross_entropy(prior(*rows).float(), rows.codes)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    sizes = [gradient.abs().sum().item() for gradient in gradients]
    without = [name for name, size in zip(weights, sizes, strict=True) if not 0 < size < math.inf]
    if without:
        seen = f"{len(without)} of {len(weights)} weights receive no finite gradient"
        raise Failed(f"{seen}, the first is {without[0]}")
    return f"all {len(weights)} weights receive one"


@check("start", "Below ln K the prior sees the codes; far above, start the output layer smaller.")
def check_start_loss(prior: Prior) -> str:
    """With fresh weights the loss on random codes is about ln K, that of a uniform distribution:
    random codes cannot be predicted."""
    rows = probes.random_rows(prior, min(8, probes.affordable_rows(prior)))
    logits = probes.fresh_copy(prior, noise=False)(*rows).float()
    loss, uniform = F.cross_entropy(logits, rows.codes).item(), math.log(logits.shape[1])
    seen = f"with fresh weights the loss on random codes is {loss:.3f} nats, ln K = {uniform:.3f}"
    if not uniform - 0.1 <= loss <= uniform + 1:
        raise Failed(f"{seen}: it starts far from uniform")
    return seen


@check("attention", "Look at the masks, windows and blocks of attend and KVCache at this length.")
def check_attention(prior: Prior, device: torch.device | None = None) -> str | None:
    """Attention at the prior's real length and window is what its definition says: the checks above
    see large priors on smaller grids, where `attend` takes other code paths. In float64, in which a
    leak shows however small, at some positions, those at the window's edges among them."""
    # Which positions to try, and random inputs that are affordable.
    if (facts := prior.attention()) is None:
        return None
    length, grid = min(prior.config.num_positions, MOST_KEYS), prior.config.grids[-1]
    reach = facts.window or length  # how many keys before its own a position sees
    edges = {reach - 1, reach, reach + 1, 2 * reach, 2 * reach + 1, length - 2} & set(range(length))
    positions = sorted({*spread(length, 9), *edges})
    work = 2 * length * min(length, 2 * reach) * facts.head_dim
    heads = int(max(1, min(facts.num_heads, ATTENTION_WORK // work)))
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, heads, length, facts.head_dim, generator=generator)
    q, k, v = qkv.to(device or prior.device, torch.float64)

    # Every code path, against the definition over the keys that a position sees.
    attended = attend(q, k, v, causal=True, window=facts.window)
    cache = KVCache(length, window=facts.window)
    cache.keys, cache.values, cache.capacity = k.clone(), v.clone(), length
    for t in positions:
        keys, values = (x[:, :, max(0, t - reach) : t + 1] for x in (k, v))
        expected = attend_written_out(q[:, :, t : t + 1], keys, values, None)
        results = {"attention": attended[:, :, t : t + 1]}
        for name, first in {"cache": t, "cache in a window": max(0, t - WINDOW + 1)}.items():
            places = torch.arange(first, t + 1, device=q.device)
            slots, new = cache.slots(places[None], heads, q), (x[:, :, places] for x in (q, k, v))
            results[f"attention through the {name}"] = cache.attend(slots, *new)[:, :, -1:]
        for name, result in results.items():
            error = (result - expected).abs().max().item()
            if not error <= 1e-9:
                where = f"{place(t, grid)} of {length} (window {facts.window or 'none'})"
                raise Failed(f"{name} is off by {error:.2g} at {where}")
    sizes = f"window {facts.window or 'none'}, {heads} heads of {facts.head_dim} features"
    return f"it follows its definition at {len(positions)} of {length} positions ({sizes})"


# The checks of what a prior has learned, which need its own weights and real codes.


@check("condition helps", "Train it longer, or extract again if rows of levels do not match.")
def check_condition_helps(prior: Prior, rows: Rows) -> str | None:
    """A row's codes are likelier given its own coarser codes than given another row's. Nothing to
    check on the top level, or with a single row."""
    return _others_cost(prior, rows, "coarser codes", range(prior.config.level))


@check("vector helps", "Train it longer; or the condition column says nothing about the images.")
def check_vector_helps(prior: Prior, rows: Rows) -> str | None:
    """Likewise for vectors: shuffling them costs likelihood."""
    return _others_cost(prior, rows, "vectors", range(prior.config.level, len(rows.condition)))


def _others_cost(prior: Prior, rows: Rows, what: str, places: range) -> str | None:
    number = len(rows.codes)
    if not places or number < 2:
        return None
    # The others' come from half of the rows away, as neighbours are often of the same class; where
    # they repeat just so, from the next row.
    for distance in (number // 2, 1):
        others = list(rows.condition)
        for i in places:
            others[i] = others[i].roll(distance, dims=0)
        if not all(map(torch.equal, rows.condition, others)):
            break
    else:
        return f"the {what} of all {number} rows are the same: there is nothing to use"
    own = probes.nats_per_code(prior, rows)
    other = probes.nats_per_code(prior, rows._replace(condition=others))
    seen = f"a code costs {own:.3f} nats given the {what} of its own image, and {other:.3f}"
    seen = f"{seen} given those of another one ({number} rows)"
    if not own < other:
        raise Failed(f"{seen}: the prior has not learned to use its condition")
    return seen


@check("likelihood", "Train it longer, or on codes of more images.")
def check_beats_frequencies(bits: float, alone: float) -> str:
    """The prior's bits per held-out code are fewer than by frequency alone, by `LEAST_GAIN`."""
    seen = f"a code costs {bits:.3f} bits, by frequency alone {alone:.3f}"
    if not bits <= (1 - LEAST_GAIN) * alone:
        raise Failed(f"{seen}: the prior has learned next to nothing, and its samples are noise")
    return seen


def warn_of_noise(name: Any, bits: float, alone: float) -> None:
    """The same as a warning."""
    if not (finding := check_beats_frequencies(bits, alone)).passed:
        logger.warning("%s: %s", name, finding.message)
