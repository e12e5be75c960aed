"""The pocket world's verifier as a reward: how much of its caption a picture holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import torch
from dojo.pocket import atoms, scenes, verifier
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from torch import Tensor


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
        scores[read] = self.judge(images[read], [prompts[i] for i in read]).to(scores)
        return scores

    def judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores [B] of captions that are all of the grammar."""
        return verifier.score(images, prompts, strict=self.strict)


class PocketStrict(Pocket):
    """1 where everything of the caption holds, else 0."""

    range = "0 or 1"
    strict = True


class PocketAtoms(Pocket):
    """The mean of what a caption says, each in [0, 1]; the geometric one is near 1 only where all
    of it holds. Made for `--prompt_set pocket_compositional`."""

    def __init__(self, place: Place, *, mean: str = "arithmetic") -> None:
        super().__init__(place)
        if mean not in ("arithmetic", "geometric"):
            raise UserError(f"--reward: pocket_atoms has no mean {mean} (arithmetic, geometric)")
        self.mean: atoms.Mean = mean

    def judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return atoms.score(images, prompts, self.mean)
