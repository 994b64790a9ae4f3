"""Whole runs in small environments on a tiny model: they learn, survive failing environments and resume exactly."""

import hashlib
import json
import math
import threading
from functools import partial

import easy_envs
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_tokenizer

import tea_rl.training.episodes as episodes
import tea_rl.training.generating as generating
from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.recipe import EnvConfig
from tea_rl.rollout import ConversationFormat, EpisodeSettings
from tea_rl.rollout.conversation import Conversation
from tea_rl.training.imitation import check_expert, expert_conversations
from tea_rl.training.progress import Listener
from tea_rl.training.turn_learner import TurnLearner

TIMING = ("seconds", "tokens_per_second", "environment_share")
CHOOSE = ["env.id=EasyPick-v0", "env.choose_admissible=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe_file(model, tmp_path_factory):
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [32, 16], "shortlist_size": 32, "num_members": 4},
        "env": {"id": "EasyEven-v0", "num_starts": 12, "eval_starts": 6, "user": "{observation}\n"},
        "rollout": {"prompts_per_step": 4, "num_generations": 6, "max_completion_length": 5},
        "objective": {"name": "grpo", "inner_epochs": 3, "minibatch_tokens": 64},
        "anchor": {"conservativity": 0.01},
        "train": {
            "learning_rate": 3e-3, "warmup_steps": 1, "max_steps": 4, "save_steps": 2, "eval_steps": 2, "sample_prompts": 2,
        },
    }  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "easy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rows(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def steps_of(path):
    return [row for row in rows(path) if "reward" in row]


def evaluations_of(path):
    return [row for row in rows(path) if "eval_reward" in row]


