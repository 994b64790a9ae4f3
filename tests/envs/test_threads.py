"""Rollouts step environments in threads: what one does must not reach another, nor the libraries behind them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tea_rl.envs import list_envs, make_env
from tea_rl.envs.checking import play

KWARGS = {"tea_rl/TextWorld-v0": {"num_games": 4}}


@pytest.mark.parametrize("entry", list_envs(), ids=lambda entry: entry.id)
def test_episodes_in_threads_are_those_of_one_after_another(entry):
    if not entry.available:
        pytest.skip(f"{entry.package} is not installed")

    def episode(index):
        env = make_env(entry.id, KWARGS.get(entry.id))
        try:
            return play(env, lambda info: info.get("expert") or "anything", index, seed=index)[1]
        finally:
            env.close()

    indices = [0, 1, 2, 3] * 3
    alone = [episode(index) for index in indices]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(episode, indices))
    assert together == alone
