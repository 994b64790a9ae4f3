"""The rules that every registered environment keeps."""

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from helpers_envs import EVERY_ENV, episode

from tea_rl.envs import TextEnv, make_env
from tea_rl.envs.checking import check_text_env, junk_problem, paid_junk
from tea_rl.envs.junk import junk
from tea_rl.errors import TeaError

pytestmark = pytest.mark.parametrize("id", EVERY_ENV)


def test_passes_gymnasiums_checker_and_ours(id):
    report = check_text_env(id, episodes=6)
    assert report.problems == []
    assert report.expert_score is not None
    assert report.prompt and report.max_turns


def test_the_expert_beats_constant_answers(id):
    if "Blackjack" in id:
        pytest.skip("always stick is nearly as good as basic strategy: too close for a few episodes")
    report = check_text_env(id, episodes=16)
    assert report.expert_score.mean > report.constant_score.mean
    if report.random_score is not None:
        assert report.expert_score.mean > report.random_score.mean


def test_a_thousand_junk_actions_raise_nothing_and_are_never_paid(id):
    env = make_env(id)
    assert [junk_problem(found) for found in paid_junk(env, 1000)] == []


def test_what_is_not_understood_is_marked_and_counted(id):
    env = make_env(id)
    _, info = env.reset(seed=0, options={"index": 0})
    assert (info["turn"], info["invalid"], info["parsed"]) == (0, False, None)
    _, reward, _, _, info = env.step("\x00 \x01")
    assert (info["turn"], info["invalid"], info["parsed"]) == (1, True, None)
    assert reward <= 0


def test_nothing_but_junk_ends_without_pay(id):
    env = make_env(id)
    answers = iter(junk(300, [], env.unwrapped.np_random))
    observations, rewards, *_ = episode(env, lambda info: next(answers), seed=1, options={"index": 1})
    assert len(rewards) <= env.get_wrapper_attr("max_turns")
    assert sum(rewards) <= 0
    assert all(isinstance(text, str) and text for text in observations)


def test_a_group_shares_its_start_whatever_the_seed(id):
    env = make_env(id)
    starts = {(env.reset(seed=seed, options={"index": 5})[0]) for seed in (0, 1, None)}
    assert len(starts) == 1
    again = make_env(id).reset(options={"index": 5})[0]
    assert starts == {again}


def test_seed_and_index_decide_a_whole_episode(id):
    def policy(info):
        return info["expert"] if info["turn"] % 2 == 0 else (info.get("admissible") or [info["expert"]])[-1]

    first = episode(make_env(id), policy, seed=3, options={"index": 2})
    assert episode(make_env(id), policy, seed=3, options={"index": 2}) == first


def test_the_episode_ends_within_the_limit_and_then_wants_a_reset(id):
    env = make_env(id).unwrapped
    _, rewards, terminated, truncated, info = episode(env, lambda info: info["expert"], seed=0)
    assert terminated != truncated
    assert 1 <= len(rewards) <= env.max_turns and info["turn"] == len(rewards)
    assert "expert" not in info and "admissible" not in info
    with pytest.raises(ResetNeeded):
        env.step("again")


def test_is_a_plain_gymnasium_environment(id):
    env = gymnasium.make(id, render_mode="ansi")
    assert isinstance(env.unwrapped, TextEnv)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space and env.render() == observation
    assert info.get("expert", "") in env.action_space


@pytest.mark.parametrize("options", [{"idx": 1}, {"index": -1}, {"index": 1.5}, {"index": True}])
def test_bad_reset_options_are_refused(id, options):
    with pytest.raises(TeaError, match="index"):
        make_env(id).reset(options=options)


def test_an_action_that_is_no_text_is_refused(id):
    env = make_env(id)
    env.reset(seed=0)
    with pytest.raises(TeaError, match="text"):
        env.step(3)