def digests(path):
    """SHA-256 of the head, and of everything in the newest checkpoint."""
    newest = max((path / "checkpoints").iterdir(), key=lambda folder: int(folder.name.removeprefix("step-")))
    files = sorted(newest.rglob("*.safetensors")) + [path / "head" / "tea_head.safetensors"]
    return {file.relative_to(path): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def finite(row):
    # Texts of one word have no bigrams.
    return all(math.isfinite(value) for name, value in row.items() if name != "eval_distinct_2")


def mean(values):
    return sum(values) / len(values)


def test_run_directory_is_complete(recipe_file, tmp_path):
    path = tmp_path / "run"
    result = train(str(recipe_file), path)
    assert result.step == 4 and not result.stopped
    names = {"recipe.yaml", "metrics.jsonl", "samples.jsonl", "curves.png", "report.html", "manifest.json"}
    assert names | {"head", "checkpoints"} <= {item.name for item in path.iterdir()}
    assert sorted(item.name for item in (path / "checkpoints").iterdir()) == ["step-2", "step-4"]
    steps = steps_of(path)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    expected = {
        "reward", "kl", "entropy", "turns", "invalid", "truncated", "failed", "loss", "grad_norm", "learning_rate",
        "inner_epochs", "skipped_steps", *TIMING,
    }  # fmt: skip
    assert expected <= steps[0].keys()
    assert all(row["turns"] == 3 and row["failed"] == row["invalid"] == 0 for row in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-4
    evaluations = evaluations_of(path)
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert {"eval_reward_greedy", "eval_turns", "eval_invalid", "eval_kl", "eval_distinct_2"} <= evaluations[
        0
    ].keys()
    assert all(finite(row) for row in steps + evaluations)
    samples = rows(path, "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 2, 2, 4, 4]
    assert samples[0]["base"] == samples[0]["trained"] != samples[-1]["trained"]
    assert samples[0]["prompt"].startswith("Write ") and samples[0]["base"].count("\nGo on.") == 3
    for row in samples:
        for side in ("base", "trained"):
            told = row[f"{side}_episode"]
            assert sum(turn["reward"] for turn in told["turns"]) == pytest.approx(row[f"{side}_reward"])
            assert [turn["turn"] for turn in told["turns"]] == [0, 1, 2] and told["start"] >= 12
            assert all(turn["completion"] in row[side] for turn in told["turns"])
    assert "value" not in {item.name for item in path.iterdir()}


@pytest.mark.parametrize("objective", ["grpo", "ppo", "rloo", "reinforce"])
def test_every_objective_learns(recipe_file, tmp_path, objective):
    settings = [f"objective.name={objective}", "train.max_steps=10", "rollout.num_generations=12"]
    train(load_recipe(str(recipe_file), [*settings, "train.eval_steps=10"]), tmp_path / "run")
    rewards = [row["reward"] for row in steps_of(tmp_path / "run")]
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.2
    before, after = evaluations_of(tmp_path / "run")
    assert after["eval_reward"] > before["eval_reward"] + 0.2


def test_only_the_least_sure_tokens_are_learnt_from(recipe_file, tmp_path, monkeypatch):
    seen, update = [], TurnLearner.update_turns

    def spy(self, tokens, choices, advantages, generator):
        seen.append((len(tokens), tokens.entropy.mean().item()))
        return update(self, tokens, choices, advantages, generator)

    monkeypatch.setattr(TurnLearner, "update_turns", spy)
    for share in (1.0, 0.25):
        settings = [f"objective.top_entropy_quantile={share}", "train.max_steps=1", "env.eval_starts=0"]
        train(load_recipe(str(recipe_file), settings), tmp_path / str(share))
    (whole, entropy), (kept, higher) = seen
    assert kept == math.ceil(0.25 * whole) and higher > entropy


def test_ppo_logs_and_saves_its_value_head(recipe_file, tmp_path):
    recipe = load_recipe(str(recipe_file), ["objective.name=ppo", "train.max_steps=8", "env.discount=0.9"])
    train(recipe, tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert all(row["value_loss"] > 0 for row in steps)
    assert steps[0]["value_spread"] == 0  # members agree until they have learned
    assert all(row["value_spread"] > 0 for row in steps[1:])
    assert steps[-1]["value_loss"] < steps[0]["value_loss"]
    assert (tmp_path / "run" / "value").is_dir()


@pytest.mark.parametrize("overrides", [[], ["objective.name=ppo"], [*CHOOSE, "objective.name=ppo"]])
def test_stopped_and_resumed_run_ends_with_the_same_bytes(recipe_file, tmp_path, overrides):
    recipe = load_recipe(str(recipe_file), overrides)
    train(recipe, tmp_path / "whole")
    stops = iter([False, False, False, True])  # asked before the first step and after each
    assert train(recipe, tmp_path / "parts", should_stop=lambda: next(stops)).step == 3
    assert train(recipe, tmp_path / "parts", resume=True).step == 4
    whole = digests(tmp_path / "whole")
    assert whole == digests(tmp_path / "parts")
    assert any("value" in file.parts for file in whole) == (recipe.objective.name == "ppo")

    def comparable(path):
        # As text: NaN differs from itself.
        return [str({key: value for key, value in row.items() if key not in TIMING}) for row in rows(path)]

    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")
    assert rows(tmp_path / "whole", "samples.jsonl") == rows(tmp_path / "parts", "samples.jsonl")


def test_listed_answers_are_learned(recipe_file, tmp_path):
    # The tiny model is all but sure of one answer; a higher temperature makes it try the others.
    settings = [*CHOOSE, "train.max_steps=12", "train.eval_steps=12", "rollout.num_generations=12"]
    settings += ["head.shortlist_size=all", "rollout.temperature=4", "train.learning_rate=0.01"]
    train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    first, last = evaluations_of(tmp_path / "run")
    assert last["eval_reward"] > first["eval_reward"] + 0.3
    assert first["eval_invalid"] == 0 and first["eval_expert_reward"] == 1
    assert first["eval_constant_reward"] < 0.7 and first["eval_random_reward"] < 0.7
    assert "eval_expert_reward" not in last


def test_a_supervised_start_raises_the_held_out_reward(recipe_file, tmp_path):
    expert = ["env.expert.episodes=12", "env.expert.num_train_epochs=60", "env.expert.learning_rate=0.01"]
    # All tokens: the expert's letters are not among the random model's likeliest.
    settings = [
        "env.id=EasyPick-v0",
        "train.max_steps=1",
        "head.shortlist_size=all",
        'rollout.stop=["\\n"]',
        *expert,
    ]
    notes = []

    class Notes(Listener):
        def on_note(self, text):
            notes.append(text)

    train(load_recipe(str(recipe_file), settings), tmp_path / "run", listener=Notes())
    base, imitated, *_ = evaluations_of(tmp_path / "run")
    assert base["step"] == imitated["step"] == 0 and imitated["imitated"] and "imitated" not in base
    assert base["eval_reward"] < 0.2 and imitated["eval_reward"] > 0.6
    assert base["eval_kl"] < 1e-6 < imitated["eval_kl"]
    assert any("imitating 12" in text for text in notes)
    samples = [row for row in rows(tmp_path / "run", "samples.jsonl") if row["step"] == 0]
    assert len(samples) == 4
    assert [row["base"] for row in samples[:2]] == [row["base"] for row in samples[2:]]
    assert [row["trained"] for row in samples[:2]] != [row["trained"] for row in samples[2:]]


def test_a_supervised_start_is_resumed_with_the_original_models_samples(recipe_file, tmp_path):
    expert = ["env.expert.episodes=4", "env.expert.num_train_epochs=2"]
    recipe = load_recipe(str(recipe_file), ["env.id=EasyPick-v0", *expert])
    train(recipe, tmp_path / "whole")
    stops = iter([False, True])
    train(recipe, tmp_path / "parts", should_stop=lambda: next(stops))
    train(recipe, tmp_path / "parts", resume=True)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    assert rows(tmp_path / "whole", "samples.jsonl") == rows(tmp_path / "parts", "samples.jsonl")


def conversations_of(make_env, episodes, room=128, notes=None, **settings):
    return expert_conversations(
        make_env,
        Conversation(tiny_tokenizer(), ConversationFormat("plain")),
        EpisodeSettings(**{"max_turns": 9, **settings}),
        EnvConfig(id="EasyPick-v0", expert={"episodes": episodes}),
        room,
        (notes if notes is not None else []).append,
    )


FAULTS = {"raise": "the line broke", "nan": "must be finite", "hang": "no answer within 0.4 seconds"}


@pytest.mark.parametrize("how", FAULTS)
def test_expert_episodes_that_fail_are_left_out_and_counted(how):
    release = threading.Event()

    class FlakyExpert(easy_envs.Flaky):
        def step(self, action):
            if how == "hang" and self.index < self.broken:
                release.wait(60)
            return super().step(action)

        def _expert(self):
            return "d"

    notes = []
    made = partial(FlakyExpert, how if how != "hang" else "raise")
    found = conversations_of(partial(made, 2), 5, notes=notes, step_timeout=0.4)
    # The others' are as if nothing had failed.
    assert found == conversations_of(partial(made, 0), 5)[2:] and len(found) == 3
    assert (
        len(notes) == 1 and notes[0].startswith("2 of 5 expert episodes failed") and FAULTS[how] in notes[0]
    )
    with pytest.raises(TeaError, match=f"none of 5 expert episodes .*{FAULTS[how]}"):
        conversations_of(partial(made, 9), 5, step_timeout=0.4)
    release.set()


def test_expert_episodes_end_with_the_turns_of_the_recipe():
    (ids, said), *_ = conversations_of(easy_envs.Pick, 3, max_turns=1)
    assert len(ids) == 7 and said[-1]


def test_an_expert_that_hangs_at_the_first_look_is_left_to_the_run():
    release = threading.Event()

    class Hanging(easy_envs.Pick):
        def reset(self, **kwargs):
            release.wait(60)
            return super().reset(**kwargs)

    env = EnvConfig(id="EasyPick-v0", expert={"episodes": 2})
    check_expert(Hanging, EpisodeSettings(step_timeout=0.3), env)
    release.set()
    with pytest.raises(TeaError, match="EasyPick-v0 has no expert; set it to 0"):
        check_expert(partial(easy_envs.Pick, silent=True), EpisodeSettings(), env)


@pytest.mark.parametrize("room", [5, 11, 12, 17, 40])
def test_expert_conversations_end_with_the_last_answer_that_fits(room):
    """The first observation has 5 tokens, an answer 2, the next observation 5; the whole episode 14."""
    tokenizer = tiny_tokenizer()
    if room < 7:
        with pytest.raises(TeaError, match="no answer fits into 5 tokens"):
            conversations_of(easy_envs.Pick, 3, room)
        return
    for index, (ids, said) in enumerate(conversations_of(easy_envs.Pick, 3, room)):
        assert len(ids) == len(said) == (14 if room >= 14 else 7) and said[-1]
        env = easy_envs.Pick()
        question, info = env.reset(seed=index, options={"index": index})
        turn = f"{question}\n{info['expert']}\n"
        assert tokenizer.decode(ids) == turn * (len(ids) // 7)
        assert tokenizer.decode([t for t, own in zip(ids, said, strict=True) if own]) == turn[5:] * (
            len(ids) // 7
        )


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_failing_environment_costs_its_episodes_only(recipe_file, tmp_path, how, objective):
    settings = ["env.id=EasyFlaky-v0", f"env.kwargs={{how: {how}, broken: 5}}", f"objective.name={objective}"]
    settings += ["train.max_steps=9", "rollout.num_generations=12", "train.eval_steps=9"]
    train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 9
    # Twelve starts, four a step: three steps see every start once.
    for first in range(0, 9, 3):
        assert mean([row["failed"] for row in steps[first : first + 3]]) == pytest.approx(5 / 12)
    assert mean([row["reward"] for row in steps[-3:]]) > mean([row["reward"] for row in steps[:3]]) + 0.1
    assert all(finite(row) for row in steps)
    assert all(math.isfinite(row["eval_reward"]) for row in evaluations_of(tmp_path / "run"))


@pytest.mark.parametrize("overrides", [[], ["objective.name=ppo"], ["env.eval_starts=0"]])
def test_an_environment_that_always_fails_ends_the_run_in_one_line(recipe_file, tmp_path, overrides):
    settings = ["env.id=EasyFlaky-v0", "env.kwargs={broken: 10000000}", *overrides]
    with pytest.raises(TeaError, match=r"every episode .*the line broke") as caught:
        train(load_recipe(str(recipe_file), settings), tmp_path / "run")
    assert "\n" not in str(caught.value)


MISTAKES = [
    (["data.prompts=[a, b]"], "data.prompts"),
    (["rewards=[{name: sentiment}]"], "reward_terms"),
    (["objective.name=dpo"], "labelled data"),
    (["env.user=hello"], "{observation}"),
    (["env.id=EasyEvn-v0"], 'there is no environment "EasyEvn-v0"'),
    (["env.id=no_such_module:Even-v0"], "no_such_module"),
    (["env.id=CartPole-v1"], "not a text environment"),
    (["env.kwargs={lenght: 3}"], "lenght"),
    (["env.id=tea_rl/GuessNumber-v0", "env.kwargs={hgh: 3}"], 'Did you mean "high"'),
    (["env.wrappers=[{name: step_penlty}]"], 'Did you mean "step_penalty"'),
    (["env.wrappers=[{name: step_penalty, kwargs: {penalty: -1}}]"], "step penalty"),
    (["env.wrappers=[{name: step_penalty, kwargs: {cost: 1}}]"], "step_penalty refuses"),
    (["rollout.prompts_per_step=13"], "prompts_per_step is 13"),
    (["env.expert.episodes=3"], "EasyEven-v0 has no expert; set it to 0"),
    (
        ["env.id=EasyPick-v0", "env.kwargs={silent: true}", "env.expert.episodes=3"],
        "has no expert; set it to 0",
    ),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_recipe_mistakes_cost_no_model_and_leave_no_folder(
    recipe_file, tmp_path, monkeypatch, overrides, words
):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generating, "load_backbone", loaded)
    with pytest.raises(TeaError) as caught:
        train(load_recipe(str(recipe_file), overrides), tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_does_not_fit_is_one_line(recipe_file, tmp_path):
    with pytest.raises(TeaError, match="context") as caught:
        train(load_recipe(str(recipe_file), ["env.max_context=10"]), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_wrapper_for_listed_answers_makes_them_choices(recipe_file):
    for overrides, chooses in (
        ([], False),
        (["env.wrappers=[{name: admissible_actions}]"], True),
        (CHOOSE, True),
    ):
        recipe = load_recipe(str(recipe_file), ["env.id=EasyPick-v0", *overrides])
        assert episodes.episode_settings(recipe).choose_admissible == chooses


def test_states_of_turns_are_those_of_their_first_token(model):
    """Free text and choices; a turn without a record (a failed episode's) has zeros."""
    from tea_rl.backbone import load_backbone
    from tea_rl.head.config import HeadConfig
    from tea_rl.head.layer import TeaHead
    from tea_rl.rollout import EpisodeStart, run_episodes

    backbone = load_backbone(str(model), dtype="float32")
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=24))
    for name, choose in (("EasyFlaky-v0", False), ("EasyPick-v0", True)):
        recipe = EnvConfig(id=name)
        settings = EpisodeSettings(max_new_tokens=4, choose_admissible=choose)
        starts = [EpisodeStart(index) for index in range(5)]
        batch = run_episodes(backbone, head, episodes.environment_maker(recipe), starts, settings)
        found = episodes.turn_states(batch)
        assert found.shape == (len(batch.turns), head.state_width)
        for number, turn in enumerate(batch.turns):
            episode = batch.episodes[turn.episode]
            if episode.failed is not None:
                assert not found[number].any()
                continue
            own = [place for place, mine in enumerate(episode.model_mask) if mine]
            begins = [place for place in own if not episode.model_mask[place - 1]][turn.turn]
            ids = torch.tensor([episode.token_ids[:begins]])
            states = backbone.forward(ids, attention_mask=torch.ones_like(ids))
            torch.testing.assert_close(found[number], states[0, -1], atol=1e-4, rtol=1e-4)
        assert (batch.num_failed > 0) != choose
