"""Ordinary text that the policy is held to the original model on while it learns from rows."""

import json

import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.states.embed import embed
from tea_rl.states.manifest import ANCHOR_NAME
from tea_rl.states.store import StateStore
from tea_rl.training.offline_data import HELD_OUT_EVERY, OfflineData
from tea_rl.training.offline_learner import OfflineLearner
from tea_rl.training.sweep import sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"question {i % 12}:", "completion": " abcab", "reward": 1.0 - i % 2})
            + "\n"
            for i in range(24)
        )
    )
    (tmp_path / "text.txt").write_text("".join(f"Ordinary line {i} of a text.\n" for i in range(24)))

    def make(objective="cross_entropy", conservativity=1.0, **anchor):
        settings = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "head": {"hidden_sizes": [32], "shortlist_size": 48},
            "data": {"dataset": str(tmp_path / "rows.jsonl")},
            "objective": {"name": objective, "minibatch_tokens": 32},
            "anchor": {"dataset": str(tmp_path / "text.txt"), "conservativity": conservativity, **anchor},
            "train": {
                "learning_rate": 3e-3,
                "warmup_steps": 1,
                "max_steps": 40,
                "eval_steps": 40,
                "save_steps": 10,
                "num_threads": 1,
            },
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_recipe(str(path))

    return make


def last_evaluation(result):
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row][-1]


def test_the_text_stays_as_it_was_while_the_rows_are_learnt(recipe, tmp_path):
    loose = last_evaluation(train(recipe(conservativity=1e-6), tmp_path / "loose"))
    held = last_evaluation(train(recipe(conservativity=2.0), tmp_path / "held"))
    assert held["eval_loss"] < held["eval_base_loss"] - 1.0  # it learns
    assert 0 < held["eval_anchor_kl"] < 0.2 * loose["eval_anchor_kl"]


@pytest.mark.parametrize("objective", ["cross_entropy", "reward_weighted"])
def test_the_loss_takes_the_anchor_from_the_text_and_the_entropy_from_the_rows(recipe, tmp_path, objective):
    settings = recipe(objective, conservativity=3.0, minibatch_tokens=20)
    settings.objective.entropy_coef = 0.2
    store = embed(settings, tmp_path / "store")
    data = OfflineData(store, settings, StateStore.open(store.path / ANCHOR_NAME))
    batch = data.batch(1, torch.Generator().manual_seed(0))
    assert 0 < batch.num_anchor < len(batch)
    head = store.make_head(settings.head)
    torch.nn.init.normal_(head.members.readout, std=0.1)
    learner = OfflineLearner(
        head, settings.objective, settings.anchor, settings.train, store.temperature, data.total_steps
    )
    terms = head.eval().terms(batch.tokens)
    alone = OfflineData(store, settings).batch(1, torch.Generator().manual_seed(0))
    learner.anchor = settings.anchor.model_copy(update={"conservativity": 0.0})
    learner.objective = settings.objective.model_copy(update={"entropy_coef": 0.0})
    own = head.terms(alone.tokens)
    task = learner.loss(alone, own) - 0.2 * own.entropy.mean()
    learner.anchor, learner.objective = settings.anchor, settings.objective
    expected = (task + 3.0 * terms.anchor[-batch.num_anchor :].mean()) / 4.0
    assert torch.allclose(learner.loss(batch, terms), expected, atol=1e-6)


def test_held_out_text_is_never_trained_on(recipe, tmp_path):
    settings = recipe(minibatch_tokens=10)
    store = embed(settings, tmp_path / "store")
    anchor = OfflineData(store, settings, StateStore.open(store.path / ANCHOR_NAME)).anchor
    rows = {row for step in range(1, 200) for row in anchor.tokens(step).rows.tolist()}
    assert len(anchor.eval_rows) == 24 // HELD_OUT_EVERY
    assert rows == set(range(24)) - set(anchor.eval_rows.tolist())


def test_resume_is_exact(recipe, tmp_path):
    settings = recipe()
    whole = train(settings, tmp_path / "whole")
    calls = iter([False] * 12 + [True] * 100)
    train(settings, tmp_path / "parts", should_stop=lambda: next(calls))
    parts = train(settings, tmp_path / "parts", resume=True)
    weights = [(run.path / "head" / "tea_head.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


def test_a_sweep_reads_it_too(recipe, tmp_path):
    store = embed(recipe(), tmp_path / "store")
    grid = {"anchor.conservativity": [1e-6, 2.0]}
    results = sweep(store, recipe(), grid, tmp_path / "sweep")
    kls = {result.settings["anchor.conservativity"]: result.metrics["eval_anchor_kl"] for result in results}
    assert kls[2.0] < 0.2 * kls[1e-6]


def test_a_store_without_the_text_is_refused(recipe, tmp_path):
    plain = recipe()
    plain.anchor.dataset = None
    store = embed(plain, tmp_path / "store")
    settings = recipe()
    settings.data.dataset, settings.data.store = None, str(store.path)
    with pytest.raises(TeaError, match="holds no states of it; run tea-rl embed"):
        train(settings, tmp_path / "run")
    # The same command adds what is missing and leaves the rest alone.
    before = (store.path / "manifest.json").read_bytes()
    embed(recipe(), store.path)
    assert (store.path / "manifest.json").read_bytes() == before
    settings.train.max_steps = 2
    assert train(settings, tmp_path / "run2").step == 2


def test_settings_that_contradict_each_other(recipe):
    with pytest.raises(TeaError, match="conservativity above 0"):
        recipe(conservativity=0.0)
    with pytest.raises(TeaError, match=r"anchor\.dataset is text"):
        load_recipe("quickstart", ["anchor.dataset=text.txt"])
