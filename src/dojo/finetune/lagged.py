"""The policy as it was a while ago: a second set of the trained weights that follows slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dojo.cli import UserError


class Lagged:
    """Trained weights that follow the others with a delay.

    Both sets lie on the device; to change them takes no copy. A part of every checkpoint (see
    `Learner`), so that a run goes on exactly.

    Args:
        params: the trained weights, float32: in bfloat16 a slow step would be rounded away.
    Raises:
        UserError: they are not.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        if any(param.dtype != torch.float32 for param in params):
            raise UserError(
                "--train_dtype bf16: the policy that lags behind moves in steps that bfloat16 "
                "rounds away; leave it at fp32"
            )
        self.params = list(params)
        self.values = [param.detach().clone() for param in self.params]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The lagged weights in the model for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, param in enumerate(self.params):
            param.data, self.values[i] = self.values[i], param.data

    @torch.no_grad()
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
