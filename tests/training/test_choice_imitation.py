"""Imitation between listed answers: learnt from guided episodes and from the head's own mistakes."""

import json

import easy_envs
import gymnasium
import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import parse_recipe
from tea_rl.rollout.choices import ChoiceBatch, choice_logps
from tea_rl.rollout.episode_batch import EpisodeSettings, EpisodeStart
from tea_rl.rollout.episodes import run_episodes
from tea_rl.training.choice_imitation import expert_choices
from tea_rl.training.progress import Listener


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe_file(tmp_path, model):
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"num_members": 2, "hidden_sizes": [32], "shortlist_size": "all"},
        "env": {
            "id": "EasyPick-v0", "num_starts": 16, "eval_starts": 12, "choose_admissible": True, "assistant_end": "",
            "expert": {"episodes": 12, "num_train_epochs": 40, "learning_rate": 0.01},
        },
        "rollout": {"prompts_per_step": 2, "num_generations": 2},
        "anchor": {"conservativity": 0.0},
        "train": {"max_steps": 1, "learning_rate": 1e-6, "warmup_steps": 0, "eval_generations": 2},
    }  # fmt: skip
    path = tmp_path / "pick.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Notes(Listener):
    def __init__(self):
        self.texts = []

    def on_note(self, text):
        self.texts.append(text)


def trained(recipe_file, folder, *overrides):
    notes = Notes()
    train(load_recipe(str(recipe_file), list(overrides)), folder, listener=notes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    base, imitated = [line for line in lines if line["step"] == 0]
    assert imitated["imitated"]
    return base["eval_reward"], imitated["eval_reward"], [text for text in notes.texts if "played" in text]


def test_guided_episodes_teach(recipe_file, tmp_path):
    base, imitated, notes = trained(recipe_file, tmp_path / "run")
    assert base < 0.6 and imitated > 0.9
    # Always guided: the expert's return is 1.
    assert notes == [
        "played 12 episodes guided in 100% of the turns: return +1.000, 24 of 24 turns with an expert's answer"
    ]


def test_own_mistakes_teach_without_any_guidance(recipe_file, tmp_path):
    settings = ["env.expert.guidance=0", "env.expert.dagger_rounds=2", "env.expert.dagger_episodes=5"]
    base, imitated, notes = trained(recipe_file, tmp_path / "run", *settings)
    assert base < 0.6 and imitated > 0.9
    returns = [float(text.split("return ")[1].split(",")[0]) for text in notes]
    assert len(notes) == 3 and all("by itself" in text for text in notes)
    assert returns[0] < 0.6 < returns[1]


def played_with(model, guidance, count=8, seed=0):
    backbone = load_backbone(str(model), dtype="float32")
    head = TeaHead.for_backbone(backbone)
    settings = EpisodeSettings(choose_admissible=True, guidance=guidance, temperature=4.0)
    starts = [EpisodeStart(index) for index in range(count)]
    return head, run_episodes(backbone, head, easy_envs.Pick, starts, settings, (seed,))


def test_guidance_is_a_share_of_the_turns(model):
    for guidance, low, high in ((0.0, 0.1, 0.6), (0.5, 0.45, 0.95), (1.0, 1.0, 1.0)):
        _, played = played_with(model, guidance, 40)
        followed = sum(turn.completion == turn.expert for turn in played.turns) / len(played.turns)
        assert low <= followed <= high
    assert played_with(model, 0.5)[1].turns == played_with(model, 0.5)[1].turns


def test_expert_choices_name_the_experts_answer(model):
    _, played = played_with(model, 0.0)
    advice = expert_choices(played)
    assert len(advice) == len(played.turns)
    for decision, turn in enumerate(advice.turns.tolist()):
        choice = int(advice.chosen[decision])
        assert advice.decision_of_choice[choice] == decision
        assert advice.texts[choice] == played.turns[turn].expert
    played.turns[0].expert = "z"  # not listed
    played.turns[1].expert = None
    assert len(expert_choices(played)) == len(played.turns) - 2
    for turn in played.turns:
        turn.expert = None
    assert expert_choices(played) is None


def test_joined_decisions_are_the_parts(model):
    head, first = played_with(model, 0.0)
    _, second = played_with(model, 0.5, 3, seed=1)
    joined = ChoiceBatch.cat([first.choices, second.choices])
    assert len(joined) == len(first.choices) + len(second.choices)

    def policies(batch):
        logps = head.terms(batch.tokens, 4.0).logps
        return choice_logps(logps, batch.tokens.rows, batch.decision_of_choice)

    parts = torch.cat([policies(first.choices), policies(second.choices)])
    torch.testing.assert_close(policies(joined), parts)
    torch.testing.assert_close(policies(joined)[joined.chosen], joined.logps)
    own = joined.select(torch.arange(len(first.choices), len(joined)))
    assert own.texts == second.choices.texts and torch.equal(own.chosen, second.choices.chosen)


class Odd(easy_envs.Pick):
    """`Pick` whose expert names a letter that is not listed."""

    def _expert(self):
        return "z"


def test_an_expert_that_names_nothing_listed_is_one_line(recipe_file, tmp_path):
    gymnasium.register("EasyOdd-v0", entry_point=Odd, disable_env_checker=True)
    try:
        with pytest.raises(TeaError, match="nothing of 12 episodes can be imitated.*EasyOdd-v0 never names"):
            trained(recipe_file, tmp_path / "run", "env.id=EasyOdd-v0")
    finally:
        del gymnasium.registry["EasyOdd-v0"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert": {"episodes": 9}, "num_starts": 8}, "only 8 starts are for training"),
        ({"expert": {"guidance": 0.5}}, "guidance is for answers that the environment lists, got 0.5"),
        (
            {"expert": {"dagger_rounds": 2}, "choose_admissible": True},
            "dagger_rounds is 2, but no episode is imitated",
        ),
        ({"expert": {"dagger_rounds": 2}}, "dagger_rounds is for answers that the environment lists, got 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(TeaError, match=words):
        parse_recipe({"env": {"id": "EasyPick-v0", **settings}})
