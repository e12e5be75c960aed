"""Whether numbers are numbers, asked of a whole model at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dojo.lazy import no_grad, torch


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested tables and lists, such as an optimizer's state."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


@no_grad
def not_finite(groups: Mapping[str, Iterable[torch.Tensor]]) -> list[str]:
    """The names of the groups in which a number is NaN or infinite.

    Two numbers of each tensor come back, its ends (which are NaN where anything in it is), and
    all of them to the CPU at once: nothing of a tensor's size is made.
    """
    ends: list[torch.Tensor] = []
    owners: list[str] = []
    for name, tensors in groups.items():
        for tensor in map(_own, tensors):
            if tensor.is_floating_point() and tensor.numel():
                ends += [end.float() for end in tensor.aminmax()]
                owners += [name, name]
    if not ends:
        return []
    # Averages may lie in the CPU's memory while the weights are on the device.
    device = ends[0].device
    good = torch.stack([end.to(device) for end in ends]).isfinite().tolist()
    broken = {owner for owner, whole in zip(owners, good, strict=True) if not whole}
    return [name for name in groups if name in broken]


def _own(tensor: Any) -> torch.Tensor:
    """What this process has of a tensor that may be shared out over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
