"""Reinforcement learning of a flow: what DDPO and GRPO share around their loops."""

from dojo.finetune.weights import bytes_per_weight, check, result_name
from dojo.methods.rl.args import EvalArgs, FinetuneArgs, PolicyArgs, PolicyLoraArgs, SampleArgs
from dojo.methods.rl.cost import episode_cost, needs
from dojo.methods.rl.episodes import (
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
from dojo.methods.rl.evaluation import evaluator
from dojo.methods.rl.trained import Trained

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
