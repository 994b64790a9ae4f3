"""The checker finds what is wrong with a broken environment, and the space takes any text."""

import pickle

import gymnasium
import pytest

from tea_rl.envs import AnyText, TextEnv, Turn, list_envs, make_env
from tea_rl.envs.checking import check_text_env
from tea_rl.envs.junk import FIXED, HIDING, hidden, junk
from tea_rl.errors import TeaError


class Honest(TextEnv):
    """Say the drawn digit."""

    def __init__(self, render_mode=None):
        super().__init__(max_turns=2, render_mode=render_mode)

    def _start(self, rng, index):
        self.digit = str(rng.integers(10))
        return f"Say {self.digit}."

    def _act(self, text):
        if text not in list("0123456789"):
            return Turn("A digit, please.", invalid=True)
        return Turn("Thanks.", float(text == self.digit), True, parsed=text)

    def _admissible(self):
        return list("0123456789")

    def _expert(self):
        return self.digit


class PaysJunk(Honest):
    def _act(self, text):
        return Turn("Thanks.", float(self.digit in text), True, parsed=self.digit)


class PaysHiddenLater(Honest):
    """Only at later starts, for their own answer."""

    def _start(self, rng, index):
        self.later = index is not None and index > 20
        return super()._start(rng, index)

    def _act(self, text):
        if self.later and text == f"maybe {self.digit} or something else":
            return Turn("Thanks.", 1.0, True, parsed=self.digit)
        return super()._act(text)


class IgnoresSeeds(Honest):
    count = 0

    def _start(self, rng, index):
        IgnoresSeeds.count += 1
        return f"Say {super()._start(rng, index)} {IgnoresSeeds.count}"


class Raises(Honest):
    def _act(self, text):
        if not text.isascii():
            raise ValueError("cannot read this")
        return super()._act(text)


class OutOfRange(Honest):
    def _act(self, text):
        turn = super()._act(text)
        return Turn(turn.text, 5 * turn.reward, turn.terminated, turn.invalid, turn.parsed)


class NotFinite(Honest):
    def _act(self, text):
        return Turn("Thanks.", float("nan"), True, parsed=text)


class NoInfo(Honest):
    def _info(self, turn):
        return {}


@pytest.fixture
def register():
    made = []

    def add(cls):
        made.append(f"tea_rl_test/{cls.__name__}-v0")
        gymnasium.register(made[-1], cls, disable_env_checker=True)
        return made[-1]

    yield add
    for id in made:
        del gymnasium.registry[id]


def test_a_sound_environment_passes_and_the_scores_are_right(register):
    report = check_text_env(register(Honest), episodes=300)
    assert report.ok and report.problems == []
    assert report.expert_score.mean == 1
    assert report.random_score.mean == pytest.approx(0.1, abs=0.08)
    assert report.constant_score.mean == pytest.approx(0.1, abs=0.08)
    assert report.seen_rewards == (0, 1) and report.max_turns == 2
    assert "all passed" in str(report) and report.to_dict()["ok"]


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (PaysJunk, "junk is paid"),
        (PaysHiddenLater, "junk is paid: 'maybe "),
        (IgnoresSeeds, "another prompt with another seed"),
        (Raises, "cannot read this"),
        (OutOfRange, "outside of the declared"),
        (NotFinite, "not finite"),
        (NoInfo, 'info["turn"]'),
    ],
)
def test_a_broken_environment_is_found_out(register, cls, words):
    report = check_text_env(register(cls), episodes=4)
    assert not report.ok
    assert any(words in problem for problem in report.problems), report.problems
    assert "failed" in str(report)


def test_a_positive_reward_for_an_invalid_action_is_cut():
    class Generous(Honest):
        def _act(self, text):
            return Turn("Well.", 1.0, True, invalid=True, parsed=text)

    env = Generous()
    env.reset(seed=0)
    _, reward, _, _, info = env.step("junk")
    assert reward == 0 and info["invalid"] and info["parsed"] is None


def test_junk_is_what_it_says():
    import numpy as np

    found = list(junk(1000, ["left", "16"], np.random.default_rng(0)))
    assert len(found) == 1000 and set(FIXED) <= set(found)
    assert "The answer is left" in found and "16 or so" in found
    assert any(len(text) >= 100_000 for text in found) and "" in found
    assert "left" not in hidden(["left"]) and len(hidden(["left"])) == len(HIDING)


@pytest.mark.parametrize("text", ["", " ", "Grüße, 世界", "\x00\ud800", "a" * 10**6])
def test_any_text_is_in_the_space(text):
    assert text in AnyText()


def test_the_space_samples_copies_and_compares():
    space = AnyText(seed=3)
    assert all(space.sample() in space for _ in range(50))
    assert pickle.loads(pickle.dumps(space)) == space == AnyText()
    assert 5 not in space and b"x" not in space and None not in space


def test_environments_step_together_with_sync_vectorisation():
    ids = ["tea_rl/GuessNumber-v0"] * 3
    envs = gymnasium.vector.SyncVectorEnv([lambda id=id: make_env(id) for id in ids])
    observations, _ = envs.reset(seed=[1, 2, 3])
    assert len(observations) == 3
    told, rewards, *_ = envs.step(("16", "junk" * 100, ""))
    assert "Answer with one number" in told[1] and rewards[1] == 0


@pytest.mark.parametrize(
    ("id", "words"),
    [
        ("tea_rl/GuesNumber-v0", 'Did you mean "tea_rl/GuessNumber-v0"'),
        ("guessnumber", 'Did you mean "tea_rl/GuessNumber-v0"'),
        ("tea_rl/GuessNumber-v7", 'Did you mean "tea_rl/GuessNumber-v0"'),
        ("", "there is no environment"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("FrozenLake-v1", r"observation_space is Discrete\(16\), expected Text"),
        ("CartPole-v1", "observation_space is Box"),
    ],
)
def test_an_id_that_cannot_be_made_is_one_line(id, words):
    with pytest.raises(TeaError, match=words) as caught:
        make_env(id)
    assert "\n" not in str(caught.value)


def test_every_listed_environment_is_registered_with_a_line_about_it():
    for entry in list_envs():
        assert entry.id in gymnasium.registry
        assert entry.summary.endswith(".") and "\n" not in entry.summary
