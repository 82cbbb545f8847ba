"""What a training step, extraction and the quantizer cost, beside a textbook version and libraries.

    python benchmarks/stage1.py

Libraries that are not installed (pip install -e ".[benchmark]") are left out. All run in turns with
the same threads and allocator settings; figures are medians. GFLOP counts 2 per multiply-add.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from textbook import OneHotQuantizer, TextbookVQVAE2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vqvae2 import VQVAE2, EMAQuantizer, PreprocessingConfig, QuantizerConfig, VQVAE2Config
from vqvae2.common.accelerate import keep_freed_memory
from vqvae2.common.config import TrainingConfig
from vqvae2.common.fit import make_optimizer
from vqvae2.losses import make_loss

SHAPES = {"3x256x256, batch 4": (4, 3, 256, 256), "3x64x64, batch 32": (32, 3, 64, 64)}
Work = Callable[[], object]

# The dimension and the quantizer of the implementations that ours is timed beside.
AS_THERE: dict[str, Any] = {"code_dims": (64,), "quantizer": QuantizerConfig(kind="ema")}


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
    """A training step as `fit` makes it, but for clipping and the average of the weights, and with
    AdamW, as the textbook's."""
    torch.manual_seed(0)
    model = VQVAE2(VQVAE2Config(image=PreprocessingConfig(size=shape[2:]), **AS_THERE)).train()
    loss_fn = make_loss("mse", model.config.codebook_size_per_level)
    optimizer = make_optimizer(model, TrainingConfig(optimizer="adamw"))
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
    model = VQVAE2(VQVAE2Config(image=PreprocessingConfig(size=shape[2:]), **AS_THERE))
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
    """A training-mode forward of each quantizer, and the matrix product that a search needs."""
    # Ours and the textbook's.
    dim = features.shape[1]
    works: dict[str, Work] = {}
    ours = EMAQuantizer(codebook_size, dim, QuantizerConfig(start_from_data=False)).train()
    textbook = OneHotQuantizer(codebook_size, dim).train()
    works["textbook"] = lambda: textbook(features.contiguous())
    works["ours"] = lambda: ours(features)

    # The libraries', where they are installed.
    options = {"decay": 0.99, "accept_image_fmap": True, "rotation_trick": False}
    try:
        from vector_quantize_pytorch import VectorQuantize

        library = VectorQuantize(dim, codebook_size, **options).train()
        works["vector-quantize-pytorch"] = lambda: library(features)
    except ImportError:
        pass
    try:
        from diffusers.models.autoencoders.vae import VectorQuantizer

        without_ema = VectorQuantizer(codebook_size, dim, beta=0.25, legacy=False).train()
        works["diffusers (no EMA)"] = lambda: without_ema(features)
    except ImportError:
        pass

    # The product alone.
    vectors, codebook = torch.randn(4096, dim), torch.randn(dim, codebook_size)
    buffer = torch.empty(4096, codebook_size)

    def product() -> None:
        for _ in range(features.numel() // dim // 4096):
            torch.mm(vectors, codebook, out=buffer)

    works["matrix product alone"] = product
    return works


def _extra_memory(codebook_size: int, name: str, result: "multiprocessing.Queue[float]") -> None:
    features = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    work = quantizers(codebook_size, features)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _peak_mebibytes()
    work()
    result.put(_peak_mebibytes() - before)


def _peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


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


def training_table(rounds: int, peaks: dict[str, float]) -> None:
    """A training step."""
    for name, shape in SHAPES.items():
        step = our_step(shape, bf16=False)
        step()  # starts the codebooks, which is no part of a step
        with FlopCounterMode(display=False) as counter:
            step()
        gflop = counter.get_total_flops() / 1e9
        works: dict[str, Work] = {}
        for kind, make in (("textbook", textbook_step), ("ours", our_step)):
            works[f"{kind} fp32"] = make(shape, bf16=False)
            works[f"{kind} bf16"] = make(shape, bf16=True)
        seconds = in_turns(works, rounds)
        print(f"\ntraining step, {name} ({gflop:.1f} GFLOP)")
        for work, value in seconds.items():
            speed = f"{value * 1e3:8.0f} ms {shape[0] / value:8.1f} images/s"
            ratio = f"{seconds['textbook fp32'] / value:5.2f}x textbook fp32"
            share = f"{gflop / value / peaks[work.split()[-1]]:4.0%} of its peak"
            print(f"  {work:16} {speed}   {ratio}   {gflop / value:5.0f} GFLOP/s, {share}")


def extraction_table(rounds: int) -> None:
    """Images to codes."""
    for name, shape in SHAPES.items():
        ours, fast = our_extraction(shape, bf16=False), our_extraction(shape, bf16=True)
        works = {"textbook fp32": textbook_extraction(shape), "ours fp32": ours, "ours bf16": fast}
        seconds = in_turns(works, 2 * rounds)
        print(f"\nextraction, {name}")
        for work, value in seconds.items():
            speed = f"{value * 1e3:8.0f} ms {shape[0] / value:8.1f} images/s"
            print(f"  {work:16} {speed}   {seconds['textbook fp32'] / value:5.2f}x textbook fp32")
        changed = [(a != b).float().mean().item() for a, b in zip(ours(), fast(), strict=True)]
        levels = f"{changed[0]:.1%} of the top codes and {changed[1]:.1%} of the bottom codes"
        print(f"  bf16 changes {levels} (untrained weights)")


def quantizer_table(codebook_size: int, rounds: int) -> None:
    """The quantizer alone."""
    features = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    seconds = in_turns(quantizers(codebook_size, features), rounds)
    what = f"32,768 vectors of dimension 64, K = {codebook_size}, training-mode forward"
    print(f"\nquantizer alone, {what}")
    for work, value in seconds.items():
        ratio = f"{seconds['textbook'] / value:5.2f}x textbook"
        product = f"{value / seconds['matrix product alone']:5.2f} of the product"
        memory = ""
        if work != "matrix product alone":
            memory = f"{extra_memory(codebook_size, work):6.0f} MiB more"
        print(f"  {work:24} {value * 1e3:8.1f} ms   {ratio}   {product}   {memory}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    peaks = {"fp32": peak(torch.float32, rounds), "bf16": peak(torch.bfloat16, rounds)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"matrix product: {peaks['fp32']:.0f} GFLOP/s fp32, {peaks['bf16']:.0f} bf16")
    training_table(rounds, peaks)
    extraction_table(rounds)
    quantizer_table(512, rounds)
    quantizer_table(8192, 2)


if __name__ == "__main__":
    main()
