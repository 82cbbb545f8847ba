"""Sampling through caches beside the plain loop, in one run: seconds per image, codes per second.

    python benchmarks/sampling.py            # models of 85-90 M parameters; ten minutes, two cores
    python benchmarks/sampling.py --small    # models as the demo has them; a minute
    python benchmarks/sampling.py --pipeline runs/demo/pipeline --batch-sizes 1 4 16 --images 100
    python benchmarks/sampling.py --replay runs/demo/pipeline
    pip install -e ".[benchmark]"            # for the row of transformers' generate

With a trained pipeline: by window, the share of the positions that take a call of the network,
milliseconds per image, and how many images have other codes than one position at a time gives.
(Codes of fresh weights hardly depend on each other, and all guesses would be right. They are drawn
one position at a time.) With --replay, fresh transformers of 86 M parameters are timed as if they
guessed like a trained pipeline's last prior: each call finds as many codes as one of its calls did.

The plain loop has the same weights and reads the condition once; for each code it runs one forward
pass over the rows up to the current one. It is timed on some rows and interpolated over the others;
cached sampling runs in full. The transformer's floor is what reading all weights once per position
takes (without those of the network that reads the coarser levels, which are read once per image),
at the rate at which a packed matrix product reads them here. (The PixelSNAIL has none: it computes
parts of a row at once.)
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import prior.base
from pipelines.pipeline import VQVAE2Pipeline
from prior import (
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    PriorConfig,
    SamplingConfig,
    TransformerConfig,
    TransformerPriorConfig,
    make_prior,
)
from prior.base import Prior
from prior.noise import gumbel
from prior.packed_linear import PackedLinear
from prior.pixelsnail import PixelSNAIL
from prior.predictive import Guesses
from prior.sampling import draw
from prior.transformer import TransformerPrior
from vqvae2.common.accelerate import keep_freed_memory


@dataclass
class Case:
    """A model to sample from."""

    name: str
    config: PriorConfig
    batch_sizes: Sequence[int]


def cases(top: dict, bottom: dict, networks: dict, batch_sizes: dict) -> list[Case]:
    """Both families on both levels; settings by level, and networks by family and level."""
    result = []
    for (family, level), network in networks.items():
        facts = top if level == "top" else bottom
        config_class = PixelSNAILPriorConfig if family == "PixelSNAIL" else TransformerPriorConfig
        height, width = facts["grids"][-1]
        name = f"{family}, {level} {height}x{width}"
        result.append(Case(name, config_class(network=network, **facts), batch_sizes[level]))
    return result


SNAIL = PixelSNAILConfig(
    width=320, residual_channels=320, num_heads=8, num_blocks=4, num_residual_blocks=5, dropout=0.0
)
TRANSFORMER = TransformerConfig(width=768, num_layers=12, num_heads=12, dropout=0.0)
LARGE = cases(
    {"level": 0, "grids": ((32, 32),), "codebook_sizes": (512,)},
    {"level": 1, "grids": ((32, 32), (64, 64)), "codebook_sizes": (512, 512)},
    {
        ("PixelSNAIL", "top"): SNAIL,
        ("PixelSNAIL", "bottom"): replace(SNAIL, num_heads=0),
        ("transformer", "top"): TRANSFORMER,
        ("transformer", "bottom"): replace(TRANSFORMER, num_layers=10),
    },
    {"top": (1, 8), "bottom": (1,)},
)
SMALL_SNAIL = PixelSNAILConfig(width=64, residual_channels=64, dropout=0.0)
SMALL_TRANSFORMER = TransformerConfig(width=192, num_layers=4, num_heads=3, dropout=0.0)
SMALL = cases(
    {"level": 0, "grids": ((8, 8),), "codebook_sizes": (512,)},
    {"level": 1, "grids": ((8, 8), (16, 16)), "codebook_sizes": (512, 512)},
    {
        ("PixelSNAIL", "top"): SMALL_SNAIL,
        ("PixelSNAIL", "bottom"): SMALL_SNAIL,
        ("transformer", "top"): SMALL_TRANSFORMER,
        ("transformer", "bottom"): SMALL_TRANSFORMER,
    },
    {"top": (1, 8, 32), "bottom": (1, 8, 32)},
)


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median time of a piece of work."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def random_codes(config: PriorConfig, batch_size: int) -> list[Tensor]:
    """Codes `(B, h, w)` of all levels of a prior, coarse to fine."""
    sizes = zip(config.codebook_sizes, config.grids, strict=True)
    return [torch.randint(k, (batch_size, *grid)) for k, grid in sizes]


def plain_forward(
    prior: Prior, batch_size: int, condition: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Codes `(B, rows, w)` to logits, with all that the condition gives computed beforehand."""
    if isinstance(prior, TransformerPrior):
        background = prior.background(batch_size, condition, None)

        def transformer(codes: Tensor) -> Tensor:
            flat = codes.flatten(1)
            before = F.pad(flat[:, :-1], (1, 0), value=prior.codebook_size)
            x = prior.embedding(before) + background[:, : flat.shape[1]]
            for block in prior.blocks:
                x = block(x, prior.angles[:, : flat.shape[1]])
            return prior.head(prior.norm(x[:, -codes.shape[2] :]))

        return transformer
    snail = cast(PixelSNAIL, prior)
    context = snail.context(batch_size, condition, None)
    places = snail.places.expand(batch_size, -1, -1)

    def pixelsnail(codes: Tensor) -> Tensor:
        rows, width = codes.shape[1:]
        embedded = snail.embedding(codes)
        before = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0))
        above = None if context is None else context[:, :rows]
        x = snail.stem(embedded)
        for block in snail.blocks:
            x = block(x, before, places[:, : rows * width], above)
        return snail.output(x[:, -1])

    return pixelsnail


