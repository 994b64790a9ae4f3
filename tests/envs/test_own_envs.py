"""What each of our own environments says, pays and expects."""

import numpy as np
import pytest
from helpers_envs import episode, expert

from tea_rl.envs import make_env
from tea_rl.envs.toy_text import optimal_policy
from tea_rl.envs.wordle import marks
from tea_rl.envs.words import word_lengths, words_of
from tea_rl.errors import TeaError


def mean_return(env, policy, episodes=60):
    return np.mean([sum(episode(env, policy, seed=i, options={"index": i})[1]) for i in range(episodes)])


def test_guess_number_is_always_found_by_bisection_in_six_guesses():
    env = make_env("tea_rl/GuessNumber-v0")
    targets = set()
    for index in range(200):
        _, rewards, terminated, _, info = episode(env, expert, options={"index": index})
        assert sum(rewards) == 1.0 and terminated
        targets.add(int(info["answer"]))
    assert targets == set(range(1, 33))


def test_guess_number_hints_point_to_the_number():
    env = make_env("tea_rl/GuessNumber-v0", {"low": 10, "high": 20, "max_guesses": 3})
    _, info = env.reset(seed=0, options={"index": 1})
    target = int(info["answer"])
    low = "10" if target > 10 else "20"
    text, *_ = env.step(low)
    assert text == ("Higher. Guess:" if int(low) < target else "Lower. Guess:")
    text, reward, terminated, _, info = env.step(" 21\n")
    assert info["invalid"] and reward == 0 and not terminated and "10 to 20" in text
    text, reward, terminated, truncated, info = env.step(low)
    assert terminated and not truncated and reward == 0
    assert str(target) in text


def test_guess_number_progress_sums_to_one_when_the_number_is_found():
    env = make_env("tea_rl/GuessNumber-v0")
    _, info = env.reset(options={"index": 7})
    total, done = 0.0, False
    while not done:
        *_, done, _, info = env.step(info["expert"])
        total += info["reward_terms"]["progress"]
    assert total == pytest.approx(1.0)


def test_guess_number_can_repeat_the_range():
    env = make_env("tea_rl/GuessNumber-v0", {"show_range": True})
    _, info = env.reset(options={"index": 1})
    assert int(info["answer"]) > 16
    assert env.step("16")[0] == "Higher. It is from 17 to 32. Guess:"


@pytest.mark.parametrize("action", ["7", " 7", "7.", "7\n"])
def test_small_differences_in_writing_are_accepted(action):
    env = make_env("tea_rl/GuessNumber-v0")
    env.reset(seed=0)
    assert env.step(action)[4]["parsed"] == "7"


@pytest.mark.parametrize(
    ("guess", "secret", "found"),
    [
        ("stone", "stone", "+++++"),
        ("llama", "lemon", "+--?-"),
        ("apple", "pearl", "??-??"),
        ("eerie", "sheep", "??---"),
        ("cheek", "wheel", "-+++-"),
    ],
)
def test_wordle_marks_each_letter_as_often_as_the_word_holds_it(guess, secret, found):
    assert marks(guess, secret) == found


@pytest.mark.parametrize("length", word_lengths())
def test_wordle_expert_nearly_always_finds_the_word(length):
    assert len(words_of(length)) >= 50
    assert mean_return(make_env("tea_rl/Wordle-v0", {"length": length}), expert) > 0.8


def test_wordle_can_be_made_smaller():
    env = make_env("tea_rl/Wordle-v0", {"num_words": 5})
    _, info = env.reset(seed=0)
    assert len(info["admissible"]) == 5 and info["answer"] in info["admissible"]


def test_bandit_pays_at_the_last_pull_only():
    env = make_env("tea_rl/Bandit-v0", {"pulls": 5, "probabilities": [1.0, 0.0]})
    _, info = env.reset(seed=0, options={"index": 0})
    rewards = [env.step(info["answer"])[1] for _ in range(5)]
    assert rewards == [0, 0, 0, 0, 1.0]


def test_bandit_forfeits_after_too_many_invalid_answers():
    env = make_env("tea_rl/Bandit-v0", {"pulls": 2, "probabilities": [1.0, 1.0]})
    env.reset(seed=0)
    env.step("A")
    for _ in range(4):
        _, reward, terminated, _, info = env.step("junk")
    assert terminated and reward == 0 and info["invalid"]


def test_bandit_luck_is_the_seeds_and_the_machines_are_the_starts():
    env = make_env("tea_rl/Bandit-v0", {"pulls": 12, "probabilities": [0.5, 0.5]})
    told = {tuple(episode(env, lambda info: "A", seed=s, options={"index": 0})[0]) for s in range(5)}
    assert len(told) == 5


