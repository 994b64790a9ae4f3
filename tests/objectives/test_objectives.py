"""Objectives against hand-computed values and their defining properties."""

import pytest
import torch

from tea_rl.objectives.advantages import advantages, grpo_advantages, rloo_advantages
from tea_rl.objectives.anchor import anchored_loss, divergence, with_entropy
from tea_rl.objectives.forking import forking_tokens
from tea_rl.objectives.policy_gradient import behaviour_kl, clipped_surrogate

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])


def test_rloo_by_hand():
    expected = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rloo_advantages(REWARDS), expected)


def test_grpo_by_hand():
    out = grpo_advantages(REWARDS)
    torch.testing.assert_close(out[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3, rtol=0)
    assert torch.equal(out[1], torch.zeros(4))  # a group without differences teaches nothing
    torch.testing.assert_close(grpo_advantages(REWARDS, "none")[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    batch = grpo_advantages(REWARDS, "batch")
    torch.testing.assert_close(batch[0, 0], 0.75 / (REWARDS.std() + 1e-4))


def test_batch_baselines():
    assert advantages("reinforce", REWARDS).mean().item() == pytest.approx(0.0)
    whitened = advantages("ppo", REWARDS)
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-3)
    assert advantages("ppo", torch.tensor([[3.0]])).item() == 0.0
    with pytest.raises(ValueError, match="sarsa"):
        advantages("sarsa", REWARDS)


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.5, [1, 2, 4]), (0.4, [1, 4]), (0.2, [4]), (0.0, [4])]
)
def test_tokens_where_the_policy_was_least_sure(share, kept):
    assert forking_tokens(torch.tensor([0.1, 2.0, 0.7, 0.2, 3.0]), share).tolist() == kept
    assert forking_tokens(torch.zeros(5), share).tolist() == list(range(len(kept)))


def test_entropy_is_a_bonus_or_a_price():
    task, entropy = torch.tensor(2.0), torch.tensor([1.0, 3.0])
    assert with_entropy(task, entropy, 0.25) == 1.5 and with_entropy(task, entropy, -0.25) == 2.5
    assert with_entropy(task, torch.tensor([torch.inf]), 0.0) == 2.0  # not even looked at


def test_surrogate_gradient_is_reinforce_on_policy():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 2.0])
    clipped_surrogate(logps, logps.detach(), advantage, 0.2).sum().backward()
    torch.testing.assert_close(logps.grad, -advantage)


def test_surrogate_stops_pushing_outside_the_clip():
    behaviour = torch.zeros(4)
    logps = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_surrogate(logps, behaviour, advantage, 0.2).sum().backward()
    assert logps.grad[0] == 0 and logps.grad[3] == 0  # already moved as asked, further than the range
    assert logps.grad[1] > 0 and logps.grad[2] < 0  # moved the wrong way: pulled back without limit
    wide = torch.tensor([0.3], requires_grad=True)
    clipped_surrogate(wide, torch.zeros(1), torch.ones(1), 0.2, clip_range_high=0.5).sum().backward()
    assert wide.grad[0] < 0


def test_behaviour_kl_estimates_the_kl():
    torch.manual_seed(0)
    old, new = torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0)
    actions = torch.multinomial(old.exp(), 200_000, replacement=True)
    exact = (old.exp() * (old - new)).sum()
    assert behaviour_kl(new[actions], old[actions]).item() == pytest.approx(exact.item(), rel=0.02)
    assert behaviour_kl(old, old).item() == 0


def test_divergences():
    base, logits = torch.randn(5, 9), torch.randn(5, 9)
    logps, base_logps = logits.log_softmax(-1), base.log_softmax(-1)
    for name in ("reverse_kl", "forward_kl", "logit_l1"):
        assert divergence(name, base, base, base_logps, base_logps).abs().max() == 0
        assert (divergence(name, logits, base, logps, base_logps) > 0).all()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=base)
    )
    torch.testing.assert_close(divergence("reverse_kl", logits, base, logps, base_logps), expected)
    shifted = divergence("logit_l1", base + 1.0, base, logps, base_logps)
    torch.testing.assert_close(shifted, 1.0 / (base.std(-1) + 1.0))
    with pytest.raises(ValueError, match="js"):
        divergence("js", logits, base, logps, base_logps)


def test_anchor_takes_over_as_conservativity_grows():
    task, anchor = torch.tensor(3.0), torch.tensor(7.0)
    assert anchored_loss(task, anchor, 0.0) == 3.0
    assert anchored_loss(task, anchor, 1.0) == 5.0
    assert anchored_loss(task, anchor, 1e6).item() == pytest.approx(7.0, abs=1e-3)
