"""What this machine can do, and the Accelerate object that a training runs on."""

import ctypes
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, utils
from accelerate.state import AcceleratorState, PartialState

from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import UserError

PATIENCE = timedelta(hours=6)  # in which processes wait for one that has more to do


def native_bf16() -> bool:
    """Whether this machine computes in bfloat16 in hardware (emulated, it is slower than fp32)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # absent from older torch
    capabilities: dict[str, bool] = get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system after every use.

    A training step on the CPU frees and takes the same large buffers again; mapping them anew
    costs page faults worth up to half of the step. Only Linux with glibc is affected.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def processes() -> PartialState:
    """Which process of how many this is, and its device; alone when there is no launcher."""
    keep_freed_memory()
    return PartialState(cpu=use_cpu(), timeout=PATIENCE)


def use_cpu() -> bool:
    """Whether to compute on the CPU: by ACCELERATE_USE_CPU, or because there is no CUDA.

    Other accelerators are not used: some lack float64, in which figures are summed and codes
    sampled. Accelerate must know, or it starts no process group.
    """
    return utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def make_accelerator(config: TrainingConfig, output_dir: Path) -> Accelerator:
    """The Accelerate object for one training, in the configuration's precision.

    Raises:
        UserError: fp16 without CUDA, a tracker that is not installed, or a batch size that the
            processes and accumulation steps do not divide.
    """
    keep_freed_memory()

    # Precision. An earlier training of this Python process may have run in another one.
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if native_bf16() else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision is 'fp16', which needs CUDA: use 'bf16' or 'no' here.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()

    # Buffers (a codebook) are equal on all ranks by construction. DDP's own broadcast would hide
    # it if they were not, and make a forward on one rank alone wait forever. (Torch deprecates the
    # option, but its successor is missing from older versions.)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    ddp = utils.DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=use_cpu(),
        mixed_precision=precision,
        log_with=config.tracker,
        project_dir=str(output_dir),
        kwargs_handlers=[ddp, utils.InitProcessGroupKwargs(timeout=PATIENCE)],
    )

    # Accelerate ignores a tracker that is not installed, and leaves the batches to us.
    tracker = config.tracker
    if tracker and not accelerator.log_with:
        raise UserError(f"tracker {tracker!r} is not installed: pip install it, or omit --tracker.")
    processes, steps = accelerator.num_processes, config.gradient_accumulation_steps
    if config.batch_size % (processes * steps):
        factors = f"{processes} processes x {steps} accumulation steps"
        allowed = f"divisible by {processes * steps} ({factors})"
        raise UserError(f"batch_size is {config.batch_size}, but must be {allowed}.")
    return accelerator
