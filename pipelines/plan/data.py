"""What a recipe's data takes: bytes of prepared images and codes, and the least time to prepare the codes and to sample. Part of `vqvae2 plan`."""

import math
import statistics
import time
from collections.abc import Sequence

import torch

from pipelines.commands.extract import LANES, encode_lanes
from pipelines.config import PlanConfig
from pipelines.plan.memory import Stage, encode_flops
from pipelines.plan.speed import hours, matrix_product_rate, memory_rate, timed
from prior.shards import smallest_type
from vqvae2.config import VQVAE2Config
from vqvae2.model import VQVAE2

SAMPLING_LANES = 16  # images that `vqvae2 sample` draws at once, unless told otherwise


def plan_data(
    autoencoder: Stage, priors: Sequence[Stage], config: PlanConfig, device: torch.device | None
) -> list[str]:
    """What is said about the data of a recipe.

    Args:
        device: what is planned for, if this machine has it.
    """
    model: VQVAE2Config = autoencoder.config.model  # type: ignore[attr-defined]
    number = config.num_images or 1_000_000
    lines = [
        f"{name:<16}{size * number / 2**30:,.2f} GiB for {number:,} images ({size:,.0f} bytes each)"
        for name, size in stored_bytes(model).items()
    ]
    flops = encode_flops(model)
    lines.append(f"{'extraction':<16}{flops / 1e9:,.3g} GFLOP per image")
    if device is None:
        return [*lines, "times           unknown: this machine has no such device."]
    if config.measure:
        rate, source = encode_rate(model, device), "at the encoder's rate, timed here"
    else:
        rate, source = (
            matrix_product_rate(device, torch.float32) / flops,
            "at least, at the speed of a matrix product measured here",
        )
    lines.append(
        f"{'':<16}{hours(number / rate / config.num_devices)} on {config.num_devices} device(s), {source}: {rate:,.4g} images/s each, fp32"
    )
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in stage.make_model().parameters()) for stage in priors]
    seconds = sampling_seconds(model, sizes, memory_rate(device))
    lines.append(
        f"{'sampling':<16}{seconds:,.3g} s per image at least (fp32, {SAMPLING_LANES} at a time), {hours(seconds * 50_000)} for 50,000"
    )
    return lines


def stored_bytes(config: VQVAE2Config) -> dict[str, float]:
    """Bytes per image of what lies on a disk or in memory between the stages.

    Returns:
        `prepared`: pixels before compression; `codes`: ceil(log2 K) bits per code, which uniform codes take on a disk up to 5 %; `codes in
        memory`: as a prior's training reads them, in the smallest type.
    """
    height, width = config.image.height_width
    value = 1 if config.image.value_range == (0, 255) else 4
    levels = [
        (math.prod(grid), size)
        for grid, size in zip(config.grids, config.codebook_size_per_level, strict=True)
    ]
    return {
        "prepared": config.image.channels * height * width * value,
        "codes": sum(positions * math.ceil(math.log2(size)) for positions, size in levels) / 8,
        "codes in memory": sum(
            positions * smallest_type(size).itemsize for positions, size in levels
        ),
    }


def encode_rate(config: VQVAE2Config, device: torch.device) -> float:
    """Images per second of extraction's encoder with fresh weights, timed here; decoding pictures comes on top."""
    model = VQVAE2(config).to(device).eval()
    height, width = config.image.height_width
    pixels = torch.randint(256, (LANES, config.image.channels, height, width), dtype=torch.uint8)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - started < 1:
        times.append(timed(lambda: encode_lanes(model, pixels), device))
    return LANES / statistics.median(times[1:])


def sampling_seconds(config: VQVAE2Config, num_parameters: Sequence[int], rate: float) -> float:
    """The least seconds per image that sampling takes: at each position all weights of the level's prior are read once for `SAMPLING_LANES` images.

    Args:
        num_parameters: of each level's prior.
        rate: bytes per second that the device reads.
    """
    reads = [
        math.prod(grid) * number * 4
        for grid, number in zip(config.grids, num_parameters, strict=True)
    ]
    return sum(reads) / rate / SAMPLING_LANES
