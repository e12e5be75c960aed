"""The policy as it was a while ago: a second set of the trained weights that follows slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dojo.lazy import no_grad

if TYPE_CHECKING:
    from torch import Tensor, nn


class Lagged:
    """Trained weights that follow the others with a delay.

    Both sets lie on the device; to change them takes no copy. A part of every checkpoint (see
    `Learner`), so that a run goes on exactly.

    Args:
        network: that has them.
        params: the trained weights, whole and float32 (`cost.begin` refuses others): in bfloat16 a
            slow step would be rounded away.
    """

    def __init__(self, network: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.network = network
        self.params = list(params)
        self.values = [param.detach().clone() for param in self.params]

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The network, with the lagged weights in it for a while."""
        self._swap()
        try:
            yield self.network
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, param in enumerate(self.params):
            param.data, self.values[i] = self.values[i], param.data

    @no_grad
    def follow(self, decay: float) -> None:
        """Takes the share 1 - decay of the way to the weights as they are."""
        for value, param in zip(self.values, self.params, strict=True):
            value.lerp_(param, 1 - decay) if decay else value.copy_(param)

    def state_dict(self) -> dict[str, Tensor]:
        """The lagged weights, by number."""
        return {str(i): value for i, value in enumerate(self.values)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        for i, value in enumerate(self.values):
            value.copy_(state[str(i)])
