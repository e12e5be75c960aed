"""What `fully_shard` sends between processes on CPUs, each part to the process that needs it.

With gloo (torch 2.14) sharing gradients out takes as long as summing all of them on every process,
and gathering weights longer than one exchange does. Here each pair of processes exchanges what they
need of each other, all pairs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.fsdp import FSDPModule


class _Memory:
    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """For what is sent and received."""
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Memory, AllGather):
    """Every process gets the parts of all."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """
        Args:
            output_tensor: [processes * n]; the parts in the order of the processes.
            input_tensor: [n]; this process's part, which may lie in its place already.
        """
        parts = output_tensor.view(group.size(), -1)
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        _exchange([own] * group.size(), list(parts), group)


class Share(_Memory, ReduceScatter):
    """Every process gets the sum, or the mean, of all processes' numbers for its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """
        Args:
            output_tensor: [n]
            input_tensor: [processes * n]; for the parts of all processes, in their order.
            op: SUM or AVG.
        """
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
        parts = input_tensor.view(group.size(), -1)
        received = torch.empty_like(parts)
        received[group.rank()] = parts[group.rank()]
        _exchange(list(parts), list(received), group)
        torch.sum(received, 0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def over_gloo(unit: FSDPModule) -> None:
    """Lets a unit of `fully_shard` exchange its weights and gradients so."""
    unit.set_custom_all_gather(Gather())
    unit.set_custom_reduce_scatter(Share())


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Any) -> None:
    """Sends every other process of the group its tensor, and fills those that come from them."""
    work: list[Any] = []
    for other in range(group.size()):
        if other != group.rank():
            work.append(dist.irecv(received[other], group=group, group_src=other))
            work.append(dist.isend(sent[other], group=group, group_dst=other))
    for one in work:
        one.wait()
