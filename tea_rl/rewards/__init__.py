"""Rewards: built-in functions, your own from a file, and their weighted sum."""

from tea_rl.rewards.builtin import BUILTIN_REWARDS, list_rewards
from tea_rl.rewards.loader import RewardBatch, RewardSum, load_rewards

__all__ = ["BUILTIN_REWARDS", "RewardBatch", "RewardSum", "list_rewards", "load_rewards"]
