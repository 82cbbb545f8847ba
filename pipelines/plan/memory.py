"""One step of a training, or an encoding, on tensors that have shapes but no memory: what it computes and what it keeps.

The step is the real one (model, loss, autocast, backward) under `FakeTensorMode`: meta tensors that pretend to lie on the CPU, so that the code
takes the paths that it takes there. Plain meta tensors know no autocast, and their attention keeps every score. For a GPU, which fuses other
operations, the same step is an approximation.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vqvae2.common.config import TrainingConfig
from vqvae2.common.fit import LossFunction
from vqvae2.config import VQVAE2Config
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer

AUTOCAST_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Stage:
    """One training of a recipe."""

    name: str
    """Its section in the recipe."""
    title: str
    """What is trained."""
    config: TrainingConfig
    make_model: Callable[[], nn.Module]
    """Makes what is trained."""
    make_loss: Callable[[Any], LossFunction]
    """Makes the loss function for a model."""
    batch: Callable[[int, torch.device], Mapping[str, Any]]
    """Makes a batch of so many rows of random data."""
    notes: tuple[str, ...] = ()
    """What the plan leaves out."""


@dataclass(frozen=True)
class Cost:
    """What one training step needs. The first three are constant, the others linear in the number of rows."""

    num_parameters: int
    weights: int
    """Bytes of parameters and buffers."""
    learned: int
    """Bytes of the parameters that learn."""
    activations: int
    """Bytes that the backward pass finds saved, parameters aside."""
    working: int
    """Bytes of all else that is alive at the worst moment, the parameters' gradients aside: results on their way from one operation to the next."""
    flops: int
    """Forward and backward."""


def trace(stage: Stage, rows: int, precision: str) -> Cost:
    """One step of a stage with so many rows, on tensors without memory."""
    with torch.device("meta"):
        model = stage.make_model()
    with no_memory():
        model.to_empty(device="cpu").train()
        loss_fn = stage.make_loss(model)
        for module in model.modules():
            if isinstance(
                module, Quantizer
            ):  # how a codebook learns without gradients saves nothing for later, and asks for values
                module.eval()
        with (
            FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as flops,
            LiveMemory(model) as live,
        ):
            with (
                saved_for_backward(model) as saved,
                torch.autocast("cpu", AUTOCAST_TYPES[precision], enabled=precision != "no"),
            ):
                loss, _ = loss_fn(model, stage.batch(rows, torch.device("cpu")))
            loss.backward()
    parameters = list(model.parameters())
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        weights=sum(t.nbytes for t in [*parameters, *model.buffers()]),
        learned=sum(p.nbytes for p in parameters if p.requires_grad),
        activations=sum(saved.values()),
        working=live.peak - sum(saved.values()),
        flops=flops.get_total_flops(),
    )


def encode_flops(config: VQVAE2Config) -> int:
    """Floating-point operations to encode one image."""
    with torch.device("meta"):
        model = VQVAE2(config)
    with no_memory(), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model.to_empty(device="cpu").eval()
        model.encode(torch.rand(2, config.image.channels, *config.image.height_width))
    return flops.get_total_flops() // 2


class LiveMemory(TorchDispatchMode):
    """Watches what the operations in it allocate and when it is freed; `peak` is the most that was alive at once, parameters' gradients aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {_address(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._set_aside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation and note its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(_address(tensor))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, _address(tensor), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, address: int, number: int) -> None:
        self.seen.discard(address)
        self.alive -= number

    def _set_aside(self, parameter: Tensor) -> None:
        self.alive -= parameter.nbytes


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(
    gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


ATTENTION_FLOPS: dict[Any, Any] = {  # the CPU's attention, which torch's counter passes over
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the memory that a forward pass keeps for the backward pass: bytes by address, each storage once, the model's own aside."""
    own = {_address(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor  # the graph holds it, so no later tensor gets its address

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        yield saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Tensors made here have shapes only. Masks that a prior caches are forgotten before and after: real and unreal ones must not meet."""

    def forget() -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("prior."):
                for function in vars(module).values():
                    if callable(getattr(function, "cache_clear", None)):
                        function.cache_clear()

    forget()
    try:
        with FakeTensorMode(
            allow_non_fake_inputs=True
        ):  # for the meta tensors that a model is made of, before `to_empty`
            yield
    finally:
        forget()
