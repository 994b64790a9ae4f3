"""Sweeps: every head ends where it would have ended alone, and mistakes are one line."""

import json
import math

import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import HeadConfig, TeaHead, load_recipe
from tea_rl.cli.sweep import parse_grid
from tea_rl.errors import TeaError
from tea_rl.head.shared import shared_corrections
from tea_rl.states.embed import embed
from tea_rl.training.online import train
from tea_rl.training.progress import Listener
from tea_rl.training.sweep import sweep

ROWS = [
    {"prompt": f"question {i % 12}:", "completion": " abcab" if i < 12 else " xyzzy", "reward": 1.0 if i < 12 else -1.0}
    for i in range(24)
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store and the path of a recipe that learns from it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    raw = {
        "model": {"name_or_path": str(save_tiny("llama", folder)), "dtype": "float32"},
        "head": {"hidden_sizes": [32], "shortlist_size": 48},
        "data": {"dataset": "rows.jsonl"},
        "objective": {"name": "reward_weighted", "minibatch_tokens": 32},
        "train": {
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "max_steps": 12,
            "eval_steps": 12,
            "num_threads": 1,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return embed(load_recipe(str(path)), folder / "store"), path


GRID = {"head.num_members": [1, 4], "train.learning_rate": [1e-3, 1e-2]}


def test_every_head_ends_as_it_would_alone(made, tmp_path):
    store, path = made
    results = sweep(store, load_recipe(str(path)), GRID, tmp_path / "sweep")
    assert sorted(result.number for result in results) == [1, 2, 3, 4]
    values = [result.value for result in results]
    assert values == sorted(values, reverse=True) and results[0].metric == "eval_reward_correlation"
    assert all(result.low <= result.high for result in results)
    for result in results:
        overrides = [f"{key}={value}" for key, value in result.settings.items()]
        sources = ["data.dataset=null", f"data.store={store.path}"]
        alone = train(load_recipe(str(path), [*sources, *overrides]), tmp_path / str(result.number))
        assert alone.evaluation.metrics == pytest.approx(result.metrics, rel=1e-3, abs=1e-3)
    saved = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [entry["number"] for entry in saved] == [result.number for result in results]
    assert sorted(item.name for item in (tmp_path / "sweep" / "heads").iterdir()) == ["1", "2", "3", "4"]
    assert (tmp_path / "sweep" / "heads" / "1" / "tea_config.json").is_file()


def test_heads_of_other_kinds_take_part(made, tmp_path):
    store, path = made
    grid = {"head.shortlist_size": [48, "all", "auto"], "head.readout": ["tied", "vocab"]}
    results = sweep(store, load_recipe(str(path)), grid, tmp_path / "sweep")
    assert len(results) == 6 and all(result.problem is None for result in results)
    assert all(result.metrics["eval_kl"] > 0 for result in results)


def test_a_head_that_diverges_is_left_behind(made, tmp_path):
    store, path = made
    recipe = load_recipe(
        str(path), ["train.optim=sgd", "train.max_grad_norm=1e30", "anchor.conservativity=0"]
    )
    alone = sweep(store, recipe, {"train.learning_rate": [1e-3]}, tmp_path / "alone")[0]
    good, bad = sweep(store, recipe, {"train.learning_rate": [1e30, 1e-3]}, tmp_path / "sweep")
    assert bad.number == 1 and "diverged" in bad.problem and bad.path is None and math.isnan(bad.value)
    assert good.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-4)
    assert [item.name for item in (tmp_path / "sweep" / "heads").iterdir()] == ["2"]


def test_a_stop_still_saves(made, tmp_path):
    store, path = made
    results = sweep(store, load_recipe(str(path)), GRID, tmp_path / "sweep", should_stop=lambda: True)
    assert len(results) == 4 and (tmp_path / "sweep" / "results.json").is_file()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"train.max_steps": [1, 2]}, "--grid train.max_steps"),
        ({"data.eval_fraction": [0.1]}, "--grid data.eval_fraction"),
        ({"train.learnin_rate": [0.1]}, "learning_rate"),
        ({"head.num_members": [1, "many"]}, "num_members"),
        ({"head.shortlist_size": [48, 24]}, "shortlist_size"),
        ({"head.num_members": []}, "expected values"),
        ({"head.num_members": [1, "many"]}, "^--grid head.num_members="),
        ({"head.num_members": [4, 1, 4]}, "head.num_members: expected values that differ, got 4 twice"),
        (
            {"head.num_members": [1, 4], "train.learning_rate": ["1e-4", 1e-4]},
            "train.learning_rate: .* twice",
        ),
        ({"train.eval_steps": [1, 2]}, "would not differ"),
        ({"objective.target_kl": [0.1, 0.2]}, "would not differ"),
    ],
)
def test_bad_grids_are_one_line(made, tmp_path, grid, message):
    store, path = made
    with pytest.raises(TeaError, match=message) as caught:
        sweep(store, load_recipe(str(path)), grid, tmp_path / "sweep")
    assert "\n" not in str(caught.value) and not (tmp_path / "sweep").exists()


