"""Prompts that a reward cannot score, whatever the picture: found before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dojo.cli import UserError
from dojo.rewards.reward import Reward


class Asked(Protocol):
    """A prompt, as `dojo.inputs.prompts.Prompt` is one."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


def check_prompts(
    say: Callable[[str], None], reward: Reward, prompts: Sequence[Asked], most: float = 1.0
) -> None:
    """Says how many prompts have no score, and refuses them where they are too many.

    Args:
        say: prints a line.
        most: the share that may be without a score; when none has one, that is too many too.

    Raises:
        UserError: naming the reward and the first of the prompts.
    """
    for one in reward.components:
        reasons = [one.scorer.cannot_score(each.text, each.metadata) for each in prompts]
        without = [i for i, reason in enumerate(reasons) if reason]
        if not without:
            continue
        first = without[0]
        share = f"{len(without):,} of {len(prompts):,} prompts"
        words = (
            f"{one.name} cannot score {share}, such as {prompts[first].text!r} ({reasons[first]})"
        )
        if len(without) == len(prompts) or len(without) > most * len(prompts):
            raise UserError(f"--reward: {words}")
        say(f"{words}: their pictures will have no score")
