"""Rewards: built-in functions, your own from a file, their weighted sum, and processes that compute it."""

from tea_rl.rewards.builtin import BUILTIN_REWARDS, list_rewards
from tea_rl.rewards.loader import RewardBatch, Rewards, RewardSum, load_rewards
from tea_rl.rewards.workers import PendingRewards, RewardWorkers

__all__ = [
    "BUILTIN_REWARDS",
    "PendingRewards",
    "RewardBatch",
    "RewardSum",
    "RewardWorkers",
    "Rewards",
    "list_rewards",
    "load_rewards",
]