def test_an_occupied_folder_is_left_alone(made, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TeaError, match="new or empty"):
        sweep(made[0], load_recipe(str(made[1])), GRID, tmp_path)


def test_grids_are_read_as_yaml():
    found = parse_grid(
        ["head.num_members=1, 4", "head.hidden_sizes=[64],[64, 32]", "train.learning_rate=1e-4,3e-4"]
    )
    assert found["head.num_members"] == [1, 4] and found["head.hidden_sizes"] == [[64], [64, 32]]
    assert [float(value) for value in found["train.learning_rate"]] == [1e-4, 3e-4]
    for wrong in ("head.num_members", "=1", "head.num_members="):
        with pytest.raises(TeaError, match="KEY=A,B"):
            parse_grid([wrong])
    with pytest.raises(TeaError, match="given twice"):
        parse_grid(["a.b=1", "a.b=2"])


def test_shared_corrections_and_gradients_equal_those_of_each_head():
    torch.manual_seed(0)
    reference = torch.nn.Linear(16, 90)
    configs = [HeadConfig(hidden_sizes=[8], shortlist_size=12, num_members=n) for n in (1, 3)]
    configs.append(HeadConfig(hidden_sizes=[8], shortlist_size=12, readout="vocab"))
    heads = [TeaHead(reference, config, logit_scale=0.5) for config in configs]
    for head in heads:
        for parameter in head.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(70, 16)
    ids = torch.stack([torch.randperm(90)[:12] for _ in range(70)])
    weights = torch.randn(70, 12)

    def gradients(pairs):
        loss = sum((weights * delta).sum() + shift.sum() for delta, shift in pairs)
        return torch.autograd.grad(loss, [p for h in heads for p in h.trainable_parameters()])

    together = shared_corrections(heads, states, ids)
    alone = [head.shortlist_correction(states, ids) for head in heads]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_misspelt_metric_is_refused_before_the_work(made, tmp_path):
    store, path = made
    found = load_recipe(str(path), ["train.metric_for_best_model=eval_los"])
    with pytest.raises(TeaError, match='Did you mean "eval_loss"'):
        sweep(store, found, {"train.learning_rate": [1e-3]}, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_trust_region_that_is_not_looked_at_is_said(made, tmp_path):
    store, path = made
    notes = []
    listener = Listener()
    listener.on_note = notes.append
    found = load_recipe(str(path), ["objective.name=reinforce", "objective.target_kl=0.1"])
    sweep(store, found, {"head.num_members": [1]}, tmp_path / "sweep", listener)
    assert any("target_kl 0.1 is not looked at" in text for text in notes)


def test_a_metric_that_the_rows_cannot_give_is_refused_before_the_work(made, tmp_path):
    store, path = made
    found = load_recipe(str(path), ["train.metric_for_best_model=eval_pair_accuracy"])
    with pytest.raises(TeaError, match="needs whole preference pairs"):
        sweep(store, found, {"train.learning_rate": [1e-3]}, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
