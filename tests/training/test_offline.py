"""Offline runs on a tiny model: every objective learns, memory of the data is exact, bad input is one line."""

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.states.embed import embed
from tea_rl.training.batches import RowPlan, TokenPlan
from tea_rl.training.progress import Listener

GOOD, BAD = " abcab", " xyzzy"


def labelled(kind):
    """Rows of one kind: good and bad answers to a few questions."""
    for i in range(24):
        prompt = f"question {i % 12}:"
        if kind == "pairs":
            yield {"prompt": prompt, "chosen": GOOD, "rejected": BAD}
        elif kind == "labels":
            yield {"prompt": prompt, "completion": GOOD if i < 12 else BAD, "label": i < 12}
        else:
            yield {"prompt": prompt, "completion": GOOD if i < 12 else BAD, "reward": 1.0 if i < 12 else -1.0}


KINDS = {"dpo": "pairs", "ipo": "pairs", "kto": "labels"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def settings(model, **changes):
    base = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [32], "shortlist_size": 48},
        "objective": {"name": "reward_weighted", "minibatch_tokens": 32},
        "train": {
            "learning_rate": 3e-3, "warmup_steps": 1, "max_steps": 40, "save_steps": 10, "eval_steps": 20, "num_threads": 1,
        },
    }  # fmt: skip
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value}
    return base


@pytest.fixture(scope="module")
def stores(model, tmp_path_factory):
    """A store of each kind of rows."""
    folder = tmp_path_factory.mktemp("stores")
    for kind in ("rewards", "labels", "pairs"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(kind)))
        raw = settings(model, data={"dataset": str(folder / f"{kind}.jsonl")})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
        embed(load_recipe(str(folder / "recipe.yaml")), folder / kind)
    return folder


@pytest.fixture
def recipe(model, stores, tmp_path):
    def make(store="rewards", **changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump(settings(model, **{"data": {"store": str(stores / store)}, **changes}))
        )
        return load_recipe(str(path))

    return make


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def evaluations(path):
    return [row for row in rows(path) if "eval_loss" in row]


def head_digest(path):
    return hashlib.sha256((path / "head" / "tea_head.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "objective",
    ["cross_entropy", "reward_weighted", "awr", "dpo", "ipo", "kto", "grpo", "rloo", "reinforce", "ppo"],
)
def test_every_objective_learns(recipe, tmp_path, objective):
    found = recipe(
        KINDS.get(objective, "rewards"),
        objective={"name": objective, "target_kl": None, "minibatch_tokens": 64},
    )
    result = train(found, tmp_path / "run")
    first, last = evaluations(tmp_path / "run")[0], evaluations(tmp_path / "run")[-1]
    assert result.step == 40 and not result.stopped
    assert first["eval_loss"] == pytest.approx(first["eval_base_loss"], abs=1e-4)
    assert first["eval_kl"] == pytest.approx(0, abs=1e-6) and last["eval_kl"] > 0
    assert last["eval_base_loss"] == first["eval_base_loss"]
    if objective == "cross_entropy":  # good and bad rows alike
        assert last["eval_loss"] < first["eval_loss"] - 0.3
    elif objective in ("dpo", "ipo"):
        assert first["eval_pair_accuracy"] == 0.5 and last["eval_pair_accuracy"] > 0.9
    elif objective != "kto":
        assert first["eval_reward_correlation"] == 0 and last["eval_reward_correlation"] > 0.8
    else:
        assert last["eval_loss"] < first["eval_loss"] - 0.1  # over the good rows
    assert result.evaluation.metrics == {k: v for k, v in last.items() if k != "step"}
    assert result.base_metrics["eval_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.rendered
def test_the_run_directory_is_complete(recipe, tmp_path):
    train(recipe(), tmp_path / "run")
    names = {
        "recipe.yaml",
        "metrics.jsonl",
        "curves.png",
        "report.html",
        "manifest.json",
        "head",
        "checkpoints",
    }
    assert names <= {item.name for item in (tmp_path / "run").iterdir()}
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    expected = {"epoch", "loss", "kl", "grad_norm", "tokens_per_second", "seconds", "skipped_steps"}
    assert expected <= steps[0].keys() and steps[-1]["epoch"] > 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out" in page and "No held-out evaluation" not in page
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert len(manifest["base_model_digest"]) == 64 and manifest["dtype"] == "float32"


def test_no_backbone_is_loaded_from_a_store(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("tea_rl.backbone.load_backbone", None)
    monkeypatch.setattr("tea_rl.states.embed.load_backbone", None)
    train(recipe(train={"max_steps": 2}), tmp_path / "run")


def test_a_dataset_is_embedded_first_and_the_head_fits_the_model(model, stores, tmp_path):
    from tea_rl import TeaHead, load_backbone

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(model, data={"dataset": str(stores / "rewards.jsonl")})))
    train(str(path), tmp_path / "run")
    assert (tmp_path / "run" / "store" / "manifest.json").is_file()
    backbone = load_backbone(str(model), dtype="float32")
    head = TeaHead.from_pretrained(tmp_path / "run" / "head", backbone)
    states = torch.randn(3, backbone.hidden_size)
    assert not torch.equal(head(states), backbone.reference(states))


@pytest.mark.parametrize("size", ["all", "auto"])
def test_the_whole_vocabulary_learns_from_any_store(recipe, tmp_path, size):
    train(recipe(head={"shortlist_size": size}, objective={"name": "cross_entropy"}), tmp_path / "run")
    first, last = evaluations(tmp_path / "run")[0], evaluations(tmp_path / "run")[-1]
    assert first["eval_loss"] == pytest.approx(first["eval_base_loss"], abs=1e-4)
    assert last["eval_loss"] < first["eval_loss"] - 0.5 and last["eval_accuracy"] > first["eval_accuracy"]


@pytest.mark.parametrize("store", ["rewards", "pairs"])
def test_resume_is_exact(recipe, tmp_path, store):
    """Invariant 7, offline, with everything random switched on and a best head."""
    found = recipe(
        store,
        objective={"name": "reward_weighted" if store == "rewards" else "dpo"},
        head={"dropout": 0.2, "member_dropout": 0.3},
        train={
            "token_dropout": 0.2, "state_noise": 0.1, "short_answer_damping": 8, "eval_steps": 8,
            "metric_for_best_model": "eval_loss",
        },
    )  # fmt: skip
    train(found, tmp_path / "whole")
    asked = iter(range(100))
    stopped = train(found, tmp_path / "parts", should_stop=lambda: next(asked) == 17)
    assert stopped.stopped and stopped.step == 17
    train(found, tmp_path / "parts", resume=True)
    assert head_digest(tmp_path / "whole") == head_digest(tmp_path / "parts")

    def comparable(path):
        return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows(path)]

    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")
    result = train(found, tmp_path / "parts", resume=True)  # nothing left to do
    assert result.step == 40 and head_digest(tmp_path / "whole") == head_digest(tmp_path / "parts")
    assert result.base_metrics == train(found, tmp_path / "again").base_metrics


