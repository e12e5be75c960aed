"""Reinforcement learning: what DDPO, GRPO and NFT share around their loops."""

from dojo.methods.rl.args import (
    EvalArgs,
    PolicyArgs,
    PolicyLoraArgs,
    SampleArgs,
    WayArgs,
    WaySampleArgs,
)
from dojo.methods.rl.cost import episode_cost, finished_cost, needs, passes_of
from dojo.methods.rl.ddpo import (
    BUFFER,
    DdpoArgs,
    DdpoSampleArgs,
    DiffusionDdpoSampleArgs,
)
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
from dojo.methods.rl.finished import Finished, LevelArgs, ask, noised
from dojo.methods.rl.nft import NftArgs, NftEvalArgs, evaluators
from dojo.methods.rl.reference import reference
from dojo.methods.rl.steps import DiffusionRolloutArgs, RolloutArgs, StepArgs

__all__ = [
    "BUFFER",
    "Batch",
    "Chunk",
    "DdpoArgs",
    "DdpoSampleArgs",
    "DiffusionDdpoSampleArgs",
    "DiffusionRolloutArgs",
    "EvalArgs",
    "Finished",
    "LevelArgs",
    "NftArgs",
    "NftEvalArgs",
    "PolicyArgs",
    "PolicyLoraArgs",
    "RolloutArgs",
    "SampleArgs",
    "Scores",
    "Scoring",
    "StepArgs",
    "WayArgs",
    "WaySampleArgs",
    "ask",
    "batches",
    "episode_cost",
    "evaluators",
    "finished_cost",
    "needs",
    "noised",
    "passes_of",
    "plan",
    "record",
    "reference",
    "shuffled",
    "split",
]
