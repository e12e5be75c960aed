"""Scores of pictures: the rewards of reinforcement learning, and a way to measure results."""

from dojo.rewards.checking import check_prompts
from dojo.rewards.loading import RewardArgs, ScorerArgs, load, networks, places, table
from dojo.rewards.reward import Reward, RewardOutput

__all__ = [
    "Reward",
    "RewardArgs",
    "RewardOutput",
    "ScorerArgs",
    "check_prompts",
    "load",
    "networks",
    "places",
    "table",
]
