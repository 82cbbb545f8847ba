"""What this machine can do, and the Accelerate object that a training runs on."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, utils
from accelerate.state import AcceleratorState, PartialState

from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import UserError
from vqvae2.common.threads import set_threads
from vqvae2.common.torch_settings import set_arithmetic

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # in which processes wait for one that has more to do


def native_bf16(device_type: str = "") -> bool:
    """Whether this machine ("cpu", "cuda", or what is used here) computes in bfloat16 in hardware
    (emulated, it is slower than fp32)."""
    if (device_type or ("cpu" if use_cpu() else "cuda")) == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # absent from older torch
    capabilities: dict[str, bool] = get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def chosen_precision(asked: str, device_type: str = "") -> str:
    """The precision that is asked for; of "auto", "bf16" where it is `native_bf16`, else "no"."""
    if asked != "auto":
        return asked
    return "bf16" if native_bf16(device_type) else "no"


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
    set_arithmetic()
    return PartialState(cpu=use_cpu(), timeout=PATIENCE)


def use_cpu() -> bool:
    """Whether to compute on the CPU: by ACCELERATE_USE_CPU, or because there is no CUDA.

    Other accelerators are not used: some lack float64, in which figures are summed and codes
    sampled. Accelerate must know, or it starts no process group.
    """
    return utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def describe_place(accelerator: Accelerator) -> str:
    """What computes, and in which precision: "2 x cuda, bf16"."""
    number = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{number}{accelerator.device.type}, {precision}"


def on_main_process(state: Any, action: Callable[[], T]) -> T:
    """Return on every process what an action returns on the main one; likewise what it raises, as
    the others must not wait for one that ended. `state` is an Accelerator or a PartialState."""
    if state.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = error
    utils.broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].told_by_first = not state.is_main_process
        raise outcome[1]
    return outcome[0]


def refuse_several_processes() -> None:
    """Raise a `UserError` on every process of a launch of several."""
    if processes().num_processes > 1:
        raise UserError("this command runs in one process: start it by itself, as vqvae2 ...")


def check_same_images(facts: Mapping[str, Any], number: int) -> None:
    """Raise a `UserError` on every process if one sees other images than the first.

    Args:
        facts: what a run is bound to (hashes of names, marks of contents).
        number: of images, or of what holds them, to tell the user.
    """
    (expected, right), *others = utils.gather_object([(dict(facts), number)])
    for index, (found, count) in enumerate(others, start=1):
        if found != expected:
            what = f"{count} instead of {right}" if count != right else f"{count} others"
            problem = f"process {index} sees other images than process 0 ({what})"
            raise UserError(f"{problem}: give every machine the same, or let them share a disk.")


def make_accelerator(config: TrainingConfig, output_dir: Path) -> Accelerator:
    """The Accelerate object for one training, in the configuration's precision.

    Raises:
        UserError: fp16 without CUDA, a tracker that is not installed, a launcher that asks for
            another way to share a model, or a batch size that the processes and accumulation steps
            do not divide.
    """
    keep_freed_memory()
    set_threads(config.num_threads)
    set_arithmetic()

    # Precision. An earlier training of this Python process may have run in another one.
    precision = chosen_precision(config.mixed_precision)
    if precision == "fp16" and use_cpu():
        raise UserError("mixed_precision is 'fp16', which needs CUDA: use 'bf16' or 'no' here.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()

    # What a launcher's environment may say of models must not change them.
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if utils.parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"ACCELERATE_USE_{name} is set, but here every device holds the whole "
                "model: unset it, or start with accelerate launch --multi_gpu or torchrun."
            )

    # Buffers (a codebook) are equal on all ranks by construction. DDP's own broadcast would hide
    # it if they were not, and make a forward on one rank alone wait forever. (Torch deprecates the
    # option, but its successor is missing from older versions.) Gradients lie in DDP's buckets
    # alone, not a second time beside them.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    ddp = utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=use_cpu(),
        mixed_precision=precision,
        log_with=config.tracker,
        project_dir=str(output_dir),
        dynamo_backend="no",
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
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
