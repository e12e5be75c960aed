"""The pocket world's verifier as a reward: how much of its caption a picture holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dojo.pocket import scenes, verifier
from dojo.rewards.scorer import Metadata, Scorer


class Pocket(Scorer):
    """Partial credit for every part of a caption of the pocket grammar; no score for others."""

    range = "0 to 1"
    strict = False

    def cannot_score(self, prompt: str, row: Mapping[str, Any]) -> str:
        try:
            scenes.parse(prompt)
        except ValueError:
            return "it is no caption of the pocket grammar"
        return ""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        read = [i for i, prompt in enumerate(prompts) if not self.cannot_score(prompt, {})]
        scores = torch.full((len(prompts),), torch.nan, device=images.device)
        if not read:
            return scores
        known = verifier.score(images[read], [prompts[i] for i in read], strict=self.strict)
        scores[read] = known.to(scores)
        return scores


class PocketStrict(Pocket):
    """1 where everything of the caption holds, else 0."""

    range = "0 or 1"
    strict = True
