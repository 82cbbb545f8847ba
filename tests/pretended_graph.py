"""A CUDA graph that is not there: operations are kept with the very tensors that they were called
with, and replayed on these, whatever Python would do by then."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """Keeps the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do them again, and leave the results where they were the first time."""
        for func, args, kwargs, result in self.calls:
            aliases = [each.alias_info for each in func._schema.returns if each.alias_info]
            if aliases and not any(alias.is_write for alias in aliases):
                continue  # a view, of the same memory
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not aliases:
                    old.copy_(new)


def pretended_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As `prior.cuda_graphs.cuda_graph`. Here recording does the work, so the first replay does
    not."""
    tape, number = Tape(), []
    with tape:
        work()

    def replay() -> None:
        if number:
            tape.replay()
        number.append(1)

    return replay
