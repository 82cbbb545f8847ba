"""Stage 1 against a textbook version and against libraries, side by side in one run: what a training step, extraction and the quantizer cost.

    python benchmarks/stage1.py            # pip install -e ".[benchmark]" for the libraries; without them their rows are left out

All run with the same threads and the same allocator settings, in turns; figures are medians. GFLOP counts 2 per multiply-accumulate.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from textbook import OneHotQuantizer, TextbookVQVAE2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vqvae2 import VQVAE2, EMAQuantizer, PreprocessingConfig, QuantizerConfig, VQVAE2Config
from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.losses import make_loss

SHAPES = {"3x256x256, batch 4": (4, 3, 256, 256), "3x64x64, batch 32": (32, 3, 64, 64)}
Work = Callable[[], object]


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each, run A B C A B C ... after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def precision(bf16: bool) -> torch.autocast:
    """bf16 autocast, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def our_step(shape: tuple[int, ...], *, bf16: bool) -> Work:
    """A training step as `fit` makes it, with AdamW."""
    torch.manual_seed(0)
    model = VQVAE2(VQVAE2Config(image=PreprocessingConfig(size=shape[2:]))).train()
    loss_fn = make_loss("mse", model.config.codebook_size_per_level)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(shape) * 2 - 1

    def step() -> None:
        with precision(bf16):
            loss, _ = loss_fn(model, {"images": images})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def textbook_step(shape: tuple[int, ...], *, bf16: bool) -> Work:
    """The same with the textbook model and Adam."""
    torch.manual_seed(0)
    model = TextbookVQVAE2().train()
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(shape) * 2 - 1

    def step() -> None:
        with precision(bf16):
            reconstruction, loss = model(images)
            loss = F.mse_loss(reconstruction, images) + 0.25 * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_extraction(shape: tuple[int, ...], *, bf16: bool) -> Callable[[], list[Tensor]]:
    """Images to codes."""
    torch.manual_seed(0)
    model = VQVAE2(VQVAE2Config(image=PreprocessingConfig(size=shape[2:])))
    images = torch.rand(shape) * 2 - 1
    model(images)  # starts the codebooks
    model.eval()

    @torch.inference_mode()
    def extract() -> list[Tensor]:
        with precision(bf16):
            return [level.codes for level in model.encode(images)]

    return extract


def textbook_extraction(shape: tuple[int, ...]) -> Work:
    """The same as the widely used implementation does it, with autograd on."""
    model, images = TextbookVQVAE2().eval(), torch.rand(shape) * 2 - 1
    return lambda: model.encode(images)


def quantizers(codebook_size: int, features: Tensor) -> dict[str, Work]:
    """A training-mode forward of each quantizer, and the matrix product that any search by products needs."""
    dim = features.shape[1]
    works: dict[str, Work] = {}
    ours, textbook = (
        EMAQuantizer(codebook_size, dim, QuantizerConfig(start_from_data=False)).train(),
        OneHotQuantizer(codebook_size, dim).train(),
    )
    works["textbook"] = lambda: textbook(features.contiguous())
    works["ours"] = lambda: ours(features)
    try:
        from vector_quantize_pytorch import VectorQuantize

        library = VectorQuantize(
            dim, codebook_size, decay=0.99, accept_image_fmap=True, rotation_trick=False
        ).train()
        works["vector-quantize-pytorch"] = lambda: library(features)
    except ImportError:
        pass
    try:
        from diffusers.models.autoencoders.vae import VectorQuantizer

        without_ema = VectorQuantizer(codebook_size, dim, beta=0.25, legacy=False).train()
        works["diffusers (no EMA)"] = lambda: without_ema(features)
    except ImportError:
        pass
    vectors, codebook = torch.randn(4096, dim), torch.randn(dim, codebook_size)
    buffer = torch.empty(4096, codebook_size)
    repeats = features.numel() // dim // 4096
    works["matrix product alone"] = lambda: [
        torch.mm(vectors, codebook, out=buffer) for _ in range(repeats)
    ]
    return works


def _extra_memory(codebook_size: int, name: str, result: "multiprocessing.Queue[float]") -> None:
    features = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    work = quantizers(codebook_size, features)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _peak_mebibytes()
    work()
    result.put(_peak_mebibytes() - before)


def _peak_mebibytes() -> float:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def extra_memory(codebook_size: int, name: str) -> float:
    """MiB by which the peak of a fresh process grows in one forward."""
    context = multiprocessing.get_context("spawn")
    result: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_extra_memory, args=(codebook_size, name, result))
    process.start()
    process.join()
    return result.get()


def peak(dtype: torch.dtype, rounds: int) -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(2, 4096, 4096).to(dtype)
    return 2 * 4096**3 / in_turns({"mm": lambda: a @ b}, rounds)["mm"] / 1e9


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    peaks = {"fp32": peak(torch.float32, rounds), "bf16": peak(torch.bfloat16, rounds)}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; matrix product: {peaks['fp32']:.0f} GFLOP/s fp32, {peaks['bf16']:.0f} bf16"
    )

    for name, shape in SHAPES.items():
        with FlopCounterMode(display=False) as counter:
            our_step(shape, bf16=False)()
        gflop = counter.get_total_flops() / 1e9
        works = {
            "textbook fp32": textbook_step(shape, bf16=False),
            "textbook bf16": textbook_step(shape, bf16=True),
        }
        works |= {"ours fp32": our_step(shape, bf16=False), "ours bf16": our_step(shape, bf16=True)}
        seconds = in_turns(works, rounds)
        print(f"\ntraining step, {name} ({gflop:.1f} GFLOP)")
        for work, value in seconds.items():
            share = gflop / value / peaks[work.split()[-1]]
            print(
                f"  {work:16} {value * 1e3:8.0f} ms {shape[0] / value:8.1f} images/s   {seconds['textbook fp32'] / value:5.2f}x textbook fp32   "
                f"{gflop / value:5.0f} GFLOP/s, {share:4.0%} of its peak"
            )

    for name, shape in SHAPES.items():
        ours, fast = our_extraction(shape, bf16=False), our_extraction(shape, bf16=True)
        seconds = in_turns(
            {"textbook fp32": textbook_extraction(shape), "ours fp32": ours, "ours bf16": fast},
            2 * rounds,
        )
        print(f"\nextraction, {name}")
        for work, value in seconds.items():
            print(
                f"  {work:16} {value * 1e3:8.0f} ms {shape[0] / value:8.1f} images/s   {seconds['textbook fp32'] / value:5.2f}x textbook fp32"
            )
        changed = [(a != b).float().mean().item() for a, b in zip(ours(), fast(), strict=True)]
        print(
            f"  bf16 changes {changed[0]:.1%} of the top codes and {changed[1]:.1%} of the bottom codes (untrained weights)"
        )

    features = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    for codebook_size in (512, 8192):
        works = quantizers(codebook_size, features)
        seconds = in_turns(works, rounds if codebook_size == 512 else 2)
        print(
            f"\nquantizer alone, 32,768 vectors of dimension 64, K = {codebook_size}, training-mode forward"
        )
        for work, value in seconds.items():
            memory = (
                f"{extra_memory(codebook_size, work):6.0f} MiB more"
                if work != "matrix product alone"
                else ""
            )
            product = value / seconds["matrix product alone"]
            print(
                f"  {work:24} {value * 1e3:8.1f} ms   {seconds['textbook'] / value:5.2f}x textbook   {product:5.2f} of the product   {memory}"
            )


if __name__ == "__main__":
    main()
