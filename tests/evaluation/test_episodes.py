"""Evaluation in environments: what the figures count, and how an episode reads."""

import math
import threading

import easy_envs
import pytest
from tiny import tiny_backbone

from tea_rl.evaluation.episodes import evaluate_episodes, scores_without_skill, transcript
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import EpisodeSettings
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, EpisodeStart, Turn


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def head(backbone):
    return TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=24))


def evaluated(backbone, head, make_env, starts=range(4), generations=2, **settings):
    settings = EpisodeSettings(max_new_tokens=4, **settings)
    return evaluate_episodes(backbone, head, make_env, list(starts), settings, generations)


def test_an_original_model_is_measured_the_same_twice(backbone, head):
    first, second = (evaluated(backbone, head, easy_envs.Even) for _ in range(2))
    assert str(first) == str(second)  # as text: what was not measured is NaN, which differs from itself
    assert first.metrics["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert first.metrics["eval_turns"] == 3 and first.metrics["eval_failed"] == 0
    assert first.metrics["eval_base_nll"] > 0
    assert len(first.samples) == 4


def test_failed_episodes_are_counted_and_left_out_of_the_means(backbone, head):
    def flaky():
        return easy_envs.Flaky(broken=2)

    some, sound = (
        evaluated(backbone, head, flaky),
        evaluated(backbone, head, easy_envs.Even, starts=range(2, 4)),
    )
    assert some.metrics["eval_failed"] == 0.5 and sound.metrics["eval_failed"] == 0
    for name in ("eval_reward", "eval_reward_greedy", "eval_turns", "eval_base_nll"):
        assert some.metrics[name] == pytest.approx(sound.metrics[name], abs=1e-4)
    assert math.isnan(some.samples[0].reward) and "the line broke" in some.samples[0].completion
    assert [sample.completion for sample in some.samples[2:]] == [s.completion for s in sound.samples]


def test_nothing_is_measured_where_everything_fails(backbone, head):
    result = evaluated(backbone, head, lambda: easy_envs.Flaky(broken=99))
    assert result.metrics["eval_failed"] == 1
    assert math.isnan(result.metrics["eval_reward"]) and math.isnan(result.metrics["eval_base_nll"])


def test_listed_answers_are_measured_as_decisions(backbone, head):
    metrics = evaluated(backbone, head, easy_envs.Pick, choose_admissible=True).metrics
    assert metrics["eval_invalid"] == 0 and metrics["eval_turns"] == 2
    assert 0 < metrics["eval_entropy"] < math.log(3) + 1e-6


def test_scores_without_skill():
    notes = []
    found = scores_without_skill(easy_envs.Pick, range(50, 90), notes.append)
    assert found["eval_expert_reward"] == 1
    assert 0.1 < found["eval_random_reward"] < 0.6 and 0.1 < found["eval_constant_reward"] < 0.7
    assert scores_without_skill(easy_envs.Even, range(4), notes.append) == {}
    assert notes == []

    class Broken(easy_envs.Pick):
        def step(self, action):
            raise ValueError("two\nlines")

    assert scores_without_skill(Broken, range(4), notes.append) == {}
    assert notes == [
        "scores without skill leave out 8 starts where the environment failed (ValueError: two lines)"
    ]


@pytest.mark.parametrize("how", ["raise", "nan", "hang", "nonsense"])
def test_scores_without_skill_leave_out_the_starts_that_fail(how):
    """Four of eight starts fail in their second turn: the scores are those of the other four."""
    release, met = threading.Event(), []

    class Sometimes(easy_envs.Pick):
        def reset(self, *, seed=None, options=None):
            self.index = options["index"]
            return super().reset(seed=seed, options=options)

        def step(self, action):
            answer = super().step(action)
            if self.index >= 4 or not answer[2]:
                return answer
            met.append(self.index)
            if how == "hang":
                release.wait(60)
            if how == "raise":
                raise ValueError("the line broke")
            return (answer[0], math.nan if how == "nan" else "much", *answer[2:])

    notes = []
    settings = EpisodeSettings(step_timeout=0.4)
    found = scores_without_skill(Sometimes, range(8), notes.append, settings)
    release.set()
    assert found == scores_without_skill(easy_envs.Pick, range(4, 8), notes.append, settings)
    assert len(notes) == 1 and "leave out 4 starts" in notes[0]
    assert sorted(met) == [0, 1, 2, 3]  # a start that failed is not played again


def test_scores_without_skill_end_with_the_turns_that_the_policy_has():
    found = scores_without_skill(easy_envs.Pick, range(9), print, EpisodeSettings(max_turns=1))
    assert found["eval_expert_reward"] == 0.5


def test_a_transcript_is_everything_behind_the_first_observation():
    turns = [
        Turn(1, 0, "Find it.", " 5\n"),
        Turn(1, 1, "Higher. Guess:", " 7"),
    ]
    episodes = [
        Episode(EpisodeStart(0), float("nan"), 0, failed="broken"),
        Episode(EpisodeStart(1), 1.0, 2, terminated=True, final_observation="Correct."),
    ]
    batch = EpisodeBatch(None, None, turns, episodes, 1.0, 1.0, 0)
    sample = transcript(batch, 1)
    assert sample.prompt == "Find it." and sample.reward == 1.0
    assert sample.completion == " 5\nHigher. Guess: 7\nCorrect."
    assert [(turn["observation"], turn["completion"]) for turn in sample.episode["turns"]] == [
        ("Find it.", " 5\n"),
        ("Higher. Guess:", " 7"),
    ]
    assert sample.episode["final_observation"] == "Correct." and sample.episode["failed"] is None
    failed = transcript(batch, 0)
    assert failed.completion == "(failed: broken)" and math.isnan(failed.reward)
