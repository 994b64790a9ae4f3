"""Rollouts in the store: what was sampled, with behaviour log-probabilities, and a killed rollout that continues."""

from functools import partial

import numpy as np
import pytest
import torch
import yaml
from stores import Stop, contents
from tiny import save_tiny

from tea_rl import DecodeSettings, TeaHead, generate, load_backbone
from tea_rl.errors import TeaError
from tea_rl.recipe import RewardSpec, load_recipe
from tea_rl.states import StateStore, StoreWriter
from tea_rl.states.relabel import relabel
from tea_rl.states.rollouts import write_rollouts


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    model = save_tiny("llama", folder)
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"shortlist_size": 20},
        "data": {"prompts": [f"prompt number {i}" for i in range(8)]},
        "rewards": [{"name": "length", "kwargs": {"max": 1}}, {"name": "sentiment", "weight": 0.5}],
        "rollout": {
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_completion_length": 6,
            "temperature": 1.2,
        },
        "train": {"max_steps": 3, "num_threads": 1, "seed": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, load_backbone(str(model), dtype="float32", device="cpu")


@pytest.fixture
def noisy_head(setting, tmp_path):
    """A saved head that changes the policy."""
    path, backbone = setting
    head = TeaHead.for_backbone(backbone, load_recipe(path).head)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=0.05)
    head.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_what_is_stored_is_what_training_would_have_sampled(setting, tmp_path):
    from tea_rl.training.online import prepare_prompts
    from tea_rl.training.seeding import prompts_of_step

    path, backbone = setting
    recipe = load_recipe(path)
    store = write_rollouts(recipe, tmp_path / "store", backbone=backbone)
    assert store.kind == "rollout" and len(store) == 3 * 3 * 4
    prompts, _ = prepare_prompts(recipe, backbone)
    chosen = prompts_of_step(5, 2, len(prompts), 3)
    expected = generate(
        backbone,
        TeaHead.for_backbone(backbone, recipe.head, seed=5),
        prompts.take(chosen).token_ids,
        DecodeSettings(4, 6, 1.2),
        seed=(5, 2),
    )
    rows = range(12, 24)
    assert [store.text(row)["completion"] for row in rows] == expected.texts
    assert [store.prompt_ids(row) for row in rows] == [
        prompts.take(chosen).token_ids[i] for i in expected.prompt_index
    ]
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
        assert torch.equal(getattr(tokens, name), getattr(expected.tokens, name)), name
    assert store.finished[12:24].tolist() == expected.finished.tolist()
    assert np.allclose(store.rewards, store.terms["length"] + 0.5 * store.terms["sentiment"])
    groups = store.groups.reshape(-1, 4)
    assert (groups == groups[:, :1]).all() and groups[3:6, 0].tolist() == chosen
    full = store.make_head(recipe.head).eval().terms(tokens, store.temperature).logps
    torch.testing.assert_close(full, tokens.logps, atol=1e-5, rtol=1e-5)


def test_behaviour_of_another_head(setting, noisy_head, tmp_path):
    path, backbone = setting
    store = write_rollouts(load_recipe(path), tmp_path / "store", 1, head=noisy_head, backbone=backbone)
    tokens = store.tokens(rows=range(len(store)))
    assert not torch.allclose(tokens.logps, tokens.base_logps)
    head = TeaHead.from_pretrained(noisy_head, backbone)
    torch.testing.assert_close(head.terms(tokens, 1.2).logps, tokens.logps, atol=1e-4, rtol=1e-4)


def test_full_vocabulary_heads_leave_shortlists_too(setting, tmp_path):
    path, backbone = setting
    recipe = load_recipe(path, ["head.shortlist_size=all"])
    store = write_rollouts(recipe, tmp_path / "store", 1, backbone=backbone)
    assert store.shortlist_size == 128
    tokens = store.tokens(rows=range(len(store)))
    assert tokens.shortlist.ids.shape == (store.num_tokens, 128)
    torch.testing.assert_close(tokens.logps, tokens.base_logps, atol=1e-4, rtol=1e-4)


def test_context_states_are_wide(setting, tmp_path):
    from tea_rl.head.context import ContextState

    path, backbone = setting
    recipe = load_recipe(path, ["head.context.layers=[1, -1]"])
    store = write_rollouts(recipe, tmp_path / "store", 1, backbone=backbone)
    assert store.width == 3 * backbone.hidden_size
    tokens, prompt = store.tokens(rows=[4]), store.prompt_ids(4)
    ids = torch.tensor([prompt + tokens.actions.tolist()])
    wide = backbone.forward(ids, context=ContextState.begin(recipe.head.context))[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(tokens.states, wide, atol=1e-4, rtol=1e-4)


def test_a_stopped_rollout_continues_to_the_same_bytes(setting, tmp_path, monkeypatch):
    path, backbone = setting
    recipe = load_recipe(path)

    def run(name):
        return write_rollouts(recipe, tmp_path / name, 6, backbone=backbone, shard_tokens=100)

    run("whole")
    append, calls = StoreWriter.append, []

    def stopping(self, rows, tokens):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise Stop
        append(self, rows, tokens)

    monkeypatch.setattr(StoreWriter, "append", stopping)
    for _ in range(20):
        try:
            run("stopped")
            break
        except Stop:
            continue
    assert len(calls) > 7
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_mistakes(setting, noisy_head, tmp_path):
    path, backbone = setting
    recipe = load_recipe(path)
    write_rollouts(recipe, tmp_path / "store", 1, backbone=backbone)
    with pytest.raises(TeaError, match="complete store of 1 steps, got 2"):
        write_rollouts(recipe, tmp_path / "store", 2, backbone=backbone)
    with pytest.raises(TeaError, match="made otherwise: the digest of data and settings"):
        write_rollouts(recipe, tmp_path / "store", 1, head=noisy_head, backbone=backbone)
    offline = load_recipe(path, ["data={dataset: x.jsonl}"])
    with pytest.raises(TeaError, match="needs data.prompts"):
        write_rollouts(offline, tmp_path / "none", backbone=backbone)
    assert not (tmp_path / "none").exists()
    assert len(StateStore.open(tmp_path / "store")) == 12


def test_mending_keeps_the_rewards_of_relabel_and_the_number_of_steps(setting, tmp_path):
    path, backbone = setting
    recipe = load_recipe(path)
    run = partial(write_rollouts, recipe, tmp_path / "store", backbone=backbone, shard_tokens=40)
    run(2)
    rewards = relabel(tmp_path / "store", [RewardSpec(name="sentiment", weight=-3.0)]).rewards
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.jsonl").unlink()
    for steps in (1, 3):
        with pytest.raises(TeaError, match=f"complete store of 2 steps, got {steps}; give --steps 2"):
            run(steps)
    assert np.array_equal(run(2).rewards, rewards)
    assert contents(tmp_path / "store") == before
