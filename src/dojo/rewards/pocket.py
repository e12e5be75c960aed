"""The pocket world's verifier as a reward: how much of its caption a picture holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dojo.cli import UserError
from dojo.pocket import verifier
from dojo.rewards.scorer import Metadata, Scorer


class Pocket(Scorer):
    """Partial credit for every part of a caption of the pocket grammar."""

    range = "0 to 1"
    strict = False

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        try:
            return verifier.score(images, prompts, strict=self.strict)
        except ValueError as error:
            raise UserError(f"--reward: the pocket rewards read pocket captions: {error}") from None


class PocketStrict(Pocket):
    """1 where everything of the caption holds, else 0."""

    range = "0 or 1"
    strict = True
