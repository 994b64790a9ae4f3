"""The value head: what it learns, how unsure it is, and its files."""

import json

import pytest
import torch
from torch import nn

from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig
from tea_rl.head.value import ValueConfig, ValueHead

WIDTH = 24
CONFIGS = [
    ValueConfig(),
    ValueConfig(num_members=1, hidden_sizes=[8, 4], feature_fraction=0.5),
    ValueConfig(num_members=6, scale=50.0, dropout=0.1),
]


def perturbed(config=None, context=None) -> ValueHead:
    torch.manual_seed(3)
    head = ValueHead(WIDTH, config, context, seed=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head.eval()


def fit(head: ValueHead, states, targets, steps: int, lr: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    mask = head.bootstrap_mask(len(states), generator)
    head.train()
    for _ in range(steps):
        index = torch.randperm(len(states), generator=generator)[:64]
        optimizer.zero_grad()
        head.loss(states[index], targets[index], mask[:, index]).backward()
        optimizer.step()
    head.eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_fresh_head_expects_nothing(config):
    estimate = ValueHead(WIDTH, config)(torch.randn(5, WIDTH))
    assert torch.equal(estimate.mean, torch.zeros(5)) and torch.equal(estimate.spread, torch.zeros(5))


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_values_equal_a_loop(config):
    head = perturbed(config)
    states = torch.randn(7, WIDTH)
    values = []
    members = head.members
    for k in range(config.num_members):
        seen = states if members.feature_index is None else states[:, members.feature_index[k]]
        x = nn.functional.layer_norm(seen, seen.shape[-1:]) * members.norm_scale[k] + members.norm_shift[k]
        outputs = []
        for weight, bias in zip(members.weights, members.biases, strict=True):
            x = nn.functional.silu(x @ weight[k] + bias[k])
            outputs.append(x)
        out = torch.cat(outputs, 1) @ head.readout[k] + head.bias[k]
        values.append(config.scale * out.squeeze(1))
    values = torch.stack(values)
    estimate = head(states)
    torch.testing.assert_close(head.member_values(states), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimate.mean, values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimate.spread, values.std(0, correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_it_learns_a_function_of_the_state(scale):
    """Returns a hundred times as large are learnt as well, when the configuration says so."""
    torch.manual_seed(0)
    states = torch.randn(600, WIDTH)
    targets = scale * (states[:, 0] + (states[:, 1] * states[:, 2]).tanh())
    head = ValueHead(WIDTH, ValueConfig(scale=scale))
    fit(head, states[:500], targets[:500], 400)
    error = (head(states[500:]).mean - targets[500:]).square().mean() / targets[500:].var()
    assert error < 0.3


def test_members_disagree_where_there_was_no_data():
    """States seen lie in a few directions; elsewhere nothing tells the members what to say."""
    torch.manual_seed(0)
    directions = torch.randn(3, WIDTH)
    seen = torch.randn(500, 3) @ directions
    targets = seen[:, 0].sign()
    head = ValueHead(WIDTH)
    fit(head, seen[:400], targets[:400], 300)
    held_out, elsewhere = head(seen[400:]).spread.mean(), head(3 * torch.randn(100, WIDTH)).spread.mean()
    assert elsewhere > 1.5 * held_out > 0


def test_bootstrap_masks():
    head = ValueHead(WIDTH, ValueConfig(num_members=5, data_share=0.6))
    mask = head.bootstrap_mask(4000, torch.Generator().manual_seed(0))
    assert mask.shape == (5, 4000) and mask.any(0).all()
    assert mask.float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert (mask[0] != mask[1]).any()
    everyone = ValueHead(WIDTH, ValueConfig(data_share=1.0)).bootstrap_mask(50)
    assert everyone.all()


def test_a_masked_turn_teaches_its_member_nothing():
    head = perturbed()
    states, targets = torch.randn(6, WIDTH), torch.randn(6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    head.loss(states, targets, mask).backward()
    assert head.readout.grad[2].abs().max() == 0 and head.readout.grad[1].abs().max() > 0
    head.zero_grad()
    values = head.member_values(states)
    expected = 0.5 * (values - targets).square().mean()
    torch.testing.assert_close(head.loss(states, targets), expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("context", [ContextConfig(), ContextConfig(layers=[1, -1], horizons=["all", 8.0])])
def test_save_and_load(tmp_path, config, context):
    head = perturbed(config, context)
    head.save(tmp_path / "head")
    names = {path.name for path in (tmp_path / "head").iterdir()}
    assert names == {"value_config.json", "value_head.safetensors"}
    loaded = ValueHead.load(tmp_path / "head")
    states = torch.randn(9, head.state_width)
    assert loaded.state_width == WIDTH * (1 + context.num_means) and not loaded.training
    for mine, expected in zip(loaded(states), head(states), strict=True):
        assert torch.equal(mine, expected)
    assert loaded.config == config and loaded.context == context


def test_damage_is_named_in_one_line(tmp_path):
    with pytest.raises(TeaError, match=r"no value_config\.json"):
        ValueHead.load(tmp_path)
    head = perturbed()
    head.save(tmp_path)
    weights, config = tmp_path / "value_head.safetensors", tmp_path / "value_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TeaError, match=r"value_head\.safetensors is not a readable"):
        ValueHead.load(tmp_path)
    weights.write_bytes(whole)
    about = json.loads(config.read_text())
    for change in ({"num_members": 7}, {"num_members": "many"}, {"hidden_sizes": [0]}):
        broken = {**about["value_head"], **change}
        config.write_text(json.dumps({**about, "value_head": broken}))
        with pytest.raises(TeaError) as error:
            ValueHead.load(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(TeaError, match=f"reads {WIDTH} numbers a state, got 5"):
        head(torch.randn(2, 5))


def test_a_head_that_is_not_finite_is_not_saved(tmp_path):
    head = perturbed()
    head.readout.data[0, 0] = torch.nan
    with pytest.raises(TeaError, match="not finite"):
        head.save(tmp_path / "head")
    assert not (tmp_path / "head").exists()
