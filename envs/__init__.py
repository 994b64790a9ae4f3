"""Text environments: ``gymnasium.Env`` whose observation and action are text. Importing this package registers them.

>>> import gymnasium, tea_rl.envs
>>> env = gymnasium.make("tea_rl/GuessNumber-v0", low=1, high=8)
>>> _, info = env.reset(options={"index": 3})
>>> observation, reward, terminated, truncated, info = env.step(info["answer"])
>>> observation, reward, terminated
('Correct.', 1.0, True)
"""

from __future__ import annotations

from tea_rl.envs.base import TextEnv, Turn
from tea_rl.envs.making import list_envs, make_env, register_all
from tea_rl.envs.spaces import AnyText

__all__ = ["AnyText", "TextEnv", "Turn", "list_envs", "make_env"]

register_all()
