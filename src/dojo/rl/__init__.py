"""Reinforcement learning of a flow: what DDPO and GRPO share around their loops."""

from dojo.rl.args import EvalArgs, FinetuneArgs, PolicyArgs, PolicyLoraArgs, SampleArgs
from dojo.rl.cost import episode_cost, needs
from dojo.rl.episodes import (
    Batch,
    Chunk,
    Scores,
    Scoring,
    Steering,
    batches,
    record,
    shuffled,
    split,
)
from dojo.rl.evaluation import evaluator
from dojo.rl.trained import Trained
from dojo.trained import bytes_per_weight, check, result_name

__all__ = [
    "Batch",
    "Chunk",
    "EvalArgs",
    "FinetuneArgs",
    "PolicyArgs",
    "PolicyLoraArgs",
    "SampleArgs",
    "Scores",
    "Scoring",
    "Steering",
    "Trained",
    "batches",
    "bytes_per_weight",
    "check",
    "episode_cost",
    "evaluator",
    "needs",
    "record",
    "result_name",
    "shuffled",
    "split",
]
