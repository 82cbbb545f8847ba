"""Sampling through caches against the plain loop, side by side in one run: seconds per image and codes per second.

    python benchmarks/sampling.py                    # models of 85-90 M parameters; ten minutes on two cores
    python benchmarks/sampling.py --small            # models as the demo has them; a minute
    pip install -e ".[benchmark]"                    # for the row of transformers' generate

The plain loop is an honest one: the same weights, one forward per code over the rows up to the current one, the condition read once. It is timed on
some rows and interpolated over the others; cached sampling runs in full.
The floor is what reading all weights once per position takes, at the rate at which a packed matrix product reads them here.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
from prior.packed_linear import PackedLinear
from prior.pixelsnail import PixelSNAIL
from prior.sampling import draw
from prior.transformer import TransformerPrior
from vqvae2.common.accelerate import keep_freed_memory


@dataclass
class Case:
    """A model to sample from."""

    name: str
    config: PriorConfig
    batch_sizes: Sequence[int]


TOP = {"level": 0, "grids": ((32, 32),), "codebook_sizes": (512,)}
BOTTOM = {"level": 1, "grids": ((32, 32), (64, 64)), "codebook_sizes": (512, 512)}
SNAIL = {"num_blocks": 4, "num_residual_blocks": 5, "dropout": 0.0}
LARGE = [
    Case(
        "PixelSNAIL, top 32x32",
        PixelSNAILPriorConfig(
            network=PixelSNAILConfig(width=320, residual_channels=320, num_heads=8, **SNAIL), **TOP
        ),
        (1, 8),
    ),
    Case(
        "PixelSNAIL, bottom 64x64",
        PixelSNAILPriorConfig(
            network=PixelSNAILConfig(width=320, residual_channels=320, num_heads=0, **SNAIL),
            **BOTTOM,
        ),
        (1,),
    ),
    Case(
        "transformer, top 32x32",
        TransformerPriorConfig(
            network=TransformerConfig(width=768, num_layers=12, num_heads=12, dropout=0.0), **TOP
        ),
        (1, 8),
    ),
    Case(
        "transformer, bottom 64x64",
        TransformerPriorConfig(
            network=TransformerConfig(width=768, num_layers=10, num_heads=12, dropout=0.0), **BOTTOM
        ),
        (1,),
    ),
]
SMALL_TOP = {"level": 0, "grids": ((8, 8),), "codebook_sizes": (512,)}
SMALL_BOTTOM = {"level": 1, "grids": ((8, 8), (16, 16)), "codebook_sizes": (512, 512)}
SMALL_SNAIL = PixelSNAILConfig(width=64, residual_channels=64, dropout=0.0)
SMALL_TRANSFORMER = TransformerConfig(width=192, num_layers=4, num_heads=3, dropout=0.0)
SMALL = [
    Case(
        "PixelSNAIL, top 8x8", PixelSNAILPriorConfig(network=SMALL_SNAIL, **SMALL_TOP), (1, 8, 32)
    ),
    Case(
        "PixelSNAIL, bottom 16x16",
        PixelSNAILPriorConfig(network=SMALL_SNAIL, **SMALL_BOTTOM),
        (1, 8, 32),
    ),
    Case(
        "transformer, top 8x8",
        TransformerPriorConfig(network=SMALL_TRANSFORMER, **SMALL_TOP),
        (1, 8, 32),
    ),
    Case(
        "transformer, bottom 16x16",
        TransformerPriorConfig(network=SMALL_TRANSFORMER, **SMALL_BOTTOM),
        (1, 8, 32),
    ),
]


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median time of a piece of work."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def plain_forward(
    prior: Prior, batch_size: int, condition: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """A function of codes `(B, rows, w)` to their logits, with all that depends on the condition computed before."""
    if isinstance(prior, TransformerPrior):
        background = prior.background(batch_size, condition, None)

        def transformer(codes: Tensor) -> Tensor:
            flat = codes.flatten(1)
            x = (
                prior.embedding(F.pad(flat[:, :-1], (1, 0), value=prior.codebook_size))
                + background[:, : flat.shape[1]]
            )
            for block in prior.blocks:
                x = block(x, prior.angles[:, : flat.shape[1]])
            return prior.head(prior.norm(x[:, -codes.shape[2] :]))

        return transformer
    snail = cast(PixelSNAIL, prior)
    context, places = (
        snail.context(batch_size, condition, None),
        snail.places.expand(batch_size, -1, -1),
    )

    def pixelsnail(codes: Tensor) -> Tensor:
        rows, width = codes.shape[1:]
        embedded = snail.embedding(codes)
        before = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0))
        x = snail.stem(embedded)
        for block in snail.blocks:
            x = block(
                x, before, places[:, : rows * width], None if context is None else context[:, :rows]
            )
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
        work = lambda codes=codes: draw(
            forward(codes)[:, -1], torch.rand(batch_size), SamplingConfig()
        )  # noqa: E731
        work()
        each.append(seconds(work, 3 if rows < height else 2))
    return float(np.interp(range(1, height + 1), timed, each).sum() * width)


def cached_seconds(prior: Prior, batch_size: int, condition: list[Tensor], *, bf16: bool) -> float:
    """Seconds of sampling a batch through caches."""
    return seconds(lambda: prior.sample(batch_size, condition, seeds=range(batch_size), bf16=bf16))


def streaming_rate(num_parameters: int, dtype: torch.dtype) -> float:
    """Bytes per second at which packed products of one row read so many weights."""
    size = 1024
    layers = [
        PackedLinear(torch.randn(size, size), None, 1, dtype)
        for _ in range(max(1, num_parameters // size**2))
    ]
    x = torch.randn(1, size)
    time_of_all = min(seconds(lambda: [layer(x) for layer in layers]) for _ in range(7))
    return len(layers) * size**2 * torch.finfo(dtype).bits / 8 / time_of_all


def generate_seconds(
    num_parameters: int, positions: int, batch_size: int, *, bf16: bool
) -> float | None:
    """Seconds per position of transformers' generate for a GPT-2 of 12 layers and about this size; None where it is not installed."""
    model = make_gpt(num_parameters, positions)
    if model is None:
        return None
    model = model.eval()
    model = model.to(torch.bfloat16) if bf16 else model
    start = torch.full((batch_size, 1), 512)
    options: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": positions,
        "min_new_tokens": positions,
        "pad_token_id": 0,
        "use_cache": True,
    }
    model.generate(start, **{**options, "max_new_tokens": 4, "min_new_tokens": 4})
    return seconds(lambda: model.generate(start, **options)) / positions


