"""The options of DDPO: which pictures are drawn, and what each of them is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dojo.cli import ranges
from dojo.maths.advantages import group_advantages
from dojo.methods.rl.args import PolicyArgs, WayArgs, WaySampleArgs

if TYPE_CHECKING:
    from dojo.maths.advantages import Advantages, PromptBuffer
    from dojo.methods.rl.episodes import Scores

BUFFER = "prompt_buffer.safetensors"
"""of a checkpoint: the latest scores of every prompt"""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The pictures of an epoch, of prompts drawn at random."""

    num_prompts_per_epoch: int = 64
    """prompts drawn for an epoch, over all processes; with --baseline buffer one may be drawn
    several times"""
    group_size: int = 1
    """pictures of each of them"""


@dataclass(frozen=True, kw_only=True)
class DdpoSampleArgs(_Drawn, WaySampleArgs):
    """The pictures of an epoch, of prompts drawn at random."""


@dataclass(frozen=True, kw_only=True)
class DiffusionDdpoSampleArgs(_Drawn, WayArgs):
    """The same of a diffusion, which is guided: its pictures without guidance are poor."""

    guidance_scale: float = 5.0
    """classifier-free guidance while sampling and in training (TRL's sample_guidance_scale, and
    train_cfg); 1 is none, which costs half and is what the policy then learns to do without"""


@dataclass(frozen=True, kw_only=True)
class DdpoArgs(PolicyArgs):
    """What a picture is compared with, and the surrogate."""

    baseline: Literal["buffer", "group"] = "buffer"
    """what a picture is compared with: buffer, what its prompt has scored of late; group, the
    --group_size pictures of its prompt in this epoch, as in GRPO"""
    buffer_size: int = 32
    """latest scores of each prompt that are kept, over the epochs (TRL's
    per_prompt_stat_tracking_buffer_size)"""
    buffer_min_count: int = 16
    """scores from which on a prompt is judged by its own; until then by all of the epoch (TRL's
    per_prompt_stat_tracking_min_count)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.buffer_min_count <= self.buffer_size:
            raise ValueError("--buffer_min_count must lie between 2 and --buffer_size")
        ranges.check_choice(self, "baseline", {"buffer": "buffer_size buffer_min_count"})

    @property
    def min_group(self) -> int:
        """The fewest pictures of a prompt in an epoch."""
        return 2 if self.baseline == "group" else 1

    @property
    def repeats_prompts(self) -> bool:
        """Whether an epoch may hold a prompt twice; one group would be two."""
        return self.baseline == "buffer"

    def judge(self, buffer: PromptBuffer, scores: Scores) -> Advantages:
        """The advantages of an epoch's pictures; `buffer` takes their scores in if it is used."""
        judged = buffer.advantages if self.baseline == "buffer" else group_advantages
        return judged(scores.scores, scores.prompt_ids, scores.valid)