def test_the_best_head_is_kept_and_patience_ends_the_run(recipe, tmp_path):
    # Rewards are wrong way round for the loss: it only rises, so the original model stays the best.
    found = recipe(
        objective={"name": "cross_entropy"},
        train={"learning_rate": 0.3, "metric_for_best_model": "eval_loss", "early_stopping_patience": 2, "eval_steps": 1},
    )  # fmt: skip
    notes = []
    listener = Listener()
    listener.on_note = notes.append
    result = train(found, tmp_path / "run", listener=listener)
    found_rows = evaluations(tmp_path / "run")
    assert result.step < 40 and not result.stopped and "is kept" in notes[-1]
    assert result.evaluation.metrics["eval_loss"] == min(row["eval_loss"] for row in found_rows)
    best = min(found_rows, key=lambda row: row["eval_loss"])["step"]
    assert best == result.step - 2
    again = train(found, tmp_path / "run", resume=True)
    assert again.step == result.step and again.evaluation.metrics == result.evaluation.metrics


def test_the_trust_region_ends_a_run_on_stored_rollouts(recipe, tmp_path):
    found = recipe(objective={"name": "grpo", "target_kl": 1e-4}, train={"learning_rate": 1e-2})
    result = train(found, tmp_path / "run")
    per_epoch = rows(tmp_path / "run")[-2]["step"] / rows(tmp_path / "run")[-2]["epoch"]
    assert per_epoch < result.step < 40


def test_epochs_decide_the_length(recipe, tmp_path):
    result = train(recipe(train={"num_train_epochs": 1.5}), tmp_path / "run")
    last = [row for row in rows(tmp_path / "run") if "loss" in row][-1]
    assert last["step"] == result.step and last["epoch"] == pytest.approx(1.5, abs=0.15)


def test_a_split_column_decides_what_is_held_out(model, tmp_path):
    from tea_rl.training.offline_rows import RowTable

    data = tmp_path / "rows.jsonl"
    found = [{"prompt": f"q{i}", "completion": GOOD, "split": "train" if i % 3 else "test"} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(settings(model, data={"dataset": str(data)}, objective={"name": "cross_entropy"}))
    )
    recipe = load_recipe(str(path))
    store = embed(recipe, tmp_path / "store")
    train_rows, held_out = RowTable.of_store(store).split(recipe.data)
    assert sorted(store.source_rows[held_out].tolist()) == [0, 3, 6] and len(train_rows) == 6
    data.write_text(json.dumps({"prompt": "q", "completion": GOOD, "split": "dev"}) + "\n")
    with pytest.raises(TeaError, match="split.*'dev'"):
        RowTable.of_store(embed(load_recipe(str(path)), tmp_path / "other")).split(recipe.data)


