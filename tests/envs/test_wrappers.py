"""Wrappers, each around an environment it is meant for."""

import gymnasium
import pytest
from helpers_envs import episode, expert

from tea_rl.envs import make_env
from tea_rl.envs.wrappers import (
    AdmissibleActions,
    CompleteInfo,
    ParseAction,
    RewardTerms,
    StepPenalty,
    WorkedExamples,
    reward_range,
    wrap,
)
from tea_rl.errors import TeaError

GUESS = "tea_rl/GuessNumber-v0"


def test_reward_terms_are_weighted_summed_and_logged():
    env = RewardTerms(make_env(GUESS), {"env": 2, "progress": 0.5, "invalid": -0.25, "step": -0.125})
    _, info = env.reset(options={"index": 0})
    assert info["reward_terms"] == {"env": 0, "invalid": 0, "step": 0, "progress": 0}
    _, reward, _, _, info = env.step("junk")
    assert reward == -0.375
    assert info["reward_terms"] == {"env": 0, "invalid": 1, "step": 1, "progress": 0}
    _, reward, terminated, _, info = env.step(info["answer"])
    assert terminated and reward == 2 - 0.125 + 0.5 * info["reward_terms"]["progress"]
    assert info["reward_terms"]["env"] == 1 and info["reward_terms"]["progress"] == pytest.approx(1)


def test_reward_terms_take_functions():
    def shortness(action, observation, reward, terminated, truncated, info):
        return 1 / len(action)

    env = RewardTerms(make_env(GUESS), {"shortness": 1.0}, {"shortness": shortness})
    env.reset(options={"index": 0})
    _, reward, *_, info = env.step("99")
    assert reward == 0.5 == info["reward_terms"]["shortness"]


def test_a_term_without_weight_is_logged_only():
    env = RewardTerms(make_env(GUESS), {"env": 1})
    _, info = env.reset(options={"index": 0})
    _, reward, *_, info = env.step("16")
    assert reward == 0 and info["reward_terms"]["progress"] > 0


@pytest.mark.parametrize(
    ("weights", "words"), [({"progres": 1}, 'Did you mean "progress"'), ({"env": "x"}, "number")]
)
def test_bad_weights_are_refused(weights, words):
    with pytest.raises(TeaError, match=words):
        RewardTerms(make_env(GUESS), weights)


def test_step_penalty_makes_the_shorter_way_worth_more():
    env = StepPenalty(make_env("tea_rl/FrozenLake-v0"), 0.125)
    assert episode(env, expert, seed=0)[1] == [-0.125] * 5 + [0.875]
    assert reward_range(env) == (-0.125, 0.875)
    with pytest.raises(TeaError, match="penalty"):
        StepPenalty(make_env(GUESS), -1)


@pytest.mark.parametrize(
    ("pattern", "action", "parsed"),
    [
        ("first_line", "\n 16 \nbecause", "16"),
        ("last_line", "because\n16\n", "16"),
        (r"answer: (\d+)", "the answer: 16.", "16"),
        (r"\d+", "say 16 or 17", "16"),
        (r"answer: (\d+)", "16", None),
        ("first_line", "", None),
        ("first_line", "say 16", None),
    ],
)
def test_parse_action_takes_the_action_out_of_longer_text(pattern, action, parsed):
    env = ParseAction(make_env(GUESS), pattern)
    env.reset(seed=0)
    *_, info = env.step(action)
    assert info["parsed"] == parsed and info["invalid"] == (parsed is None)


def test_parse_action_refuses_a_broken_pattern():
    with pytest.raises(TeaError, match="regular expression"):
        ParseAction(make_env(GUESS), "(")


def test_admissible_actions_take_nothing_but_the_choices():
    env = AdmissibleActions(make_env("tea_rl/FrozenLake-v0"))
    _, info = env.reset(seed=0)
    assert info["admissible"] == ["left", "down", "right", "up"]
    *_, info = env.step("LEFT")
    assert info["invalid"]
    *_, info = env.step("down")
    assert info["parsed"] == "down" and info["admissible"]


def test_admissible_actions_can_be_given():
    env = AdmissibleActions(make_env(GUESS), ["8", "16"])
    _, info = env.reset(seed=0)
    assert info["admissible"] == ["8", "16"]
    assert env.step("9")[4]["invalid"] and not env.step("8")[4]["invalid"]


def test_admissible_actions_refuse_an_environment_that_lists_none():
    env = AdmissibleActions(make_env(GUESS, {"high": 1000}))
    with pytest.raises(TeaError, match="GuessNumber-v0 does not list"):
        env.reset(seed=0)
    with pytest.raises(TeaError, match="choices"):
        AdmissibleActions(make_env(GUESS), "yes")


def test_worked_examples_stand_before_the_prompt_and_change_nothing_else():
    env = WorkedExamples(make_env(GUESS), 2)
    plain, info = make_env(GUESS).reset(options={"index": 3})
    text, same_info = env.reset(options={"index": 3})
    assert text.endswith("\n\n" + plain) and same_info == info
    assert text.count("Correct.") == 2 and text.count("Guess: 16\n") == 2
    assert env.step("16") == make_stepped(3, "16")


def make_stepped(index, action):
    env = make_env(GUESS)
    env.reset(options={"index": index})
    return env.step(action)


def test_worked_examples_do_not_fix_the_unseeded_start():
    starts = {WorkedExamples(make_env(GUESS, {"high": 10**6})).reset()[1]["answer"] for _ in range(4)}
    assert len(starts) > 1


def test_worked_examples_need_an_expert():
    with pytest.raises(TeaError, match="no expert"):
        WorkedExamples(CompleteInfo(Echo()))


def test_wrappers_are_made_by_name_innermost_first():
    specs = [
        {"name": "parse_action", "kwargs": {"pattern": "first_line"}},
        {"name": "time_limit", "kwargs": {"max_episode_steps": 2}},
        {"name": "step_penalty", "kwargs": {"penalty": 0.5}},
    ]
    env = make_env(GUESS, wrappers=specs)
    _, info = env.reset(options={"index": 1})
    wrong = next(number for number in ("1", "2") if number != info["answer"])
    env.step(f"{wrong}\nbecause")
    _, reward, terminated, truncated, info = env.step("3\nbecause")
    assert truncated and not terminated and reward == -0.5 and info["parsed"] == "3"


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("step_penlty", {}, 'Did you mean "step_penalty"'),
        ("step_penalty", {"x": 1}, "refuses"),
        ("time_limit", {"max_episode_steps": 0}, "refuses"),
    ],
)
def test_bad_wrappers_are_one_line(name, kwargs, words):
    with pytest.raises(TeaError, match=words):
        wrap(make_env(GUESS), name, **kwargs)


class Echo(gymnasium.Env):
    """An environment from elsewhere: text, but none of our info."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Text(100)
        self.action_space = gymnasium.spaces.Text(100)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"say {self.np_random.integers(10**6)}", {}

    def step(self, action):
        return action, 1, True, False, {}


def test_complete_info_fills_in_what_rollouts_read():
    env = CompleteInfo(Echo())
    _, info = env.reset(seed=0)
    assert info == {"turn": 0, "invalid": False, "parsed": None}
    *_, info = env.step("hello")
    assert info == {"turn": 1, "invalid": False, "parsed": "hello"}
    assert len({env.reset(seed=seed, options={"index": 4})[0] for seed in range(3)}) == 1
    assert env.reset(options={"index": 4})[0] != env.reset(options={"index": 5})[0]
