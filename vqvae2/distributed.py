"""What stage 1 needs when several processes train together.

Whether there is a process group is asked at every call: a model may be built before the group is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone: list[bool] = []


@contextmanager
def alone() -> Iterator[None]:
    """A context: this process computes as if there were no others, which would have to join in."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def world_size() -> int:
    """Number of processes."""
    is_group = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if is_group else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in rank order, as one process would see the joint batch."""
    if world_size() == 1:
        return rows
    rows = rows.contiguous()
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


def from_main_process(tensor: Tensor) -> Tensor:
    """The main process's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def random_integers(counter: Tensor, number: int) -> Tensor:
    """Random integers `(number,)` from 0 to 2^63 - 1, equal on every process.

    A hash of the counter `()` (SplitMix64's finaliser): no generator has a state to save.
    """

    def shifted(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    keys = counter * number + torch.arange(1, number + 1, device=counter.device)
    keys = (keys ^ shifted(keys, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    keys = (keys ^ shifted(keys, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (keys ^ shifted(keys, 31)) & (2**63 - 1)
