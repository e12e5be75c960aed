"""A reward that another process computes: the client of `python -m dojo.rewards serve`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dojo.cli import UserError
from dojo.masking import hide
from dojo.rewards import wire
from dojo.rewards.scorer import Metadata, Place, Scorer

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
        served = self._ask("/info")["rewards"]
        if self.name and self.name not in served:
            raise UserError(
                f"--reward: {hide(self.url)} does not serve {self.name} "
                f"(it serves {', '.join(served)})"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        token = os.environ.get(TOKEN)
        return wire.request(wire.joined(self.url, path), body, token=token, **self.limits)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        body: dict[str, Any] = {"images": wire.encode(images), "prompts": list(prompts)}
        if self.name:
            body["reward"] = self.name
        if metadata is not None:
            body["metadata"] = [dict(row) for row in metadata]
        answer = self._ask("/v1/score", body)
        return [torch.nan if score is None else float(score) for score in answer["scores"]]
