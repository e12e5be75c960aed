"""Reinforcement learning of a flow: what DDPO and GRPO share around their loops."""

from dojo.methods.rl.args import EvalArgs, PolicyArgs, PolicyLoraArgs, SampleArgs
from dojo.methods.rl.cost import episode_cost, needs
from dojo.methods.rl.episodes import (
    Batch,
    Chunk,
    Scores,
    Scoring,
    batches,
    plan,
    record,
    shuffled,
    split,
)
from dojo.methods.rl.reference import reference

__all__ = [
    "Batch",
    "Chunk",
    "EvalArgs",
    "PolicyArgs",
    "PolicyLoraArgs",
    "SampleArgs",
    "Scores",
    "Scoring",
    "batches",
    "episode_cost",
    "needs",
    "plan",
    "record",
    "reference",
    "shuffled",
    "split",
]
