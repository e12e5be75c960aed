"""A reward that another process computes: the client of `python -m dojo.rewards serve`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.lazy import torch
from dojo.rewards import wire
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from torch import Tensor

TOKEN = "DOJO_REWARD_TOKEN"  # environment variable with the server's bearer token


class Remote(Scorer):
    """One component of a served reward, `http://host:port#name`, or its sum without `#name`.

    Options: `timeout` in seconds for one answer, `retries` after a failure. A server that stays
    silent stops the run (`TrainingStopped`).
    """

    def __init__(self, place: Place, *, address: str, timeout: str, retries: str) -> None:
        super().__init__(place)
        self.url, _, self.name = address.partition("#")
        self.limits = wire.limits(timeout, retries, hide(address))
        served = self._list("/info", "rewards")
        if self.name and self.name not in served:
            raise UserError(
                f"--reward: {hide(self.url)} does not serve {self.name} "
                f"(it serves {', '.join(map(str, served))})"
            )

    def _list(self, path: str, name: str, body: dict[str, Any] | None = None) -> list[Any]:
        """The list of this name in the server's answer."""
        token = os.environ.get(TOKEN)
        answer = wire.request(wire.joined(self.url, path), body, token=token, **self.limits)
        found = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise self._strange(f"a list of {name}")
        return found

    def _strange(self, wanted: str) -> UserError:
        return UserError(
            f"--reward: {hide(self.url)} answers something else than {wanted}: is it a server of "
            "`python -m dojo.rewards serve`?"
        )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        body: dict[str, Any] = {"images": wire.encode(images), "prompts": list(prompts)}
        if self.name:
            body["reward"] = self.name
        if metadata is not None:
            body["metadata"] = [dict(row) for row in metadata]
        scores = self._list("/v1/score", "scores", body)
        try:
            found = [torch.nan if score is None else float(score) for score in scores]
        except (TypeError, ValueError):
            found = []
        if len(found) != len(images):
            raise self._strange(f"scores of {len(images)} pictures")
        return found
