"""Token credit: the critic finds the tokens that earn a reward, does not cheat, and the policy learns from them."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from stores import write_recipe
from tiny import save_tiny

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.head.checkpoint import WEIGHTS_NAME
from tea_rl.states.embed import embed
from tea_rl.training import token_credit
from tea_rl.training.sweep import grid_recipes

LETTERS = "abcdefgh"


def completions(count=160, length=9):
    """Random letters; every "a" earns 1, every "b" costs 1, and the others nothing."""
    draw = random.Random(0)
    for number in range(count):
        text = "".join(draw.choice(LETTERS) for _ in range(length))
        yield {
            "prompt": f"{number % 7}:",
            "completion": text,
            "reward": float(text.count("a") - text.count("b")),
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store and the recipe it was made with."""
    folder = tmp_path_factory.mktemp("credit")
    model = save_tiny("llama", folder / "model")
    path = write_recipe(
        folder,
        model,
        list(completions()),
        head={"shortlist_size": 60, "hidden_sizes": [16]},
        objective={"name": "reward_weighted", "token_credit": 0.8, "minibatch_tokens": 128},
        train={"max_steps": 60, "learning_rate": 3e-3, "warmup_steps": 1, "num_threads": 1, "eval_steps": 60},
    )
    return embed(load_recipe(str(path)), folder / "store"), path


def by_letter(store, of_tokens):
    """Mean of a number a token over each letter, and over the end token."""
    token_ids = store.tokens(index=np.arange(store.num_tokens)).actions
    texts = [store.text(row)["completion"] for row in range(len(store))]
    letters = [letter for text in texts for letter in [*text, "end"]]
    assert len(letters) == len(token_ids)
    return {
        name: of_tokens[[letter == name for letter in letters]].mean().item() for name in [*LETTERS, "end"]
    }


def test_the_critic_finds_what_earned_the_reward(made):
    store, _ = made
    found = token_credit.token_credit(store, np.arange(len(store)), store.rewards, seed=0)
    credit = by_letter(store, found.advantages)
    assert found.correlation > 0.6
    assert credit["a"] > 1.0 and credit["b"] < -1.0
    assert max(abs(credit[letter]) for letter in "cdefgh") < 0.5
    assert credit["end"] == pytest.approx(-found.advantages.mean().item(), abs=0.05)
    assert found.advantages.mean().abs() < 1e-5
    assert found.advantages.std() == pytest.approx(1.0, abs=1e-3)


def test_memory_is_bounded_and_changes_nothing(made, monkeypatch):
    store, _ = made
    rows = np.arange(3, len(store), 2)
    whole = token_credit.token_credit(store, rows, store.rewards, seed=0)
    monkeypatch.setattr(token_credit, "_CHUNK", 50)
    parts = token_credit.token_credit(store, rows, store.rewards, seed=0)
    torch.testing.assert_close(whole.advantages, parts.advantages, atol=1e-3, rtol=1e-3)
    others = np.setdiff1d(np.arange(len(store)), rows)
    assert whole.advantages[torch.from_numpy(store.token_index(others))].abs().max() == 0


def test_rewards_that_mean_nothing_are_not_explained(made):
    """Cross-fitting: with more features than completions, a critic that saw its own answers would explain any of them."""
    store, _ = made
    noise = np.random.default_rng(1).normal(size=len(store)).astype(np.float32)
    found = token_credit.token_credit(store, np.arange(len(store)), noise, seed=0)
    assert abs(found.correlation) < 0.3


def test_a_run_makes_those_tokens_likelier_and_resumes_exactly(made, tmp_path):
    store, path = made
    recipe = load_recipe(str(path), [f"data.store={store.path}", "data.dataset=null", "train.save_steps=20"])
    train(recipe, tmp_path / "whole")
    steps = iter(range(1000))
    train(recipe, tmp_path / "parts", should_stop=lambda: next(steps) > 30)
    train(recipe, tmp_path / "parts", resume=True)
    weights, again = (load_file(tmp_path / run / "head" / WEIGHTS_NAME) for run in ("whole", "parts"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    head = store.make_head(recipe.head)
    head.load_state_dict(weights, strict=False)
    tokens = store.tokens(index=np.arange(store.num_tokens))
    with torch.no_grad():
        gain = by_letter(store, head.eval().terms(tokens).logps - tokens.base_logps)
    assert gain["a"] > 0.2 and gain["b"] < -0.2
    assert gain["a"] > max(gain[letter] for letter in "cdefgh")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "objective.name=awr",
            "objective.token_credit is for stored completions and reward_weighted, reinforce, ppo",
        ),
        ("objective.name=grpo", "got objective.name grpo"),
    ],
)
def test_objectives_that_take_no_token_credit_are_refused(made, override, message):
    with pytest.raises(TeaError, match=message):
        load_recipe(str(made[1]), [override])


def test_online_runs_have_no_stored_completions(tmp_path):
    raw = {
        "data": {"prompts": ["one"]},
        "rewards": [{"name": "length"}],
        "objective": {"name": "reinforce", "token_credit": 0.8},
    }
    (tmp_path / "online.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(TeaError, match="reinforce online; set one of these with labelled data"):
        load_recipe(str(tmp_path / "online.yaml"))


def test_a_sweep_cannot_vary_it(made):
    store, path = made
    with pytest.raises(TeaError, match="--grid objective.token_credit: all heads of a sweep"):
        grid_recipes(store, load_recipe(str(path)), {"objective.token_credit": [0.5, 1.0]})


@pytest.mark.parametrize(
    "rows", [[{"prompt": "q:", "completion": c, "reward": r} for c, r in (("a", 1.0), ("b", 0.0))]]
)
def test_too_little_to_fit_a_critic_is_one_line(made, rows, tmp_path):
    _, path = made
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(str(path), [f"data.dataset={tmp_path / 'few.jsonl'}", "data.eval_fraction=0"])
    with pytest.raises(TeaError, match="needs at least 5 completions with a reward"):
        train(recipe, tmp_path / "run")