@pytest.mark.parametrize(
    ("store", "changes", "message"),
    [
        ("rewards", {"objective": {"name": "dpo"}}, "preference pairs"),
        ("rewards", {"objective": {"name": "kto"}}, "label"),
        ("pairs", {"objective": {"name": "awr"}}, "rewards"),
        ("rewards", {"rollout": {"temperature": 0.5}}, "temperature"),
        ("rewards", {"head": {"shortlist_size": 12}}, "shortlist_size"),
        ("rewards", {"train": {"early_stopping_patience": 2}}, "metric_for_best_model"),
        ("rewards", {"train": {"metric_for_best_model": "eval_los"}}, 'Did you mean "eval_loss"'),
        ("rewards", {"data": {"store": "nowhere"}}, "nowhere"),
    ],
)
def test_bad_recipes_are_one_line(recipe, tmp_path, store, changes, message):
    with pytest.raises(TeaError, match=message) as caught:
        train(recipe(store, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_equal_rewards_teach_nothing(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": GOOD, "reward": 0.5}) + "\n" for i in range(8))
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(model, data={"dataset": str(data)})))
    with pytest.raises(TeaError, match="nothing to learn: all .* reward 0.5"):
        train(str(path), tmp_path / "run")
    with pytest.raises(TeaError, match="preference pairs"):
        train(load_recipe(str(path), ["objective.name=dpo"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # found before anything was embedded
    store = embed(load_recipe(str(path)), tmp_path / "store")
    stored = load_recipe(str(path), ["data.dataset=null", f"data.store={store.path}"])
    with pytest.raises(TeaError, match="nothing to learn: all .* reward 0.5"):
        train(stored, tmp_path / "run")


def offsets(lengths):
    return np.cumsum([0, *lengths])


@pytest.mark.parametrize(("minibatch", "window"), [(7, 20), (64, 65536), (1000, 10)])
def test_every_token_once_an_epoch(monkeypatch, minibatch, window):
    monkeypatch.setattr("tea_rl.training.batches.WINDOW_TOKENS", window)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 50)
    chosen = np.sort(rng.choice(50, 30, replace=False))
    plan = TokenPlan(offsets(lengths), chosen, minibatch, seed=3)
    expected = np.concatenate([np.arange(offsets(lengths)[r], offsets(lengths)[r + 1]) for r in chosen])
    epochs = [
        [plan(epoch * plan.steps_per_epoch + i + 1) for i in range(plan.steps_per_epoch)]
        for epoch in range(2)
    ]
    for parts in epochs:
        assert np.array_equal(np.sort(np.concatenate(parts)), expected)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if plan.steps_per_epoch > 1:
        assert not np.array_equal(epochs[0][0], epochs[1][0])
    again = TokenPlan(offsets(lengths), chosen, minibatch, seed=3)
    last = 2 * plan.steps_per_epoch  # out of the blue, as on resume
    assert np.array_equal(again(last), epochs[1][-1])


def test_pairs_stay_together_once_an_epoch():
    units = np.arange(20).reshape(10, 2)[::-1]
    plan = RowPlan(offsets([3] * 20), units, minibatch_tokens=16, seed=0)
    parts = [plan(i + 1) for i in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(20))
    assert all((part[::2] + 1 == part[1::2]).all() for part in parts)


def test_rewards_of_the_recipe_replace_those_of_the_store(recipe, tmp_path):
    opposite = tmp_path / "opposite.py"
    opposite.write_text(
        "def f(prompts, completions, **columns):\n    return [1.0 if 'x' in c else -1.0 for c in completions]\n"
    )
    train(recipe(), tmp_path / "stored")
    found = recipe()
    turned = found.model_copy(update={"rewards": load_recipe("quickstart").rewards[:1]})
    turned.rewards[0].name = f"{opposite}:f"
    train(turned, tmp_path / "turned")
    stored, other = (
        evaluations(tmp_path / name)[-1]["eval_reward_correlation"] for name in ("stored", "turned")
    )
    assert stored > 0.8 and other > 0.8  # each with its own rewards, which are opposite
    assert head_digest(tmp_path / "stored") != head_digest(tmp_path / "turned")


def test_a_run_that_ended_while_embedding_is_continued_with_the_data_as_it_is_now(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled("rewards")))
    raw = settings(model, data={"dataset": str(data)}, train={"max_steps": 2})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    found = load_recipe(str(tmp_path / "r.yaml"))
    run = tmp_path / "run"
    embed(found, run / "store")  # all that a killed run had done,
    (run / "run.lock").touch()  # beside its lock
    with pytest.raises(TeaError, match="--resume"):
        train(found, run)
    data.write_text("".join(json.dumps(row) + "\n" for row in list(labelled("rewards"))[1:]))
    with pytest.raises(TeaError, match="store"):  # never the old rows in silence
        train(found, run, resume=True)


def test_one_row_with_a_split_makes_the_column_count(model, tmp_path):
    lines = [{**row, "split": "test" if i % 3 == 0 else "train"} for i, row in enumerate(labelled("rewards"))]
    del lines[0]["split"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    raw = settings(model, data={"dataset": str(tmp_path / "rows.jsonl")})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(TeaError, match='column "split" must be one of'):
        train(load_recipe(str(tmp_path / "r.yaml")), tmp_path / "run")
