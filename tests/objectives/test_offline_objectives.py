"""Offline objectives against hand-computed values, their limits and, for preferences, their sign conventions."""

import math

import pytest
import torch

from tea_rl.objectives.advantages import advantages, stored_advantages
from tea_rl.objectives.preference import dpo, ipo, kto, row_sums
from tea_rl.objectives.supervised import awr_weights, cross_entropy, group_baselines, reward_weighted

T = torch.tensor


def test_cross_entropy_is_the_surprise():
    assert torch.equal(cross_entropy(T([-1.0, -2.0])), T([1.0, 2.0]))


def test_positive_rewards_scale_the_cross_entropy():
    logps = T([-1.0, -3.0], requires_grad=True)
    loss = reward_weighted(logps, T([-2.0, -2.0]), T([0.5, 2.0]), 2.0)
    torch.testing.assert_close(loss, T([0.5, 6.0]))
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, T([-0.5, -2.0]))


def test_negative_rewards_are_softly_bounded():
    base = torch.full((4,), -2.0)
    logps = T([-2.0, -1.0, -4.0, -200.0], requires_grad=True)  # as before, likelier, less likely, gone
    loss = reward_weighted(logps, base, torch.full((4,), -1.0), 2.0)
    expected = [-2.0, -1.0, -(2.0 + 2 * (1 - math.exp(-1))), -4.0]
    torch.testing.assert_close(loss, T(expected))
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, T([1.0, 1.0, math.exp(-1), 0.0]))
    assert loss.min() >= -4.0  # base surprise and the bound: no more can be won


def test_no_reward_no_loss():
    assert torch.equal(reward_weighted(T([-1.0]), T([-2.0]), T([0.0]), 2.0), T([0.0]))


def test_awr_weights_by_hand():
    rewards, groups = T([1.0, 0.0, 5.0, 0.5]), T([7, 7, 3, 9])
    mean = 6.5 / 4
    torch.testing.assert_close(group_baselines(rewards, groups), T([0.5, 0.5, mean, mean]))
    raw = T([math.exp(0.5), math.exp(-0.5), 20.0, math.exp(0.5 - mean)])  # the third is clipped
    torch.testing.assert_close(awr_weights(rewards, groups, 1.0), raw / raw.mean())
    counts = T([1, 2, 3, 4])
    by_token = awr_weights(rewards, groups, 1.0, counts)
    assert (by_token * counts).sum() / counts.sum() == pytest.approx(1.0)


def test_dpo_by_hand():
    gains = T([0.0, 2.0, -2.0], requires_grad=True)
    loss = dpo(gains, torch.zeros(3), 0.5)
    torch.testing.assert_close(loss, T([math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]))
    loss.sum().backward()
    assert (gains.grad < 0).all()  # a likelier chosen completion lowers the loss


def test_ipo_is_zero_at_its_margin():
    torch.testing.assert_close(ipo(T([5.0, 0.0]), T([0.0, 0.0]), 0.1), T([0.0, 25.0]))


def test_kto_by_hand():
    gains = T([1.0, 1.0], requires_grad=True)
    z = T(0.5, requires_grad=True)
    loss = kto(gains, T([True, False]), z, 2.0)
    torch.testing.assert_close(loss, T([1 - torch.sigmoid(T(1.0)), 1 - torch.sigmoid(T(-1.0))]))
    loss.sum().backward()
    assert gains.grad[0] < 0 < gains.grad[1] and z.grad is None


def test_row_sums():
    values = T([1.0, 2.0, 3.0], requires_grad=True)
    out = row_sums(values, T([2, 0, 2]), 4)
    assert out.tolist() == [2.0, 0.0, 4.0, 0.0]
    out[2].backward()
    assert values.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "ppo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_stored_advantages_equal_those_of_a_rollout(name, scale):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(5).repeat_interleave(4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    stored = stored_advantages(name, rewards.flatten()[order], groups[order] * 3, scale)
    torch.testing.assert_close(stored, advantages(name, rewards, scale).flatten()[order])


def test_a_row_alone_has_no_advantage():
    for name in ("grpo", "rloo"):
        out = stored_advantages(name, T([3.0, 1.0, 0.0]), T([0, 1, 1]))
        assert out[0] == 0 and out[1] > 0 > out[2]
    with pytest.raises(ValueError, match="sarsa"):
        stored_advantages("sarsa", T([1.0]), T([0]))
