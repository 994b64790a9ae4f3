"""Rollouts: generate with a TEA head and keep everything that learning needs."""

from tea_rl.rollout.decode import DecodeSettings, generate
from tea_rl.rollout.trajectory import Rollout, TokenBatch

__all__ = ["DecodeSettings", "Rollout", "TokenBatch", "generate"]
