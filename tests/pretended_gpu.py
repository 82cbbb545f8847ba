"""A GPU that is not there: fake tensors hold no numbers, say that they lie on cuda:0, and refuse to
meet tensors of the CPU.

Seen are tensors on the wrong device and waits of the host for the device. Not seen are numbers,
kernels, graphs, memory, what backward does, other threads and other processes.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prior.cuda_graphs import RecordedCalls

GPU = torch.device("cuda:0")  # with its index: "cuda" alone would become "meta"
OURS = ("vqvae2", "prior", "pipelines")
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.bincount}
# What `torch.use_deterministic_algorithms` refuses on CUDA, or whose backward it refuses.
REFUSED = {aten.histc, aten.kthvalue, aten.median, aten.put_, aten.grid_sampler_2d}
REFUSED |= {aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.reflection_pad2d}
REFUSED |= {aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.max_unpool2d}


class Watch(TorchDispatchMode):
    """Counts, by place, where the host waits for the device, and invents what it waited for; where
    a copy comes from the CPU; and where an operation is called that has no deterministic form."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.arrivals: Counter[str] = Counter()  # of copies from the CPU
        self.refused: Counter[str] = Counter()
        self.calls: Counter[Any] = Counter()  # of operators, wherever they are called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode what is made of other operators arrives whole.
        kwargs, operator = kwargs or {}, func.overloadpacket
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result

        # A wait is a look at a value, or a copy to the CPU. One from it is quick, if there are few.
        first = args[0] if args else None
        on_gpu = isinstance(first, Tensor) and first.device.type == "cuda"
        target = kwargs.get("device") if operator is aten._to_copy else None
        is_copy = target is not None and torch.device(target).type != first.device.type
        if on_gpu and (operator in WAITS or is_copy):
            self.waits[_place()] += 1
        elif is_copy:
            self.arrivals[_place()] += 1
        self.calls[operator] += 1
        is_sum = operator is aten.cumsum and first.is_floating_point()
        is_mean = operator is aten.nll_loss2d_forward and args[3] != 0  # no reduction is 0
        if on_gpu and (operator in REFUSED or is_sum or is_mean):
            self.refused[_place()] += 1

        # What fake tensors let pass, and a value to go on with: what is asked of all holds.
        indices = args[1] if operator in (aten.index, aten.index_put_) and not on_gpu else ()
        if any(index is not None and index.device.type == "cuda" for index in indices):
            raise RuntimeError("a tensor of the CPU is indexed from the GPU")
        if operator is aten._local_scalar_dense:
            number = 0.5 if first.is_floating_point() else 0
            return hasattr(first, "of_all") if first.dtype == torch.bool else number
        result = func(*args, **kwargs)
        if operator is aten.all:
            result.of_all = True
        return result


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame and frame.f_globals["__name__"].split(".")[0] not in OURS:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without the swapping that fake tensors refuse: what is registered moves,
    what is not stays behind. Parameters become other objects."""
    for child in module.children():
        child._apply(change)
    for name, p in module._parameters.items():
        if p is not None:
            moved = nn.Parameter(change(p.detach()), requires_grad=p.requires_grad)
            module._parameters[name] = moved
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


def _no_gradients(outputs: Any, inputs: Tensor, **options: Any) -> tuple[Tensor]:
    """Zeros: torch's autograd engine wants a real GPU; what backward meets, forward has met."""
    return (torch.zeros_like(inputs),)


class _GPUAlone(TorchDispatchMode):
    """Refuses tensors of the CPU, which a graph cannot record; but for numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(each, Tensor) and each.dim() and each.device.type == "cpu":
                raise RuntimeError(f"{func} of a tensor of the CPU while a graph is recorded")
        return result


def _recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    with _GPUAlone():
        work()
    return work


@contextmanager
def pretended_gpu() -> Iterator[Watch]:
    """Inside, everything is fake; `waits` of what it gives counts the waits for the GPU."""
    with ExitStack() as stack:
        # The device guard for CUDA is missing, or wants a GPU. That of meta tensors does as well.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        name = "_ZN3c104impl26device_guard_impl_registryE"
        guards = (ctypes.c_void_p * 21).in_dll(library, name)
        cuda, meta = 1, 14  # numbers of c10::DeviceType
        stack.callback(guards.__setitem__, cuda, guards[cuda])
        guards[cuda] = guards[meta]

        # What is remembered must not outlive the pretence.
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] in OURS:
                for function in vars(module).values():
                    if callable(forget := getattr(function, "cache_clear", None)):
                        forget()
                        stack.callback(forget)

        # Autocast would turn itself off, and compilers and graphs would want the GPU.
        for patch in (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch.object(nn.Module, "_apply", _apply),
            mock.patch("torch.autograd.grad", _no_gradients),
            mock.patch("torch.compile", lambda step, **options: step),
            mock.patch("prior.base.RecordedCalls", partial(RecordedCalls, record=_recorded)),
        ):
            stack.enter_context(patch)
        broken: list[object] = []
        stack.enter_context(mock.patch("prior.cuda_graphs.broken", broken))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(Watch())
        assert not broken
