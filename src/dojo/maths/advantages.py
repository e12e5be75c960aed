"""From scores to advantages: how much better a sample is than what it is compared with.

Scores and ids are those of an epoch's samples over all processes, gathered: N of them, R rewards.
Statistics are float64 and do not hang on the order of the samples, so two processes reach the
bits of one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Spread = Literal["group", "global"]
"""what a score's distance from its group's mean is divided by: the std of the group, or of all"""

# What is added to a standard deviation before dividing, so that noise is not blown up: a part of
# the std within groups, so that rewards may have any scale (the papers' codes add 1e-4 and 1e-6
# themselves), and what float32 can tell apart at the size of the scores.
GROUP_FLOOR = 1e-4
BUFFER_FLOOR = 1e-6
RESOLUTION = 2.0**-23  # of a float32 number, relative to it
_COARSE = 20  # scores whose std is below so many of these steps are coarse


@dataclass(frozen=True, kw_only=True, eq=False)
class Advantages:
    """How much better than expected every sample was."""

    values: Tensor
    """float32 [N]; 0 where the weight is 0"""
    weights: Tensor
    """float32 [N]: 0 for what teaches nothing (an invalid score, a group whose scores are all
    alike), else 1. Such samples stay in their batches, whose sizes must not change."""
    groups: int
    """groups, one per prompt"""
    flat_groups: int
    """those of them whose valid scores are all alike"""
    invalid: int
    """samples whose score is not valid"""

    def at(self, places: Sequence[int], limit: float) -> Tensor:
        """Those of the samples at some places, clamped to +-limit: float32 [B]."""
        return self.values[[*places]].clamp(-limit, limit)

    def row(self) -> dict[str, float]:
        """What a run logs of them: the share of groups that teach nothing."""
        return {"flat_groups_share": self.flat_groups / self.groups}


def group_advantages(
    scores: Tensor, prompt_ids: Tensor, valid: Tensor, spread: Spread = "group"
) -> Advantages:
    """GRPO's advantages: a score against the others of its prompt (Shao et al. 2024,
    arXiv:2402.03300).

    `global` divides by the std of all scores, as Flow-GRPO does for SD3: prompts whose pictures
    hardly differ then count little. `group` counts every prompt alike.

    Args:
        scores: [N]; several rewards come as their weighted sum, or see `decoupled_advantages`.
        prompt_ids: integers [N], equal for the samples of one group.
        valid: bool [N]; what is not valid leaves the statistics, whatever its score.
    Raises:
        ValueError: a group of one, or a valid score that is not finite.
    """
    return _advantages(scores[:, None], torch.ones(1), prompt_ids, valid, spread, whiten=False)


def decoupled_advantages(
    scores: Tensor,
    weights: Tensor,
    prompt_ids: Tensor,
    valid: Tensor,
    spread: Spread = "group",
) -> Advantages:
    """GDPO's advantages of several rewards (Liu et al. 2026, arXiv:2601.05242).

    Every reward is normalised within its groups before they are summed, so that weights and not
    scales decide, and the sum is divided by its own std over all samples.

    Args:
        scores: [N, R].
        weights: [R], what each reward counts.
    """
    return _advantages(scores, weights, prompt_ids, valid, spread, whiten=True)


def _advantages(
    scores: Tensor,
    reward_weights: Tensor,
    prompt_ids: Tensor,
    valid: Tensor,
    spread: Spread,
    *,
    whiten: bool,
) -> Advantages:
    device = scores.device
    scores, prompt_ids, valid = _checked(scores, prompt_ids, valid)
    everything = _stds(scores[valid])  # [R]
    floor = _floor(scores, prompt_ids, valid, GROUP_FLOOR)  # [R]
    values = torch.zeros_like(scores)
    alive = torch.zeros_like(valid)
    groups = flat = 0
    for prompt, members in _groups(prompt_ids):
        if members.sum() < 2:
            raise ValueError(
                f"prompt {prompt} has one sample: a group needs two, or nothing is better than "
                "anything (--group_size)"
            )
        own = members & valid
        groups += 1
        if not _differs(scores[own]):
            flat += 1
            continue
        std = _stds(scores[own]) if spread == "group" else everything
        centred = scores[own] - _means(scores[own])
        values[own] = _divided(centred, std + floor)
        alive[own] = True
    reward_weights = reward_weights.cpu().double()
    total = (values * reward_weights).sum(1)  # [N, R] -> [N]
    if whiten and alive.any():
        # Its mean is zero already: every group's is. What is summed has a std of about 1.
        std = _stds(total[alive][:, None])
        total = _divided(total, std + GROUP_FLOOR * reward_weights.abs().sum())
    return Advantages(
        values=total.float().to(device),
        weights=alive.float().to(device),
        groups=groups,
        flat_groups=flat,
        invalid=int((~valid).sum()),
    )


def coarse(scores: Tensor, prompt_ids: Tensor, valid: Tensor) -> list[int]:
    """Which rewards' scores [N, R] are so large that float32 can hardly tell the pictures apart.

    Scores that are all alike say nothing of that, unless they are so large that steps of a tenth
    are lost.
    """
    scores, prompt_ids, valid = _checked(scores, prompt_ids, valid)
    grouped = any((members & valid).sum() > 1 for _, members in _groups(prompt_ids))
    std = _within(scores, prompt_ids, valid) if grouped else _stds(scores[valid])
    noise = _noise(scores[valid])
    few = (std < _COARSE * noise) & ((std > 0) | (noise > 0.1))
    return [int(number) for number in few.nonzero()]


class PromptBuffer:
    """DDPO's statistics: the latest scores of every prompt, over the epochs (Black et al. 2023,
    arXiv:2305.13301).

    Until a prompt has `min_count` scores it is judged by the mean and std of all samples at hand.
    """

    def __init__(self, size: int = 32, min_count: int = 16) -> None:
        """Keeps the last `size` scores of a prompt.

        Raises:
            ValueError: a minimum that the buffer cannot hold, or below two.
        """
        if not 2 <= min_count <= size:
            raise ValueError(f"a buffer of {size} scores cannot wait for {min_count}: 2 .. {size}")
        self.size = size
        self.min_count = min_count
        self._scores: dict[int, deque[float]] = {}

    def advantages(self, scores: Tensor, prompt_ids: Tensor, valid: Tensor) -> Advantages:
        """Takes in an epoch's scores [N] and judges them by what the buffer then holds.

        The order within a prompt decides which scores are forgotten first: gather samples in the
        order of their places, so that it does not hang on the processes.

        Raises:
            ValueError: a valid score that is not finite.
        """
        device = scores.device
        scores, prompt_ids, valid = _checked(scores[:, None], prompt_ids, valid)
        values = torch.zeros(len(scores), dtype=torch.float64)
        alive = torch.zeros_like(valid)
        floor = _floor(scores, prompt_ids, valid, BUFFER_FLOOR)  # [1]
        groups = flat = 0
        for prompt, members in _groups(prompt_ids):
            own = members & valid
            kept = self._scores.setdefault(prompt, deque(maxlen=self.size))
            kept.extend(_numbers(scores[own, 0]))
            enough = len(kept) >= self.min_count
            peers = torch.tensor([*kept], dtype=torch.float64)[:, None] if enough else scores[valid]
            groups += 1
            if not _differs(peers):
                flat += 1
                continue
            centred = scores[own] - _means(peers)
            values[own] = _divided(centred, _stds(peers) + floor)[:, 0]
            alive[own] = True
        return Advantages(
            values=values.float().to(device),
            weights=alive.float().to(device),
            groups=groups,
            flat_groups=flat,
            invalid=int((~valid).sum()),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on: prompt_ids and counts int64 [P], scores float64 [sum]."""
        held = sorted(self._scores.items())
        return {
            "size": torch.tensor(self.size),
            "prompt_ids": torch.tensor([prompt for prompt, _ in held], dtype=torch.int64),
            "counts": torch.tensor([len(kept) for _, kept in held], dtype=torch.int64),
            "scores": torch.tensor([s for _, kept in held for s in kept], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: a buffer of another size.
        """
        if int(state["size"]) != self.size:
            raise ValueError(f"the saved buffer holds {int(state['size'])}, this one {self.size}")
        scores = iter(_numbers(state["scores"]))
        self._scores = {
            int(prompt): deque(islice(scores, int(count)), maxlen=self.size)
            for prompt, count in zip(state["prompt_ids"], state["counts"], strict=True)
        }


def check_sizes(
    num_prompts: int, group_size: int, batch_size: int, num_processes: int, min_group: int = 2
) -> int:
    """How many rollout batches every process makes in an epoch.

    Raises:
        ValueError: groups below `min_group`, or an epoch that does not fill all batches; the
            message names the nearest numbers of prompts that do.
    """
    if group_size < min_group:
        raise ValueError(f"--group_size must be at least {min_group}: a sample is judged by others")
    at_once = batch_size * num_processes
    samples = num_prompts * group_size
    if samples and samples % at_once == 0:
        return samples // at_once
    unit = at_once // math.gcd(at_once, group_size)
    below = num_prompts // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    raise ValueError(
        f"--num_prompts_per_epoch {num_prompts} x --group_size {group_size} = {samples} samples do "
        f"not fill batches of --sample_batch_size {batch_size} on {num_processes} process(es): "
        f"take {nearest} prompts"
    )


def _checked(scores: Tensor, prompt_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, R] in float64, ids and mask, on the CPU; invalid scores are zeroed."""
    scores, prompt_ids, valid = scores.detach().cpu().double(), prompt_ids.cpu(), valid.cpu()
    if not scores[valid].isfinite().all():
        raise ValueError("a score that is marked valid is not finite")
    return scores.masked_fill(~valid[:, None], 0.0), prompt_ids, valid


def _groups(prompt_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every prompt with the mask of its samples, bool [N], in the order of the ids."""
    for prompt in sorted({int(one) for one in prompt_ids}):
        yield prompt, prompt_ids == prompt


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values]


def _means(scores: Tensor) -> Tensor:
    """[n, R] -> [R]. Sorted first, so that the sum does not hang on the samples' order."""
    return scores.sort(0).values.mean(0)


def _stds(scores: Tensor) -> Tensor:
    """The population's std, [n, R] -> [R]; zero for no samples."""
    if not len(scores):
        return scores.new_zeros(scores.shape[1])
    return scores.sort(0).values.std(0, correction=0)


def _floor(scores: Tensor, prompt_ids: Tensor, valid: Tensor, share: float) -> Tensor:
    """What is added to the std of a group: [N, R] -> [R]."""
    return share * _within(scores, prompt_ids, valid) + _noise(scores[valid])


def _within(scores: Tensor, prompt_ids: Tensor, valid: Tensor) -> Tensor:
    """The std of the valid scores about their groups' means, [N, R] -> [R]."""
    parts = [scores[members & valid] for _, members in _groups(prompt_ids)]
    far = torch.cat([part - _means(part) for part in parts if len(part)] or [scores[:0]])
    return _means(far.square()).sqrt() if len(far) else far.new_zeros(far.shape[1])


def _noise(scores: Tensor) -> Tensor:
    """The step between neighbouring float32 numbers of the scores' size: [n, R] -> [R]."""
    if not len(scores):
        return scores.new_zeros(scores.shape[1])
    return scores.abs().amax(0) * RESOLUTION


def _divided(scores: Tensor, std: Tensor) -> Tensor:
    """Scores over a std; zeros stay zeros where that is zero."""
    return scores / std.where(std > 0, 1.0)


def _differs(scores: Tensor) -> bool:
    """Whether the samples [n, R] are not all alike."""
    return bool((scores != scores[:1]).any())
