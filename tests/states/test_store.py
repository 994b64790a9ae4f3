"""The store: what goes in comes out, damage is named, a mistake is one line."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stores import ROWS, Stop, contents, embed, write_recipe
from tiny import tiny_backbone

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.recipe import RewardSpec, load_recipe
from tea_rl.states import StateStore, StoredRow, StoreHeader, StoreWriter
from tea_rl.states.embed import plan_batches
from tea_rl.states.labelling import TokenLabeller
from tea_rl.states.relabel import relabel


@pytest.fixture(scope="module")
def backbone(model):
    from tea_rl.backbone import load_backbone

    return load_backbone(str(model), dtype="float32", device="cpu")


def test_rows_come_back(made, backbone):
    store, _, _ = made
    assert len(store) == len(ROWS) and len(store.manifest.shards) > 2
    assert sorted(store.source_rows) == list(range(len(ROWS)))
    for row, source in enumerate(store.source_rows.tolist()):
        text = store.text(row)
        assert text["prompt"] == ROWS[source]["prompt"] and text["completion"] == ROWS[source]["completion"]
        assert text["columns"] == {"extra": source} and f"line {source + 1}" in text["place"]
        assert store.rewards[row] == pytest.approx(ROWS[source]["reward"])
        assert backbone.tokenizer.decode(store.prompt_ids(row)) == text["prompt"]
        tokens = store.tokens(rows=[row])
        decoded = backbone.tokenizer.decode(tokens.actions, skip_special_tokens=True)
        assert decoded == text["completion"] and tokens.actions[-1] == backbone.tokenizer.eos_token_id
    same_prompt = store.groups[:, None] == store.groups[None, :]
    prompts = np.array([ROWS[source]["prompt"] for source in store.source_rows])
    assert np.array_equal(same_prompt, prompts[:, None] == prompts[None, :])
    assert [row["completion"] for row in store.texts()] == [
        store.text(r)["completion"] for r in range(len(store))
    ]


def test_stored_numbers_are_those_of_the_live_model(made, backbone):
    """Invariant 4: cached states equal recomputed ones, and replayed log-probabilities the model's own."""
    store, _, _ = made
    head = store.make_head(HeadConfig(shortlist_size=100)).eval()
    for row in range(len(store)):
        tokens, prompt = store.tokens(rows=[row]), store.prompt_ids(row)
        ids = torch.tensor([prompt + tokens.actions.tolist()])
        states = backbone.forward(ids)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(tokens.states, states, atol=1e-5, rtol=1e-5)
        logits = backbone.model(ids).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, tokens.actions.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(tokens.base_logps, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens.logps, tokens.base_logps)
        terms = head.shortlist_terms(tokens.states, tokens.shortlist, tokens.slots, tokens.within_tail_logps)
        torch.testing.assert_close(terms.logps, tokens.logps, atol=1e-6, rtol=1e-6)
    slots = store.token_array("slots", range(len(store)))
    assert (slots == 100).any() and (slots < 100).any()  # actions on the shortlist and in the tail


