"""Running means against their definition: padding, splits, horizons, and what happens to rows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tea_rl.errors import TeaError
from tea_rl.head import context as context_module
from tea_rl.head.config import ContextConfig
from tea_rl.head.context import ContextPass, ContextReader, ContextState, find_layers

WIDTH = 6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIG = ContextConfig(layers=[1, -1], horizons=["all", 3.0, 40])


def naive_means(states: torch.Tensor, horizons) -> torch.Tensor:
    """The definition, token by token: ``(T, D)`` states of one row without padding to ``(T, H, D)``."""
    x = F.layer_norm(states.double(), states.shape[-1:])
    rows = []
    for t in range(len(x)):
        means = []
        for horizon in horizons:
            used = x[1 : t + 1] if t else x[:1]
            ages = torch.arange(len(used) - 1, -1, -1, dtype=torch.float64)
            weights = torch.ones(len(used)).double() if horizon == "all" else torch.exp(-ages / horizon)
            means.append((weights.unsqueeze(1) * used).sum(0) / weights.sum())
        rows.append(torch.stack(means))
    return torch.stack(rows).float()


def run(config, state, layers, real):
    """One pass over states ``(places, B, T, D)``: the means alone, ``(B, T, M, D)``."""
    rates = [0.0 if horizon == "all" else 1 / horizon for horizon in config.horizons]
    started = ContextPass(state, rates, real)
    for place, states in enumerate(layers):
        started.read(place, states)
    wide = started.finish(layers[-1])
    assert torch.equal(wide[..., :WIDTH], layers[-1])
    return wide[..., WIDTH:].unflatten(-1, (-1, WIDTH))


def masks(length):
    """No padding; on the left; on the right; in between, as after a shared prefix; a single token."""
    real = torch.ones(5, length, dtype=torch.bool)
    real[1, : length // 3] = False
    real[2, -length // 3 :] = False
    real[3, 2 : length // 2] = False
    real[4, :-1] = False
    return real


@pytest.mark.parametrize("length", [1, 7, 90, 150])
@pytest.mark.parametrize("split", ["whole", "in two", "token by token"])
def test_means_follow_the_definition(length, split, monkeypatch):
    monkeypatch.setattr(context_module, "BLOCK", 32)
    torch.manual_seed(0)
    real = masks(length)
    states = 3 * torch.randn(2, *real.shape, WIDTH) + 1
    states[:, ~real] = float("nan")  # whatever a model computes at padding stays out
    state = ContextState(CONFIG)
    assert state.means is None
    ends = {"whole": [length], "in two": [length // 2, length], "token by token": range(1, length + 1)}[split]
    parts, start = [], 0
    for end in ends:
        if end > start:
            parts.append(run(CONFIG, state, states[:, :, start:end].nan_to_num(7.0), real[:, start:end]))
            start = end
    means = torch.cat(parts, dim=1)
    assert state.length == length
    assert torch.equal(state.tokens, real.sum(1))
    assert torch.isfinite(means).all()
    for row in real.any(1).nonzero().flatten().tolist():
        for place in range(2):
            expected = naive_means(states[place, row, real[row]], CONFIG.horizons)
            found = means[row, real[row]].unflatten(1, (2, 3))[:, place]
            torch.testing.assert_close(found, expected, **CLOSE)


def test_numbers_at_padding_do_not_matter():
    torch.manual_seed(0)
    real = masks(9)
    states = torch.randn(2, *real.shape, WIDTH)
    spoiled = states.clone()
    spoiled[:, ~real] = float("nan")
    one, two = ContextState(CONFIG), ContextState(CONFIG)
    rates = [0.0, 1 / 3, 1 / 40]
    results = []
    for state, values in ((one, states), (two, spoiled)):
        started = ContextPass(state, rates, real)
        for place in range(2):
            started.read(place, values[place])
        results.append(started.finish(values[1])[real])
    assert torch.equal(*results)
    assert torch.equal(one.means, two.means)


def test_a_long_uniform_mean_stays_exact():
    """4,000 tokens in float32, one by one and in one go."""
    torch.manual_seed(0)
    config = ContextConfig(layers=[1], horizons=["all", 2000])
    states = torch.randn(1, 4000, WIDTH) + torch.arange(WIDTH)
    real = torch.ones(1, 4000, dtype=torch.bool)
    whole = run(config, ContextState(config), states.unsqueeze(0), real)
    state = ContextState(config)
    for start in range(4000):
        last = run(config, state, states[None, :, start : start + 1], real[:, :1])
    torch.testing.assert_close(last[0, 0], whole[0, -1], **CLOSE)
    x = F.layer_norm(states[0, 1:].double(), (WIDTH,))
    torch.testing.assert_close(last[0, 0, 0], x.mean(0).float(), **CLOSE)


def test_rows_can_be_selected_repeated_and_copied():
    torch.manual_seed(0)
    states, real = torch.randn(2, 5, 8, WIDTH), masks(8)
    state = ContextState(CONFIG)
    run(CONFIG, state, states, real)
    index = torch.tensor([3, 1, 1])
    twin = copy.deepcopy(state)
    state.select_rows(index)
    twin.repeat_interleave(2)
    assert state.means.shape == (3, 6, WIDTH) and twin.means.shape == (10, 6, WIDTH)
    more = torch.randn(2, 5, 2, WIDTH)
    whole = run(CONFIG, ContextState(CONFIG), torch.cat([states, more], 2), F.pad(real, (0, 2), value=True))
    ones = torch.ones(10, 2, dtype=torch.bool)
    torch.testing.assert_close(run(CONFIG, state, more[:, index], ones[:3]), whole[index, -2:], **CLOSE)
    doubled = run(CONFIG, twin, more.repeat_interleave(2, dim=1), ones)
    torch.testing.assert_close(doubled, whole[:, -2:].repeat_interleave(2, dim=0), **CLOSE)


def test_a_fresh_state_has_no_rows_to_move():
    state = ContextState(CONFIG)
    state.select_rows(torch.tensor([1]))
    state.repeat_interleave(2)
    assert state.means is None
    assert ContextState.begin(ContextConfig()) is None
    assert isinstance(ContextState.begin(CONFIG), ContextState)


def test_another_number_of_rows_is_refused():
    state = ContextState(CONFIG)
    run(CONFIG, state, torch.randn(2, 5, 8, WIDTH), masks(8))
    with pytest.raises(TeaError, match="have read 5 rows, but the batch has 2"):
        ContextPass(state, [0.0], torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": [4]}, r"has 4, but this model's layers are 1 to 3, or -1 \(the last\) to -3"),
        ({"layers": [1, 0]}, "no layer 0"),
        ({"layers": [-4]}, "has -4"),
        ({"layers": [1], "horizons": [0.0]}, "positive"),
        ({"layers": [1], "horizons": ["all", -2.0]}, "positive"),
        ({"layers": [1], "horizons": [float("inf")]}, "positive"),
        ({"layers": [1], "horizons": [float("nan")]}, "positive"),
    ],
)
def test_what_does_not_fit_is_refused(config, message):
    layers = nn.ModuleList([nn.Identity() for _ in range(3)])
    with pytest.raises((TeaError, ValueError), match=f"{message}|horizons") as caught:
        ContextReader(ContextConfig(**config), layers, WIDTH)
    if isinstance(caught.value, TeaError):
        assert "\n" not in str(caught.value)


class Body(nn.Module):
    """A transformer in outline; with ``twist`` something happens between its layers."""

    def __init__(self, twist: float = 0.0, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count)])
        self.twist = twist

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x) if not self.twist else block(x + self.twist)
        return x


def test_layers_are_found_and_proved():
    ids = torch.tensor([[1, 2, 3]])
    body = Body()
    assert find_layers(body, 3, ids) is body.blocks
    assert not any(module._forward_hooks for module in body.modules())
    for wrong in (Body(count=4), Body(twist=0.1)):
        with pytest.raises(TeaError, match="hand their states on") as caught:
            find_layers(wrong, 3, ids)
        assert "\n" not in str(caught.value)
        assert not any(module._forward_hooks for module in wrong.modules())
