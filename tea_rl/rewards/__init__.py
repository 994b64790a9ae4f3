"""Rewards: built-in functions, your own from a file, and their weighted sum, here or in worker processes."""

from tea_rl.rewards.builtin import BUILTIN_REWARDS, list_rewards
from tea_rl.rewards.loader import RewardBatch, RewardSum, load_rewards
from tea_rl.rewards.workers import PendingRewards, RewardWorkers

__all__ = [
    "BUILTIN_REWARDS",
    "PendingRewards",
    "RewardBatch",
    "RewardSum",
    "RewardWorkers",
    "list_rewards",
    "load_rewards",
]