def plain_seconds(prior: Prior, batch_size: int, condition: list[Tensor]) -> float:
    """Seconds of a whole plain loop for one batch, from the time of one code in some rows."""
    height, width = prior.config.grids[-1]
    forward = plain_forward(prior, batch_size, condition)
    timed = sorted({1, max(1, height // 4), height // 2, 3 * height // 4, height})
    each = []
    for rows in timed:
        codes = torch.randint(prior.config.codebook_sizes[-1], (batch_size, rows, width))

        def one_code(codes: Tensor = codes) -> Tensor:
            logits = forward(codes)[:, -1]
            places = torch.zeros(batch_size, 1, dtype=torch.int64)
            noise = gumbel(torch.arange(batch_size), 0, places, logits.shape[-1])
            return draw(logits, noise[:, 0], SamplingConfig())

        one_code()
        each.append(seconds(one_code, 3 if rows < height else 2))
    return float(np.interp(range(1, height + 1), timed, each).sum() * width)


def cached_seconds(prior: Prior, batch_size: int, condition: list[Tensor], *, bf16: bool) -> float:
    """Seconds of sampling a batch through caches, one position in a call."""
    how: Any = {"seeds": range(batch_size), "bf16": bf16, "window": 1}
    return seconds(lambda: prior.sample(batch_size, condition, **how))


def streaming_rate(num_parameters: int, dtype: torch.dtype) -> float:
    """Bytes per second at which packed products of one row read this many weights."""
    size, x = 1024, torch.randn(1, 1024)
    layers = []
    for _ in range(max(1, num_parameters // size**2)):
        layers.append(PackedLinear(torch.randn(size, size), None, 1, dtype))
    fastest = min(seconds(lambda: [layer(x) for layer in layers]) for _ in range(7))
    return len(layers) * size**2 * torch.finfo(dtype).bits / 8 / fastest


def generate_seconds(size: int, positions: int, batch_size: int, *, bf16: bool) -> float | None:
    """Seconds per position of transformers' generate for a GPT-2 of about this size.

    None where transformers is not installed.
    """
    model = make_gpt(size, positions)
    if model is None:
        return None
    model = model.eval().to(torch.bfloat16 if bf16 else torch.float32)
    start = torch.full((batch_size, 1), 512)

    def generate(number: int) -> None:
        lengths = {"max_new_tokens": number, "min_new_tokens": number}
        model.generate(start, do_sample=True, pad_token_id=0, use_cache=True, **lengths)

    generate(4)
    return seconds(lambda: generate(positions)) / positions


def make_gpt(num_parameters: int, positions: int) -> Any:
    """A GPT-2 of 12 layers and about this size, with SDPA; None without transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    width = 64 * max(1, round((num_parameters / 12 / 12) ** 0.5 / 64))
    config = GPT2Config(
        vocab_size=513,
        n_positions=positions + 1,
        n_embd=width,
        n_layer=12,
        n_head=width // 64,
        bos_token_id=512,
        eos_token_id=None,
    )
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0  # as ours here
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


@torch.enable_grad()
def print_training_steps(case: Case, batch_size: int) -> None:
    """A training step of a prior, and of a GPT-2 of its size over as many codes."""
    prior = make_prior(case.config).train()
    size = sum(parameter.numel() for parameter in prior.parameters())
    positions = prior.config.num_positions
    *condition, codes = random_codes(prior.config, batch_size)
    works: dict[str, Callable[[], Tensor]] = {
        case.name: lambda: F.cross_entropy(prior(codes, condition).float(), codes)
    }
    gpt = make_gpt(size, positions)
    if gpt is not None:
        works["GPT-2"] = lambda: gpt.train()(codes.flatten(1), labels=codes.flatten(1)).loss

    # The models take turns; the first turn warms up.
    for precision in ("fp32", "bf16"):
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(4):
            for name, loss in works.items():
                started = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    value = loss()
                value.backward()
                if turn:
                    times[name].append(time.perf_counter() - started)
        medians = {name: f"{median(values):6.2f} s" for name, values in times.items()}
        print(f"  training step, {positions} codes, batch {batch_size}, {precision}: {medians}")


def print_sampling(case: Case, batch_sizes: Sequence[int] | None) -> None:
    """A model's table: the plain loop, cached sampling and GPT-2's generate for each batch size."""
    prior = make_prior(case.config).eval()
    size = sum(parameter.numel() for parameter in prior.parameters())
    positions = prior.config.num_positions
    print(f"\n{case.name}, {size / 1e6:.1f} M parameters")
    floors = {False: 0.0, True: 0.0}
    if isinstance(prior, TransformerPrior):
        each = prior.blocks, prior.norm, prior.head  # what a position reads
        read = sum(weight.numel() for part in each for weight in part.parameters())
        floors[False] = read * 4 / streaming_rate(read, torch.float32)
        floors[True] = read * 2 / streaming_rate(read, torch.bfloat16)
        rates = f"{1 / floors[False]:.0f} codes/s fp32, {1 / floors[True]:.0f} bf16"
        print(f"floor at batch 1: {rates}")
    for batch_size in batch_sizes or case.batch_sizes:
        *condition, _ = random_codes(prior.config, batch_size)
        plain, all_codes = plain_seconds(prior, batch_size, condition), positions * batch_size
        row = f"{plain / batch_size:9.2f} s/image {all_codes / plain:9.1f} codes/s"
        print(f"  batch {batch_size:2}  plain loop, fp32  {row} (extrapolated)")
        for name, bf16 in (("fp32", False), ("bf16", True)):
            cached = cached_seconds(prior, batch_size, condition, bf16=bf16)
            row = f"{cached / batch_size:9.2f} s/image {all_codes / cached:9.1f} codes/s"
            ratios = f"{plain / cached:7.1f}x plain"
            if floors[bf16]:
                ratios += f", {floors[bf16] * positions / cached:4.0%} of the floor"
            print(f"            cached, {name}      {row} {ratios}")
            if not isinstance(prior, TransformerPrior):
                continue
            generate = generate_seconds(size, min(positions, 256), batch_size, bf16=bf16)
            if generate is not None:
                row = f"{batch_size / generate:9.1f} codes/s (GPT-2)"
                ratio = f"ours is {generate * positions / cached:.2f}x"
                print(f"            generate, {name}    {'':17} {row}   {ratio}")


def print_windows(folder: str, lanes: int, number: int, windows: Sequence[int]) -> None:
    """A trained pipeline by window: calls, time, and images whose codes differ."""
    pipeline, calls, expected = VQVAE2Pipeline.from_pretrained(folder), [], None
    original = prior.base.sample_codes

    def counted(step: Any, guesses: Any, width: int) -> Any:
        codes, number_of_calls = original(step, guesses, width)
        calls.append((codes.shape[1], number_of_calls / codes.shape[1]))
        return codes, number_of_calls

    prior.base.sample_codes = counted
    print(f"\n{folder}, {number} images, {lanes} lanes")
    for window in dict.fromkeys((1, *windows)):  # the first is what the others must equal
        calls.clear()
        started = time.perf_counter()
        codes = pipeline(number, lanes=lanes, parallel_positions=window, output_type="pt").codes
        spent = (time.perf_counter() - started) / number
        expected = expected or codes
        shares = {}
        for positions in {positions for positions, _ in calls}:
            own = [share for each, share in calls if each == positions]
            shares[positions] = f"{sum(own) / len(own):.1%}"
        pairs = zip(codes, expected, strict=True)
        other = torch.stack([(a != b).flatten(1).any(dim=1) for a, b in pairs]).any(dim=0)
        text = f"calls by number of positions {shares}, {1e3 * spent:.0f} ms/image"
        print(
            f"  window {window or 'chosen'}: {text}, {int(other.sum())} images differ", flush=True
        )
    prior.base.sample_codes = original


def recorded_advances(folder: str, number: int) -> list[int]:
    """How many codes each call found, of images that a trained pipeline's last prior sampled one at
    a time, one image after the other."""
    pipeline, advances, original = VQVAE2Pipeline.from_pretrained(folder), [], Guesses.settle
    positions = pipeline.priors[-1].config.num_positions

    def noted(guesses: Guesses, first: Tensor, logits: Tensor) -> None:
        before = guesses.num_right.clone()
        original(guesses, first, logits)
        if guesses.codes.shape[1] == positions:
            advances.append(int(guesses.num_right - before))

    with patch.object(Guesses, "settle", noted):
        pipeline(number, lanes=1, parallel_positions=0, output_type="pt")
    return advances


def print_replayed(folder: str, number: int) -> None:
    """Transformers of 86 M parameters, one image at a time: one position in a call, and windows in
    which as many codes are right as in those of a trained pipeline."""
    advances = recorded_advances(folder, number)
    mean = sum(advances) / len(advances)
    print(f"\n{folder}: {len(advances)} calls found {mean:.1f} codes each")

    def replayed(step: Any, guesses: Guesses, width: int) -> tuple[Tensor, int]:
        positions, right = guesses.codes.shape[1], 0
        for calls, advance in enumerate(cycle(advances if width > 1 else [1])):
            first, before = guesses.window(width)
            guesses.settle(first, step(calls, first, before))
            right += advance
            guesses.num_right.fill_(right)
            if right >= positions:
                return guesses.codes, calls + 1
        raise AssertionError("a cycle has no end")

    for side in (16, 32):
        facts: dict[str, Any] = {"level": 0, "grids": ((side, side),), "codebook_sizes": (512,)}
        prior = make_prior(TransformerPriorConfig(network=TRANSFORMER, **facts)).eval()
        for bf16 in (False, True):
            times: dict[int, list[float]] = {1: [], 0: []}
            with patch("prior.base.sample_codes", replayed):
                for window in [*times] * 3:  # they take turns
                    how: Any = {"seeds": [0], "bf16": bf16, "window": window}
                    times[window].append(seconds(partial(prior.sample, 1, [], **how)))
            one, several = (median(each) for each in times.values())
            name = f"transformer of 86 M, {side}x{side}, {'bf16' if bf16 else 'fp32'}"
            print(f"  {name}: {one:.2f} s, in windows {several:.2f} s ({one / several:.1f}x)")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="models as large as the demo's")
    parser.add_argument("--training", action="store_true", help="time training steps instead")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="instead of each model's own")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--pipeline", help="a trained pipeline, by window, instead of fresh models")
    parser.add_argument("--replay", help="a trained pipeline whose guesses large models take over")
    parser.add_argument("--images", type=int, default=32, help="with --pipeline or --replay")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 0])
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_grad_enabled(False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.pipeline:
        for lanes in options.batch_sizes or (1, 16):
            print_windows(options.pipeline, lanes, options.images, options.windows)
        return
    if options.replay:
        print_replayed(options.replay, options.images)
        return
    for case in SMALL if options.small else LARGE:
        if options.only not in case.name:
            continue
        torch.manual_seed(0)
        if options.training:
            print_training_steps(case, batch_size=64 if options.small else 2)
        else:
            print_sampling(case, options.batch_sizes)


if __name__ == "__main__":
    main()
