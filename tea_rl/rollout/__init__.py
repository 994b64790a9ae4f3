"""Rollouts: generate with a TEA head, or play text environments with it, and keep everything that learning needs."""

from tea_rl.rollout.choices import ChoiceBatch, choice_logps
from tea_rl.rollout.conversation import ConversationFormat
from tea_rl.rollout.decode import DecodeSettings, generate
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, EpisodeSettings, EpisodeStart, Turn
from tea_rl.rollout.episodes import run_episodes
from tea_rl.rollout.trajectory import Rollout, TokenBatch

__all__ = [
    "ChoiceBatch",
    "ConversationFormat",
    "DecodeSettings",
    "Episode",
    "EpisodeBatch",
    "EpisodeSettings",
    "EpisodeStart",
    "Rollout",
    "TokenBatch",
    "Turn",
    "choice_logps",
    "generate",
    "run_episodes",
]