def make_gpt(num_parameters: int, positions: int) -> Any:
    """A GPT-2 of 12 layers and about this size, with SDPA; None where transformers is not installed."""
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


def print_training_steps(case: Case, batch_size: int) -> None:
    """A training step of a prior, and of a GPT-2 of its size over as many codes."""
    with torch.enable_grad():
        prior = make_prior(case.config).train()
        size, positions = (
            sum(parameter.numel() for parameter in prior.parameters()),
            prior.config.num_positions,
        )
        gpt = make_gpt(size, positions)
        *condition, codes = [
            torch.randint(k, (batch_size, *grid))
            for k, grid in zip(prior.config.codebook_sizes, prior.config.grids, strict=True)
        ]
        works: dict[str, Callable[[], Tensor]] = {
            case.name: lambda: F.cross_entropy(prior(codes, condition).float(), codes)
        }
        if gpt is not None:
            works["GPT-2"] = lambda: gpt.train()(codes.flatten(1), labels=codes.flatten(1)).loss
        for precision in ("fp32", "bf16"):
            times: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(4):
                for name, loss in works.items():
                    started = time.perf_counter()
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        value = loss()
                    value.backward()
                    times[name] += [time.perf_counter() - started] * (turn > 0)
            found = {name: f"{median(values):6.2f} s" for name, values in times.items()}
            print(f"  training step, {positions} codes, batch {batch_size}, {precision}: {found}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="models as large as the demo's")
    parser.add_argument("--training", action="store_true", help="time training steps instead")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        help="instead of each model's own; the plain loop of a large batch takes long",
    )
    parser.add_argument("--only", default="", help="only models whose name holds this")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_grad_enabled(False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for case in (case for case in (SMALL if options.small else LARGE) if options.only in case.name):
        torch.manual_seed(0)
        if options.training:
            print_training_steps(case, batch_size=64 if options.small else 2)
            continue
        prior = make_prior(case.config).eval()
        size = sum(parameter.numel() for parameter in prior.parameters())
        positions = prior.config.num_positions
        floors = {
            name: size * bits / 8 / streaming_rate(size, dtype)
            for name, bits, dtype in (("fp32", 32, torch.float32), ("bf16", 16, torch.bfloat16))
        }
        print(
            f"\n{case.name}, {size / 1e6:.1f} M parameters; floor {1 / floors['fp32']:.0f} codes/s fp32, {1 / floors['bf16']:.0f} bf16 per image at batch 1"
        )
        for batch_size in options.batch_sizes or case.batch_sizes:
            condition = [
                torch.randint(k, (batch_size, *grid))
                for k, grid in zip(
                    prior.config.codebook_sizes, prior.config.grids[:-1], strict=False
                )
            ]
            plain, all_codes = plain_seconds(prior, batch_size, condition), positions * batch_size
            print(
                f"  batch {batch_size:2}  plain loop, fp32  {plain / batch_size:9.2f} s/image {all_codes / plain:9.1f} codes/s (extrapolated)"
            )
            for name in ("fp32", "bf16"):
                found = cached_seconds(prior, batch_size, condition, bf16=name == "bf16")
                ratios = f"{plain / found:7.1f}x the plain loop   {floors[name] * positions / found:4.0%} of the floor"
                print(
                    f"            cached, {name}      {found / batch_size:9.2f} s/image {all_codes / found:9.1f} codes/s {ratios}"
                )
                generate = (
                    generate_seconds(size, min(positions, 256), batch_size, bf16=name == "bf16")
                    if isinstance(prior, TransformerPrior)
                    else None
                )
                if generate is not None:
                    print(
                        f"            generate, {name}    {'':17} {batch_size / generate:9.1f} codes/s (GPT-2)   ours is {generate * positions / found:.2f}x"
                    )


if __name__ == "__main__":
    main()
