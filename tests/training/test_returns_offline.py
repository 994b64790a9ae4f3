"""Return conditioning trained offline: what is asked decides what is said, and only where the recipe says so."""

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.evaluation.offline import row_figures
from tea_rl.states.browse import load_head_for
from tea_rl.states.embed import embed
from tea_rl.states.reward_file import write_rewards
from tea_rl.states.store import StateStore
from tea_rl.training.batches import ReturnPlan
from tea_rl.training.offline_data import OfflineData
from tea_rl.training.offline_learner import OfflineLearner
from tea_rl.training.seeding import seed_step
from tea_rl.training.sweep import sweep

#: Each prompt is answered in three ways; the return alone says which.
ANSWERS = {0.0: " xyzzy", 0.5: " mnopm", 1.0: " abcab"}
#: What nobody rated.
REMARK, NOTHING = " quite", np.nan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def labelled():
    for i in range(36):
        reward = (i // 12) / 2
        yield {"prompt": f"question {i % 12}:", "completion": ANSWERS[reward], "reward": reward}
    for i in range(4):
        yield {"prompt": f"remark {i}:", "completion": REMARK, "reward": 7.0}


def settings(model, **changes):
    base = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [32], "shortlist_size": 300, "return_conditioning": True},
        "objective": {"name": "cross_entropy", "minibatch_tokens": 64},
        "train": {
            "learning_rate": 1e-2, "warmup_steps": 1, "max_steps": 60, "save_steps": 10, "eval_steps": 20, "num_threads": 1,
        },
    }  # fmt: skip
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value}
    return base


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    (folder / "text.txt").write_text("".join(f"Ordinary line {i} of a text.\n" for i in range(24)))
    raw = settings(
        model, data={"dataset": str(folder / "rows.jsonl")}, anchor={"dataset": str(folder / "text.txt")}
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    made = embed(load_recipe(str(folder / "recipe.yaml")), folder / "store")
    rewards = np.where(made.rewards == 7, np.float32(np.nan), made.rewards)
    write_rewards(made.path, made.manifest, rewards, {})
    made.manifest.write(made.path)
    return StateStore.open(made.path)


@pytest.fixture
def recipe(model, store, tmp_path):
    def make(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(settings(model, **{"data": {"store": str(store.path)}, **changes})))
        return load_recipe(str(path))

    return make


def evaluations(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval_loss" in row]


def held_out_logps(store, head, recipe, asked):
    """Mean log-probability (nats a token) of the held-out answers of each return, by what is asked."""
    _, rows = OfflineData(store, recipe).table.split(recipe.data)
    found = row_figures([head], store, rows, np.full(len(rows), asked))[0]
    return {value: (found.logps / found.tokens)[found.rewards == value].mean() for value in ANSWERS}


@pytest.mark.parametrize("size", [300, "all", "auto"])
def test_what_is_asked_decides_what_is_said(recipe, store, tmp_path, size):
    found = recipe(head={"shortlist_size": size})
    train(found, tmp_path / "run")
    head = load_head_for(store, tmp_path / "run" / "head")
    for asked in ANSWERS:
        logps = held_out_logps(store, head, found, asked)
        others = [value for other, value in logps.items() if other != asked]
        assert logps[asked] > -1.0 and logps[asked] > max(others) + 0.5, (asked, logps)
    assert evaluations(tmp_path / "run")[0]["eval_return_gain"] == 0
    assert evaluations(tmp_path / "run")[-1]["eval_return_gain"] > 0.1
    modulation = head.members.modulation
    assert (float(modulation.low), float(modulation.high)) == (0.0, 1.0)


def test_without_conditioning_it_decides_nothing(recipe, store, tmp_path):
    """The same run and the same questions: what the test above finds comes from the conditioning."""
    found = recipe(head={"return_conditioning": False})
    train(found, tmp_path / "run")
    head = load_head_for(store, tmp_path / "run" / "head")
    one, other = (held_out_logps(store, head, found, asked) for asked in (0.0, 1.0))
    assert one == other and max(one.values()) < -0.1
    assert "eval_return_gain" not in evaluations(tmp_path / "run")[-1]


def test_rows_with_a_hidden_return_teach_the_objective(recipe, store, tmp_path):
    """With awr the policy that is asked for nothing improves, and the one that is asked for little still gives little."""
    found = recipe(objective={"name": "awr", "beta": 0.2}, train={"return_dropout": 0.5})
    train(found, tmp_path / "run")
    head = load_head_for(store, tmp_path / "run" / "head")
    unasked, little = (held_out_logps(store, head, found, asked) for asked in (NOTHING, 0.0))
    assert unasked[1.0] > unasked[0.0] + 1.0, unasked
    assert little[0.0] > little[1.0] + 1.0, little


def test_returns_come_from_the_training_rows_alone(recipe, store):
    data = OfflineData(store, recipe())
    assert len(data.eval_rows) and np.isnan(store.rewards[data.train_rows]).any()
    head = store.make_head(recipe().head)
    store.rewards, before = store.rewards.copy(), store.rewards
    try:
        store.rewards[data.eval_rows] = 1000.0
        OfflineData(store, recipe()).fit_returns(head)
    finally:
        store.rewards = before
    known = store.rewards[data.train_rows]
    known = known[~np.isnan(known)].astype(np.float64)
    modulation = head.members.modulation
    assert float(modulation.mean) == pytest.approx(known.mean()) and float(modulation.high) == 1.0
    assert float(modulation.std) == pytest.approx(known.std())


def test_every_token_is_shown_the_reward_of_its_row(recipe, store):
    data = OfflineData(store, recipe(train={"return_dropout": 0.0, "token_dropout": 0.3}))
    for step in (1, 2, 3):
        batch = data.batch(step, seed_step(0, step))
        expected = store.rewards[batch.row_numbers][batch.tokens.rows.numpy()]
        np.testing.assert_array_equal(batch.returns.numpy(), expected)


def test_a_share_of_the_rows_is_hidden_and_ordinary_text_is_shown_their_returns():
    known = np.where(np.arange(4000) % 10, np.arange(4000), np.nan)
    rows = np.arange(4000)
    plan = ReturnPlan(known, 0.25, seed=3)
    returns = plan(7, rows, np.repeat(rows, 2), 1000)
    shown, anchor = returns[:8000].reshape(-1, 2), returns[8000:]
    np.testing.assert_array_equal(shown[:, 0], shown[:, 1])  # a row is hidden as a whole
    seen = ~np.isnan(shown[:, 0])
    np.testing.assert_array_equal(shown[seen, 0], known[seen])
    assert seen[rows % 10 != 0].mean() == pytest.approx(0.75, abs=0.03) and not seen[rows % 10 == 0].any()
    assert set(anchor[~np.isnan(anchor)]) <= set(shown[seen, 0]) and 0.2 < np.isnan(anchor).mean() < 0.45
    np.testing.assert_array_equal(plan(7, rows, np.repeat(rows, 2), 1000), returns)
    assert not np.array_equal(np.isnan(plan(8, rows, rows, 0)), ~seen)


def test_ordinary_text_is_held_to_the_original_model_at_any_return(recipe, store, tmp_path):
    text = {"dataset": str(store.path.parent / "text.txt"), "conservativity": 2.0}
    anchored = recipe(anchor=text)
    data = OfflineData(store, anchored, StateStore.open(store.path / "anchor"))
    batch = data.batch(1, seed_step(0, 1))
    assert batch.num_anchor and (~batch.returns[-batch.num_anchor :].isnan()).any()
    held = train(anchored, tmp_path / "anchored").evaluation.metrics
    free = train(recipe(anchor={"conservativity": 0.0}), tmp_path / "free")
    head = load_head_for(store, free.path / "head")
    assert 0 < held["eval_anchor_kl"] < data.anchor_metrics(head)["eval_anchor_kl"] / 3


def test_evaluation_asks_each_row_for_its_own_return(recipe, store, tmp_path):
    train(recipe(), tmp_path / "run")
    head = load_head_for(store, tmp_path / "run" / "head")
    rows = np.arange(len(store))
    own = row_figures([head], store, rows)[0]
    for value in (*ANSWERS, NOTHING):
        mine = np.isnan(own.rewards) if np.isnan(value) else own.rewards == value
        asked = row_figures([head], store, rows, np.full(len(rows), value))[0]
        np.testing.assert_allclose(own.logps[mine], asked.logps[mine], atol=1e-4)
        assert np.abs(own.logps[~mine] - asked.logps[~mine]).max() > 1


@pytest.mark.parametrize("size", [300, "auto"])
def test_resume_is_exact(recipe, tmp_path, size):
    found = recipe(
        head={"dropout": 0.2, "shortlist_size": size},
        train={"token_dropout": 0.2, "state_noise": 0.1, "max_steps": 24},
    )
    train(found, tmp_path / "whole")
    asked = iter(range(100))
    assert train(found, tmp_path / "parts", should_stop=lambda: next(asked) == 13).step == 13
    train(found, tmp_path / "parts", resume=True)
    digests = {
        hashlib.sha256((tmp_path / name / "head" / "tea_head.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "parts")
    }
    assert len(digests) == 1
    with pytest.raises(TeaError, match=r"train\.return_dropout \(0\.2 then, 0\.3 now\)"):
        train(
            recipe(head={"dropout": 0.2, "shortlist_size": size}, train={**found.train.model_dump(), "return_dropout": 0.3}),
            tmp_path / "parts",
            resume=True,
        )  # fmt: skip


def test_a_head_without_conditioning_ignores_the_option(recipe, tmp_path):
    for share in (0.0, 0.9):
        train(
            recipe(head={"return_conditioning": False}, train={"max_steps": 5, "return_dropout": share}),
            tmp_path / str(share),
        )
    weights = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("0.0", "0.9")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "grpo"}}, "objective.name must be one of cross_entropy.*got grpo"),
        ({"objective": {"name": "reinforce"}}, "got reinforce"),
        ({"train": {"return_dropout": 1.0}}, "return_dropout: expected a number of at least 0 and below 1"),
    ],
)
def test_what_cannot_be_learnt_is_one_line(recipe, tmp_path, changes, message):
    with pytest.raises(TeaError, match=message) as caught:
        train(recipe(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rewards", "message"), [((None, None), "no reward"), ((2.0, 2.0), "the reward 2 only")]
)
def test_rows_that_say_nothing_of_returns_are_refused_before_the_model_reads_them(
    model, tmp_path, monkeypatch, rewards, message
):
    monkeypatch.setattr("tea_rl.states.embed.load_backbone", None)
    rows = [
        {
            "prompt": f"q{i}",
            "completion": "a",
            **({} if rewards[i % 2] is None else {"reward": rewards[i % 2]}),
        }
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(settings(model, data={"dataset": str(tmp_path / "rows.jsonl")}))
    )
    with pytest.raises(TeaError, match=f"head.return_conditioning needs rewards that differ.*{message}"):
        train(str(tmp_path / "tiny.yaml"), tmp_path / "run")


def test_heads_of_a_sweep_are_conditioned_as_they_would_be_alone(recipe, store, tmp_path):
    grid = {"head.return_conditioning": [False, True], "head.shortlist_size": [300, "all"]}
    short = {"max_steps": 8, "eval_steps": 8}
    results = sweep(store, recipe(train=short), grid, tmp_path / "sweep")
    for result in results:
        assert result.problem is None
        overrides = {key.removeprefix("head."): value for key, value in result.settings.items()}
        alone = train(recipe(head=overrides, train=short), tmp_path / str(result.number))
        assert alone.evaluation.metrics == pytest.approx(result.metrics, rel=1e-2, abs=1e-2)
        assert ("eval_return_gain" in result.metrics) == result.settings["head.return_conditioning"]


def test_an_inspected_head_keeps_the_return_it_was_saved_with(recipe, store, tmp_path):
    train(recipe(train={"max_steps": 2}), tmp_path / "run")
    head = load_head_for(store, tmp_path / "run" / "head")
    assert head.asked_return is None
    head.set_return(0.5)
    head.save_pretrained(tmp_path / "asked")
    assert load_head_for(store, tmp_path / "asked").asked_return == 0.5


def test_the_learner_reads_returns_only_for_a_conditioned_head(recipe, store):
    found = recipe()
    data = OfflineData(store, found)
    losses = {}
    for on in (False, True):
        head = store.make_head(found.head.model_copy(update={"return_conditioning": on}))
        with torch.no_grad():
            for parameter in head.trainable_parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05
                )
        learner = OfflineLearner(head, found.objective, found.anchor, found.train, 1.0, 10)
        for shift in (0.0, 3.0):
            batch = data.batch(1, seed_step(0, 1))
            batch.returns = batch.returns + shift
            returns = batch.returns if on else None
            terms = head.terms(batch.tokens, 1.0, found.anchor.divergence, returns)
            losses[on, shift] = learner.loss(batch, terms).item()
    assert losses[False, 0.0] == losses[False, 3.0] and losses[True, 0.0] != losses[True, 3.0]