@pytest.mark.parametrize("family", ["bloom", "cohere", "opt", "gpt2"])
def test_other_architectures(tmp_path, family):
    """Relative positions, a logit scale, an odd width, a bias-free and a learned position embedding."""
    live = tiny_backbone(tmp_path, family)
    recipe = load_recipe(write_recipe(tmp_path, live.name_or_path, ROWS[:12], rollout={"temperature": 0.7}))
    store = embed(recipe, tmp_path / "store", backbone=live)
    for row in range(len(store)):
        tokens, prompt = store.tokens(rows=[row]), store.prompt_ids(row)
        logits = live.model(torch.tensor([prompt + tokens.actions.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.float() / 0.7).log_softmax(-1).gather(1, tokens.actions.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(tokens.base_logps, expected, atol=1e-4, rtol=1e-4)


def test_wide_states(tmp_path, model, backbone):
    from tea_rl.head.context import ContextState

    context = {"layers": [1, -1], "horizons": ["all", 4]}
    recipe = load_recipe(write_recipe(tmp_path, model, head={"context": context, "shortlist_size": 100}))
    store = embed(recipe, tmp_path / "store")
    assert store.width == 5 * backbone.hidden_size
    for row in (0, 17, 39):
        tokens, prompt = store.tokens(rows=[row]), store.prompt_ids(row)
        ids = torch.tensor([prompt + tokens.actions.tolist()])
        wide = backbone.forward(ids, context=ContextState.begin(recipe.head.context))
        torch.testing.assert_close(tokens.states, wide[0, len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)
    head = store.make_head(recipe.head).eval()
    tokens = store.tokens(rows=[3])
    torch.testing.assert_close(head.terms(tokens).logps, tokens.logps, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_keep_the_backbones_number_format(tmp_path, model, dtype):
    recipe = load_recipe(write_recipe(tmp_path, model, ROWS[:8]), [f"model.dtype={dtype}"])
    store = embed(recipe, tmp_path / "store")
    assert store.dtype == getattr(torch, dtype) == store.reference().weight.dtype
    assert torch.isfinite(store.tokens(rows=range(8)).states).all()


def test_gathering_by_row_and_by_token(made):
    store, _, _ = made
    everything = store.tokens(rows=range(len(store)))
    assert len(everything) == store.num_tokens and everything.state_ids.tolist() == list(
        range(store.num_tokens)
    )
    rng = np.random.default_rng(0)
    for index in (
        rng.integers(0, store.num_tokens, 300),
        np.arange(30, 90),
        np.array([store.num_tokens - 1]),
    ):
        some, expected = store.tokens(index=index), everything.select(torch.from_numpy(index))
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
            assert torch.equal(getattr(some, name), getattr(expected, name)), name
        for mine, theirs in zip(some.shortlist, expected.shortlist, strict=True):
            assert torch.equal(mine, theirs)
    rows = rng.permutation(len(store))
    shuffled = store.tokens(rows=rows)
    for place, row in enumerate(rows.tolist()):
        assert torch.equal(shuffled.actions[shuffled.rows == place], store.tokens(rows=[row]).actions)
    assert len(store.tokens(index=np.zeros(0, np.int64))) == 0
    with pytest.raises(IndexError):
        store.tokens(index=np.array([store.num_tokens]))
    with pytest.raises(ValueError, match="rows or index"):
        store.tokens()


def test_any_safetensors_reader_reads_a_shard(made):
    store, _, _ = made
    shard = store.manifest.shards[1]["name"]
    with safe_open(store.path / f"{shard}.safetensors", "pt") as file:
        states = file.get_tensor("states")
    first = store.manifest.shards[0]["tokens"]
    assert torch.equal(states, store.tokens(index=np.arange(first, first + len(states))).states)


def test_heads_need_no_backbone(made, backbone):
    store, _, _ = made
    head = store.make_head(HeadConfig(shortlist_size=100))
    assert torch.equal(head.weight, backbone.reference.weight) and not head.weight.requires_grad
    assert head.reference_digest == backbone.digest and head.base_settings == backbone.settings
    assert head.base_model_name_or_path == backbone.name_or_path


def test_overhead_is_small(tmp_path, backbone):
    """At most 15 % over the raw arrays, the reference weight being one of them."""
    folder, rows, length = tmp_path / "store", 50, 40
    header = StoreHeader("dataset", {}, "s", 32, 32, 320, 64, 1.0, 1.0)
    states, actions = torch.randn(rows * length, 32), torch.randint(0, 320, (rows * length,))
    labelled = TokenLabeller.for_backbone(backbone, 64, 1.0).label(states, actions, [length] * rows)
    with StoreWriter.create_or_continue(folder, header, backbone.reference) as writer:
        writer.append(
            [StoredRow(list(range(8)), "a prompt", "a completion " * 8) for _ in range(rows)], labelled
        )
        writer.finish()
    raw = len(states) * (32 * 4 + 64 * 8 + 7 * 4) + backbone.reference.weight.nbytes
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.15 * raw


def test_recipe_rewards_replace_labels(tmp_path, model):
    path = write_recipe(tmp_path, model, rewards=[{"name": "length", "weight": 2.0, "kwargs": {"max": 2}}])
    store = embed(load_recipe(path), tmp_path / "store")
    values = {source: store.terms["length"][row] for row, source in enumerate(store.source_rows.tolist())}
    assert values[0] == 1 and values[4] < 1  # one word, five words
    assert np.array_equal(store.rewards, 2 * store.terms["length"])
    assert store.text(0)["terms"] == {"length": pytest.approx(store.terms["length"][0])}


def test_relabel_in_place_and_into_another_store(copy, tmp_path, made):
    (tmp_path / "mine.py").write_text(
        "def even(prompts, completions, extra): return [float(e % 2 == 0) for e in extra]\n"
    )
    specs = [RewardSpec(name="mine.py:even"), RewardSpec(name="length", weight=-1.0, kwargs={"max": 50})]
    before = contents(copy)
    other = relabel(copy, specs, tmp_path, output=tmp_path / "other")
    assert contents(copy) == before
    expected = (other.source_rows % 2 == 0) - 1.0
    assert np.array_equal(other.rewards, expected) and set(other.terms) == {"even", "length"}
    shards = {file.name for file in copy.glob("shard-*")}
    assert all((tmp_path / "other" / name).samefile(copy / name) for name in shards)
    StateStore.open(tmp_path / "other")  # every digest is right

    again = relabel(copy, specs, tmp_path)
    assert np.array_equal(again.rewards, expected)
    assert len(list(copy.glob("rewards-*"))) == 1
    after = contents(copy)
    assert all(after[name] == before[name] for name in shards)
    StateStore.open(copy)
    with pytest.raises(TeaError, match="new or empty folder"):
        relabel(copy, specs, tmp_path, output=tmp_path / "other")


def test_relabel_killed_before_the_manifest_changes_nothing(copy, monkeypatch):
    from tea_rl.states import relabel as module

    old = StateStore.open(copy).rewards

    def stop(*args):
        raise Stop

    monkeypatch.setattr(module.Manifest, "write", stop)
    with pytest.raises(Stop):
        relabel(copy, [RewardSpec(name="length", kwargs={"max": 1})])
    assert np.array_equal(StateStore.open(copy).rewards, old)


def test_a_failing_reward_changes_nothing(copy, tmp_path):
    (tmp_path / "bad.py").write_text("def nan(prompts, completions): return [float('nan')] * len(prompts)\n")
    before = contents(copy)
    with pytest.raises(TeaError, match="finite number"):
        relabel(copy, [RewardSpec(name="bad.py:nan")], tmp_path)
    assert contents(copy) == before


def test_rows_without_rewards(tmp_path, model):
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in ROWS[:10]]
    store = embed(load_recipe(write_recipe(tmp_path, model, rows)), tmp_path / "store")
    assert np.isnan(store.rewards).all() and store.terms == {}


def test_preference_pairs(tmp_path, model):
    rows = [{"prompt": f"p{i}", "chosen": " good", "rejected": " bad one"} for i in range(6)]
    store = embed(load_recipe(write_recipe(tmp_path, model, rows)), tmp_path / "store")
    for pair in range(6):
        rows_of = np.flatnonzero(store.pairs == pair)
        assert sorted(store.chosen[rows_of]) == [0, 1]
        assert len(set(store.groups[rows_of])) == 1
        assert {store.text(r)["completion"] for r in rows_of if store.chosen[r]} == {" good"}


def test_rows_that_are_cut_are_counted(tmp_path, model):
    notes = []
    from tea_rl.training.progress import Listener

    listener = Listener()
    listener.on_note = notes.append
    path = write_recipe(tmp_path, model, data={"dataset": str(tmp_path / "rows.jsonl"), "max_length": 18})
    store = embed(load_recipe(path), tmp_path / "store", listener)
    assert store.manifest.notes["truncated"] > 0
    assert any(note.startswith("warning") for note in notes)
    assert (store.lengths + [len(store.prompt_ids(r)) for r in range(len(store))]).max() == 18
    assert not store.finished.all() and store.finished.any()


def test_batches_cover_every_row_once_and_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 3000).tolist()
    batches = plan_batches(lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(3000))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert max(len(b) * max(lengths[r] for r in b) for b in batches) <= 2048
    assert plan_batches([5000]) == [[0]]
