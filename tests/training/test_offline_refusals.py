"""Offline training: what does not fit is said in one line before any work, and figures are what they say."""

import json

import numpy as np
import pytest
import torch
import yaml
from tiny import save_tiny

from tea_rl import HeadConfig, load_recipe, train
from tea_rl.cli import main
from tea_rl.errors import TeaError
from tea_rl.evaluation.offline import offline_metrics, row_figures
from tea_rl.states.embed import embed
from tea_rl.states.store import StateStore
from tea_rl.training.offline_rows import RowTable
from tea_rl.training.progress import Listener

ROWS = [
    {"prompt": f"question {i % 12}:", "completion": " abcab" if i < 12 else " xyzzy", "reward": 1.0 if i < 12 else -1.0}
    for i in range(24)
]  # fmt: skip
PAIRS = [{"prompt": f"question {i}:", "chosen": " abcab", "rejected": " xyzzy"} for i in range(12)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two data files, a recipe that embeds, and stores of both files."""
    folder = tmp_path_factory.mktemp("made")
    raw = {
        "model": {"name_or_path": str(save_tiny("llama", folder)), "dtype": "float32"},
        "head": {"hidden_sizes": [32], "shortlist_size": 48},
        "data": {"dataset": "rows.jsonl", "template": "Q: {prompt}", "max_length": 100},
        "objective": {"name": "reward_weighted", "minibatch_tokens": 32},
        "train": {
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "max_steps": 4,
            "eval_steps": 2,
            "num_threads": 1,
        },
    }
    write(folder / "rows.jsonl", ROWS)
    write(folder / "pairs.jsonl", PAIRS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    embed(load_recipe(str(folder / "tiny.yaml")), folder / "store")
    embed(
        load_recipe(str(folder / "tiny.yaml"), [f"data.dataset={folder / 'pairs.jsonl'}"]), folder / "pairs"
    )
    return folder


@pytest.fixture
def no_backbone(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr("tea_rl.states.embed.load_backbone", refuse)
    monkeypatch.setattr("tea_rl.backbone.load_backbone", refuse)


def from_store(made, store="store", overrides=()):
    sources = ["data.dataset=null", f"data.store={made / store}"]
    return load_recipe(str(made / "tiny.yaml"), [*sources, *overrides])


class Notes(Listener):
    def __init__(self):
        self.texts = []

    def on_note(self, text):
        self.texts.append(text)


# -- a recipe and the store it learns from ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.template='A: {prompt}'", ["data.template is Q: {prompt} there and A: {prompt} here"]),
        ("data.format=chat", ["data.format is plain there and chat here"]),
        ("data.max_length=50", ["data.max_length is 100 there and 50 here"]),
        ("model.name_or_path=other/model", ["model.name_or_path", "other/model here"]),
        ("rollout.temperature=0.5", ["temperature is 1.0 there and 0.5 here"]),
    ],
)
def test_a_store_made_otherwise_is_refused_by_name(made, tmp_path, no_backbone, override, words):
    overrides = [override, *(["data.template='{prompt}'"] if "format" in override else [])]
    with pytest.raises(TeaError) as caught:
        train(from_store(made, overrides=overrides), tmp_path / "run")
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words)
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_leaves_out_comes_from_the_store(made, tmp_path, no_backbone):
    raw = yaml.safe_load((made / "tiny.yaml").read_text())
    raw["data"], raw["model"] = {"store": str(made / "store")}, {}
    (tmp_path / "silent.yaml").write_text(yaml.safe_dump(raw))
    notes = Notes()
    train(str(tmp_path / "silent.yaml"), tmp_path / "run", listener=notes)
    assert any("data.template 'Q: {prompt}'" in text for text in notes.texts)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["data"]["template"] == "Q: {prompt}" and written["data"]["max_length"] == 100
    assert written["model"]["name_or_path"] == StateStore.open(made / "store").keys["base_model_name_or_path"]
    for recipe in (tmp_path / "silent.yaml", tmp_path / "run" / "recipe.yaml"):  # either resumes it
        assert train(str(recipe), tmp_path / "run", resume=True).step == 4


# -- resuming ---------------------------------------------------------------------------------------------------------


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, args)))
    return int(exit_.value.code or 0)


def test_resume_finds_the_store_of_the_run(made, tmp_path, no_backbone, capsys):
    recipe, run = made / "tiny.yaml", tmp_path / "run"
    assert run_cli("train", recipe, "--store", made / "store", "--output", run) == 0
    assert run_cli("train", recipe, "--output", run, "--resume") == 0
    capsys.readouterr()
    assert run_cli("train", recipe, "--output", run, "--resume", "--set", "train.seed=7") == 2
    error = capsys.readouterr().err.strip()
    assert "train.seed (0 then, 7 now)" in error and len(error.splitlines()) == 1
    # from Python the recipe is taken at its word, but nothing is embedded for it
    with pytest.raises(TeaError, match="data.store"):
        train(str(recipe), run, resume=True)
    assert not (run / "store").exists()


def test_eval_steps_decide_which_head_is_best(made, tmp_path):
    train(from_store(made), tmp_path / "last")
    train(from_store(made, overrides=["train.eval_steps=1"]), tmp_path / "last", resume=True)
    best = "train.metric_for_best_model=eval_loss"
    train(from_store(made, overrides=[best]), tmp_path / "best")
    with pytest.raises(TeaError, match=r"train.eval_steps \(2 then, 1 now\)"):
        train(from_store(made, overrides=[best, "train.eval_steps=1"]), tmp_path / "best", resume=True)


def test_a_run_killed_while_embedding_goes_on_with_nothing_else(made, tmp_path, monkeypatch):
    data = write(tmp_path / "rows.jsonl", ROWS)
    override = f"data.dataset={data}"
    run = tmp_path / "run"

    def killed(recipe, output, listener):
        output.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tea_rl.states.embed.embed", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(str(made / "tiny.yaml"), [override]), run)
    with monkeypatch.context() as patch:
        patch.setattr("tea_rl.states.embed.load_backbone", None)
        other = load_recipe(str(made / "tiny.yaml"), [override, "data.max_length=90"])
        with pytest.raises(TeaError, match=r"data.max_length \(100 then, 90 now\)"):
            train(other, run, resume=True)
        write(data, ROWS[1:])
        with pytest.raises(TeaError, match="the rows of .*rows.jsonl, which have changed"):
            train(load_recipe(str(made / "tiny.yaml"), [override]), run, resume=True)
    write(data, ROWS)
    train(load_recipe(str(made / "tiny.yaml"), [override]), run, resume=True)
    assert (run / "head").is_dir() and not (run / "embedding.json").exists()


# -- rows that cannot be learnt from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (ROWS, ["train.metric_for_best_model=eval_loss", "data.eval_fraction=0"], "needs held-out rows, got none"),
        (ROWS, ["train.metric_for_best_model=eval_pair_accuracy"], "needs whole preference pairs"),
        (ROWS[:12], ["objective.name=cross_entropy", "train.metric_for_best_model=eval_reward_correlation"], "rewards that"),
        ([{**row, "prompt": f"q {i}"} for i, row in enumerate(ROWS)], ["objective.name=grpo"], "several completions"),
        ([{**row, "split": "training"} for row in ROWS], [], "line 1: column \"split\" must be one of train.*'training'"),
        ([{**row, "split": "test"} for row in ROWS], [], "is train, got none"),
    ],
)  # fmt: skip
def test_hopeless_data_is_refused_before_the_backbone(made, tmp_path, no_backbone, rows, overrides, message):
    data = write(tmp_path / "rows.jsonl", rows)
    recipe = load_recipe(str(made / "tiny.yaml"), [f"data.dataset={data}", *overrides])
    with pytest.raises(TeaError, match=message) as caught:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.metric_for_best_model=eval_loss", "data.eval_fraction=0"],
        ["train.metric_for_best_model=eval_pair_accuracy"],
    ],
)
def test_a_metric_that_the_store_cannot_give_leaves_no_run(made, tmp_path, overrides):
    with pytest.raises(TeaError, match="metric_for_best_model"):
        train(from_store(made, overrides=overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_model_leaves_no_run(made, tmp_path):
    recipe = load_recipe(str(made / "tiny.yaml"), [f"model.name_or_path={tmp_path / 'none'}"])
    with pytest.raises(TeaError):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_as_examples_to_imitate_are_explained(made, tmp_path):
    notes = Notes()
    train(from_store(made, "pairs", ["objective.name=cross_entropy"]), tmp_path / "run", listener=notes)
    assert any("imitates the 9 chosen" in text and "9 rejected" in text for text in notes.texts)


def test_texts_are_parsed_only_for_a_split_column(made, monkeypatch):
    store = StateStore.open(made / "store")
    monkeypatch.setattr(StateStore, "texts", None)
    assert RowTable.of_store(store).sides is None


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, "all"])
def test_a_head_that_changes_nothing_correlates_with_nothing(made, size):
    store = StateStore.open(made / "store")
    # as where the head's arithmetic rounds otherwise than the store's did, in step with the rewards
    gather = store._gather

    def rounded(index, names=()):
        part = gather(index, names)
        rows = np.searchsorted(store.offsets, index, side="right") - 1
        part["base_logps"] = part["base_logps"] - 1e-6 * torch.from_numpy(store.rewards[rows])
        return part

    store._gather = rounded
    head = store.make_head(HeadConfig(hidden_sizes=[8], shortlist_size=size))
    metrics = offline_metrics(row_figures([head], store, np.arange(len(store)))[0])
    assert metrics["eval_reward_correlation"] == 0


def test_a_token_of_the_tail_can_be_the_likeliest(made):
    store = StateStore.open(made / "store")
    head = store.make_head(HeadConfig(hidden_sizes=[8], shortlist_size=48))
    rows = np.arange(len(store))
    batch = store.tokens(rows=rows)
    reference = head.reference_logits(batch.states, store.temperature)
    kept = reference.clone().scatter_(1, batch.shortlist.ids, -torch.inf)

    def hits(shift):
        head.members.forward = lambda states: (
            torch.zeros(len(states), store.hidden_size),
            torch.full((len(states),), shift),
        )
        return row_figures([head], store, rows)[0].hits.sum()

    assert hits(0.0) == (reference.argmax(dim=1) == batch.actions).sum()
    assert hits(100.0) == (kept.argmax(dim=1) == batch.actions).sum()
    # far enough for some positions, not for others
    gap = float((reference.max(dim=1).values - kept.max(dim=1).values).median())
    moved = torch.where(torch.isinf(kept), reference, kept + gap)
    assert hits(gap) == (moved.argmax(dim=1) == batch.actions).sum()
