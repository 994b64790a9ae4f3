"""Steps read from a store together are the steps read one by one."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from stores import embed, write_recipe
from tiny import save_tiny

from tea_rl.recipe import load_recipe
from tea_rl.training import read_ahead
from tea_rl.training.batches import TokenPlan
from tea_rl.training.read_ahead import ReadAhead


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return embed(load_recipe(write_recipe(folder, save_tiny("llama", folder / "model"))), folder / "store")


def assert_same(found, wanted):
    for field in fields(wanted):
        parts = [getattr(batch, field.name) for batch in (found, wanted)]
        for one, other in zip(*([part] if torch.is_tensor(part) else part for part in parts), strict=True):
            assert torch.equal(one, other), field.name


def plans(store):
    tokens = TokenPlan(store.offsets, np.arange(len(store)), 16, seed=3)
    rows = [[3, 0, 1], [2, 0], [5, 4]]  # in any order, some twice
    return {"tokens": tokens, "rows": lambda step: store.token_index(rows[step % 3])}


@pytest.mark.parametrize("kind", ["tokens", "rows"])
@pytest.mark.parametrize("steps", [0, 1, 3, 1000])
def test_every_step_is_what_the_store_gives(store, kind, steps, monkeypatch):
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES", steps * 16 * store.token_bytes)
    plan = plans(store)[kind]
    reader = ReadAhead(store, plan, last_step=12)
    for step in (1, 2, 3, 4, 5, 9, 10, 2, 12, 13, 14):  # on and on; ahead; back; behind the end
        assert_same(reader(step), store.tokens(index=plan(step)))


def test_many_steps_are_read_at_once_and_none_behind_the_last(store, monkeypatch):
    plan, asked, read = plans(store)["tokens"], [], []

    def index_of_step(step):
        asked.append(step)
        return plan(step)

    original = store.tokens
    monkeypatch.setattr(store, "tokens", lambda index: read.append(len(index)) or original(index=index))
    room = 4 * len(plan(1)) * store.token_bytes
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES", room)
    reader = ReadAhead(store, index_of_step, last_step=6)
    for step in range(1, 7):
        reader(step)
    assert asked == [1, 2, 3, 4, 5, 6] and len(read) == 2
    assert all(count <= room // store.token_bytes + 16 for count in read)


def test_what_a_step_was_given_is_its_own(store):
    reader = ReadAhead(store, plans(store)["tokens"], last_step=12)
    first = reader(1)
    wanted = first.states.clone()
    reader(2).states.zero_()
    reader(1).states.zero_()
    assert torch.equal(first.states, wanted) and torch.equal(reader(1).states, wanted)
