"""What the tests of the environments share."""

import importlib.util

import pytest

from tea_rl.envs import list_envs

#: Every registered environment; one whose library is missing is skipped, by the name of the library.
EVERY_ENV = [
    pytest.param(
        entry.id,
        id=entry.id.removeprefix("tea_rl/"),
        marks=pytest.mark.skipif(not entry.available, reason=f"needs the package {entry.package}"),
    )
    for entry in list_envs()
]


def needs(package: str):
    """Skip a test without an optional library."""
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs the package {package}"
    )


def episode(env, policy, **reset):
    """Play one episode with ``policy(info)``: observations, rewards, last terminated, truncated and info."""
    observation, info = env.reset(**reset)
    observations, rewards, terminated, truncated = [observation], [], False, False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, info = env.step(policy(info))
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards, terminated, truncated, info


def expert(info):
    return info["expert"]