def test_retrieval_asks_for_a_fact_of_the_prompt():
    env = make_env("tea_rl/Retrieval-v0", {"num_facts": 3})
    text, info = env.reset(seed=0)
    assert info["answer"] in text and info["answer"] in info["admissible"]
    wrong = next(colour for colour in info["admissible"] if colour != info["answer"])
    assert env.step(wrong)[1] == 0
    env.reset(seed=0)
    assert env.step(info["answer"].upper())[1] == 1


def test_frozen_lake_experts_walk_the_shortest_way():
    _, rewards, terminated, *_ = episode(make_env("tea_rl/FrozenLake-v0"), expert, seed=0)
    assert rewards == [0, 0, 0, 0, 0, 1] and terminated


def test_frozen_lake_is_cut_and_not_ended_by_its_limit():
    env = make_env("tea_rl/FrozenLake-v0", {"max_turns": 3})
    *_, terminated, truncated, _ = episode(env, lambda info: "left", seed=0)
    assert truncated and not terminated


def test_frozen_lake_maps_can_be_drawn_at_the_start():
    env = make_env("tea_rl/FrozenLake-v0", {"map_name": "random", "size": 5})
    prompts = {env.reset(options={"index": index})[0] for index in range(6)}
    assert len(prompts) == 6
    assert mean_return(env, expert, 10) == 1.0


def test_slippery_ice_moves_by_the_episodes_own_luck():
    env = make_env("tea_rl/FrozenLake-v0", {"is_slippery": True})
    told = {tuple(episode(env, expert, seed=seed, options={"index": 0})[0]) for seed in range(6)}
    assert len(told) > 1


def test_cliff_walking_expert_keeps_to_the_edge():
    _, rewards, terminated, *_ = episode(make_env("tea_rl/CliffWalking-v0"), expert, seed=0)
    assert rewards == [-1.0] * 13 and terminated


def test_taxi_expert_delivers_every_passenger():
    env = make_env("tea_rl/Taxi-v0")
    assert all(episode(env, expert, options={"index": index})[1][-1] == 20 for index in range(20))


def test_doing_nothing_is_not_better_than_playing_in_taxi_and_blackjack():
    assert mean_return(make_env("tea_rl/Taxi-v0"), lambda info: "", 3) == -30
    assert mean_return(make_env("tea_rl/Blackjack-v0"), lambda info: "", 3) == -1


def test_blackjack_expert_beats_a_random_player():
    env = make_env("tea_rl/Blackjack-v0")
    rng = np.random.default_rng(0)
    random = mean_return(env, lambda info: str(rng.choice(["hit", "stick"])), 400)
    assert mean_return(env, expert, 400) > random + 0.1


def test_value_iteration_prefers_the_shorter_way():
    # 0 can go to the goal 2 directly (action 1) or by way of 1 (action 0).
    chain = {
        0: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 2, 1.0, True)]},
        1: {0: [(1.0, 2, 1.0, True)], 1: [(1.0, 0, 0.0, False)]},
        2: {0: [(1.0, 2, 0.0, True)], 1: [(1.0, 2, 0.0, True)]},
    }
    assert list(optimal_policy(chain)[:2]) == [1, 0]


@pytest.mark.parametrize(
    ("id", "kwargs", "words"),
    [
        ("GuessNumber", {"low": 5, "high": 5}, "below"),
        ("GuessNumber", {"max_guesses": 0}, "max_guesses"),
        ("GuessNumber", {"hgh": 4}, 'Did you mean "high"'),
        ("Wordle", {"length": 12}, "3, 4, 5, 6"),
        ("Wordle", {"num_words": 10**6}, "num_words"),
        ("Bandit", {"probabilities": [0.5]}, "probabilities"),
        ("Bandit", {"probabilities": "abc"}, "probabilities"),
        ("Bandit", {"pulls": "x"}, "pulls"),
        ("Retrieval", {"num_facts": 11}, "num_facts"),
        ("FrozenLake", {"game": "frozen_lak"}, 'Did you mean "frozen_lake"'),
        ("FrozenLake", {"slippery": True}, "slippery"),
        ("FrozenLake", {"map_name": "9x9"}, "9x9"),
        ("FrozenLake", {"max_turns": 0}, "max_turns"),
    ],
)
def test_bad_settings_are_one_line(id, kwargs, words):
    with pytest.raises(TeaError, match=words) as caught:
        make_env(f"tea_rl/{id}-v0", kwargs)
    assert "\n" not in str(caught.value)
