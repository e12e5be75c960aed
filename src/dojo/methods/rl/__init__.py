"""Reinforcement learning of a flow: what DDPO, GRPO and NFT share around their loops."""

from dojo.methods.rl.args import (
    EvalArgs,
    PolicyArgs,
    PolicyLoraArgs,
    SampleArgs,
    WaySampleArgs,
)
from dojo.methods.rl.cost import episode_cost, finished_cost, needs
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
from dojo.methods.rl.finished import Finished, LevelArgs, ask
from dojo.methods.rl.reference import reference

__all__ = [
    "Batch",
    "Chunk",
    "EvalArgs",
    "Finished",
    "LevelArgs",
    "PolicyArgs",
    "PolicyLoraArgs",
    "SampleArgs",
    "Scores",
    "Scoring",
    "WaySampleArgs",
    "ask",
    "batches",
    "episode_cost",
    "finished_cost",
    "needs",
    "plan",
    "record",
    "reference",
    "shuffled",
    "split",
]
