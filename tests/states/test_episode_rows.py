"""Episodes in the store: every turn a row as it was played, failures left out, and training from it."""

import json
import math

import easy_envs  # noqa: F401 - registers the environments
import numpy as np
import pytest
import torch
import yaml
from stores import Stop, contents
from tiny import save_tiny

from tea_rl import TeaHead, load_backbone, train
from tea_rl.errors import TeaError
from tea_rl.recipe import load_recipe
from tea_rl.rollout import run_episodes
from tea_rl.states import StoreWriter
from tea_rl.states.rollouts import write_rollouts
from tea_rl.training.episodes import environment_maker, episode_settings, starts_of_step
from tea_rl.training.progress import Listener


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    model = save_tiny("llama", folder)
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 20},
        "env": {"id": "EasyEven-v0", "num_starts": 7, "discount": 0.5, "user": "{observation}\n"},
        "rollout": {
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_completion_length": 5,
            "temperature": 1.2,
        },
        "train": {"max_steps": 3, "num_threads": 1, "seed": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, load_backbone(str(model), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def store(setting, tmp_path_factory):
    path, backbone = setting
    return write_rollouts(load_recipe(path), tmp_path_factory.mktemp("made") / "store", backbone=backbone)


def test_what_is_stored_is_what_training_would_have_played(setting, store):
    path, backbone = setting
    recipe = load_recipe(path)
    assert store.kind == "rollout" and len(store) == 3 * 12 * 3
    starts = starts_of_step(recipe, 2)
    head = TeaHead.for_backbone(backbone, recipe.head, seed=5)
    make_env, settings = environment_maker(recipe.env), episode_settings(recipe)
    played = run_episodes(backbone, head, make_env, starts, settings, seed=(5, 2))
    rows = range(36, 72)
    tokens = store.tokens(rows=rows)
    for name in (
        "states",
        "actions",
        "slots",
        "within_tail_logps",
        "logps",
        "base_logps",
        "rows",
        "positions",
    ):
        assert torch.equal(getattr(tokens, name), getattr(played.tokens, name)), name
    for row, turn in zip(rows, played.turns, strict=True):
        episode = played.episodes[turn.episode]
        text, columns = store.text(row), store.text(row)["columns"]
        assert text["completion"] == turn.completion
        assert columns["episode"] == 12 + turn.episode and columns["turn"] == turn.turn == (row - 36) % 3
        assert columns["start"] == store.source_rows[row] == episode.start.index
        assert columns["observation"] == turn.observation and columns["parsed"] == turn.completion
        assert columns["step_reward"] == turn.reward and columns["invalid"] is False
        last = turn.turn == 2
        assert columns["terminated"] == last and columns["truncated"] is False
        assert columns.get("final_observation") == ("Go on." if last else None)
        # The conversation before the turn and the turn itself, as sampled.
        prompt = store.prompt_ids(row)
        said = store.tokens(rows=[row]).actions.tolist()
        assert episode.token_ids[: len(prompt) + len(said)] == prompt + said
        assert episode.model_mask[len(prompt) : len(prompt) + len(said)] == [True] * len(said)
        assert not episode.model_mask[len(prompt) - 1]
        assert text["prompt"] == backbone.tokenizer.decode(prompt)
        later = [other.reward for other in played.turns if other.episode == turn.episode][turn.turn :]
        assert store.rewards[row] == pytest.approx(sum(r * 0.5**n for n, r in enumerate(later)))
    assert store.finished[36:72].tolist() == [turn.finished for turn in played.turns]


def test_groups_are_the_same_turn_of_the_same_start(store):
    columns = [text["columns"] for text in store.texts()]
    keys = [(column["start"], column["turn"]) for column in columns]
    assert (
        len(set(keys))
        == len(set(store.groups.tolist()))
        == len(set(zip(keys, store.groups.tolist(), strict=True)))
    )


def test_behaviour_is_that_of_the_head_that_played(setting, tmp_path):
    path, backbone = setting
    recipe = load_recipe(path)
    head = TeaHead.for_backbone(backbone, recipe.head)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=0.05)
    head.save_pretrained(tmp_path / "head")
    made = write_rollouts(recipe, tmp_path / "store", 1, head=tmp_path / "head", backbone=backbone)
    tokens = made.tokens(rows=range(len(made)))
    assert not torch.allclose(tokens.logps, tokens.base_logps)
    torch.testing.assert_close(head.eval().terms(tokens, 1.2).logps, tokens.logps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overrides", [["head.shortlist_size=all"], ["head.context.layers=[1, -1]"]])
def test_other_heads_leave_what_they_read(setting, tmp_path, overrides):
    path, backbone = setting
    made = write_rollouts(load_recipe(path, overrides), tmp_path / "store", 1, backbone=backbone)
    tokens = made.tokens(rows=[4])
    assert tokens.shortlist.ids.shape[1] == (128 if "all" in overrides[0] else 20)
    wide = 3 if "context" in overrides[0] else 1
    assert tokens.states.shape[1] == wide * backbone.hidden_size
    ids = torch.tensor([made.prompt_ids(4) + tokens.actions.tolist()])
    states = backbone.forward(ids)[0, len(made.prompt_ids(4)) - 1 : -1]
    torch.testing.assert_close(tokens.states[:, : backbone.hidden_size], states, atol=1e-4, rtol=1e-4)


FLAKY = ["env.id=EasyFlaky-v0", "env.kwargs={broken: 3}"]


@pytest.mark.parametrize("overrides", [[], FLAKY])
def test_a_stopped_rollout_continues_to_the_same_bytes(setting, tmp_path, monkeypatch, overrides):
    path, backbone = setting
    recipe = load_recipe(path, overrides)

    def run(name):
        return write_rollouts(recipe, tmp_path / name, 6, backbone=backbone, shard_tokens=300)

    run("whole")
    append, calls = StoreWriter.append, []

    def stopping(self, rows, tokens):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise Stop
        append(self, rows, tokens)

    monkeypatch.setattr(StoreWriter, "append", stopping)
    monkeypatch.setattr("tea_rl.states.writer.PART_SECONDS", 0.0)
    for _ in range(20):
        try:
            run("stopped")
            break
        except Stop:
            continue
    assert len(calls) > 6
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_failed_episodes_are_left_out_and_counted(setting, tmp_path):
    path, backbone = setting
    notes = []

    class Notes(Listener):
        def on_note(self, text):
            notes.append(text)

    recipe = load_recipe(path, FLAKY)
    made = write_rollouts(recipe, tmp_path / "store", 3, Notes(), backbone=backbone)
    episodes = {text["columns"]["episode"]: text["columns"]["start"] for text in made.texts()}
    lost = 4 * sum(start.index < 3 for step in (1, 2, 3) for start in starts_of_step(recipe, step)) // 4
    assert min(episodes.values()) >= 3 and len(episodes) == 36 - lost and lost > 0
    assert made.manifest.notes == {"steps": 3, "episodes": 36 - lost, "episodes_lost": lost}
    assert any(
        note.startswith(f"{lost} episodes are left out") and "the line broke" in note for note in notes
    )


def test_mistakes_are_one_line(setting, tmp_path):
    path, backbone = setting
    cases = [
        (["env.id=EasyPick-v0", "env.choose_admissible=true"], "env.choose_admissible=false"),
        (["env.id=EasyPick-v0", "env.wrappers=[{name: admissible_actions}]"], "admissible_actions"),
        (["env.id=EasyPik-v0"], "EasyPik-v0"),
    ]
    for overrides, words in cases:
        with pytest.raises(TeaError, match=words) as caught:
            write_rollouts(load_recipe(path, overrides), tmp_path / "none", backbone=backbone)
        assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()
    with pytest.raises(TeaError, match="every episode of EasyFlaky-v0 failed .*the line broke"):
        recipe = load_recipe(path, ["env.id=EasyFlaky-v0", "env.kwargs={broken: 1000000}"])
        write_rollouts(recipe, tmp_path / "broken", backbone=backbone)
    write_rollouts(load_recipe(path), tmp_path / "store", 1, backbone=backbone)
    with pytest.raises(TeaError, match="complete store of 1 steps, got 2; give --steps 1"):
        write_rollouts(load_recipe(path), tmp_path / "store", 2, backbone=backbone)
    with pytest.raises(TeaError, match="made otherwise: the digest of data and settings"):
        write_rollouts(load_recipe(path, ["env.discount=1"]), tmp_path / "store", 1, backbone=backbone)
    # What decides nothing that is stored may differ.
    assert (
        len(
            write_rollouts(
                load_recipe(path, ["env.step_timeout=9"]), tmp_path / "store", 1, backbone=backbone
            )
        )
        == 36
    )


@pytest.mark.parametrize("objective", ["reward_weighted", "awr", "grpo"])
def test_training_offline_from_episodes(setting, store, tmp_path, objective):
    """What earned more gains more: the rank correlation over the rows it learned from."""
    path, backbone = setting
    recipe = load_recipe(
        path,
        [
            "env.id=null",
            f"data.store={store.path}",
            "data.eval_fraction=0.3",
            f"objective.name={objective}",
            "objective.target_kl=null",
            "objective.beta=0.05",
            "anchor.conservativity=0.01",
            "train.max_steps=120",
            "train.eval_steps=120",
            "train.learning_rate=0.003",
        ],
    )
    train(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    head = store.make_head(recipe.head)
    from tea_rl.head.checkpoint import load_weights

    load_weights(head, tmp_path / "run" / "head" / "tea_head.safetensors")
    tokens = store.tokens(rows=range(len(store)))
    with torch.no_grad():
        gains = head.eval().terms(tokens, store.temperature).logps - tokens.base_logps
    sums = np.bincount(tokens.rows.numpy(), gains.numpy(), minlength=len(store))
    centred = store.rewards - np.array(
        [store.rewards[store.groups == group].mean() for group in store.groups]
    )
    if objective == "awr":  # it imitates the better ones and leaves the others be
        per_token = sums / store.lengths
        assert per_token[centred > 0.02].mean() > per_token[centred < -0.02].mean() + 0.5
    else:
        wanted = centred if objective == "grpo" else store.rewards
        assert np.corrcoef(sums, wanted)[0, 1] > 0.2
