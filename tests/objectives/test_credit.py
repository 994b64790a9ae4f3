"""Credit of turns against loops over one episode at a time."""

import pytest
import torch

from tea_rl.objectives.advantages import advantages
from tea_rl.objectives.credit import discounted_returns, gae, turn_advantages

LENGTHS = {
    "mixed": [3, 1, 5, 2, 0, 4],
    "one turn each": [1, 1, 1],
    "one episode": [6],
    "first and last without turns": [0, 2, 3, 0],
}


def episodes_of(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def naive_returns(rewards, discount):
    """Definition: the sum of ``discount^k r_{t+k}``."""
    return [sum(discount**k * reward for k, reward in enumerate(rewards[t:])) for t in range(len(rewards))]


def naive_gae(rewards, values, final, discount, lam):
    """Definition: the sum of ``(discount lambda)^k delta_{t+k}``."""
    after = [*values, final][1:]
    deltas = [r + discount * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return naive_returns(deltas, discount * lam)


def by_episode(values, lengths):
    return [part.tolist() for part in values.split(lengths)]


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_returns_equal_a_loop(lengths, discount):
    torch.manual_seed(0)
    rewards = torch.randn(sum(lengths), dtype=torch.float64)
    expected = [g for part in by_episode(rewards, lengths) for g in naive_returns(part, discount)]
    found = discounted_returns(rewards, episodes_of(lengths), discount)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("ends", ["mixed", "all terminated", "all truncated"])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gae_equals_a_loop(lengths, lam, discount, ends):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    final = torch.randn(len(lengths), dtype=torch.float64)
    terminated = torch.arange(len(lengths)) % 2 == 0 if ends == "mixed" else torch.full_like(final, 0).bool()
    if ends == "all terminated":
        terminated = ~terminated
    final = final.masked_fill(terminated, torch.nan)  # nobody asked for these values
    expected = [
        advantage
        for r, v, last, over in zip(
            by_episode(rewards, lengths), by_episode(values, lengths), final, terminated, strict=True
        )
        for advantage in naive_gae(r, v, 0.0 if over else last.item(), discount, lam)
    ]
    found = gae(rewards, values, final, terminated, episodes_of(lengths), discount, lam)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.advantages, expected)
    torch.testing.assert_close(found.value_targets, expected + values)


def test_lambda_one_is_the_return_less_the_value():
    torch.manual_seed(0)
    lengths = LENGTHS["mixed"]
    episodes = episodes_of(lengths)
    rewards, values = torch.randn(2, len(episodes))
    over = torch.ones(len(lengths), dtype=torch.bool)
    found = gae(rewards, values, torch.zeros(len(lengths)), over, episodes, 0.9, 1.0)
    torch.testing.assert_close(found.value_targets, discounted_returns(rewards, episodes, 0.9))


def test_a_truncated_episode_is_worth_what_it_was_left_with():
    """One turn, no reward: terminated it is worth nothing, truncated the discounted value of the final state."""
    rewards, values = torch.zeros(2), torch.zeros(2)
    final, terminated = torch.tensor([5.0, 5.0]), torch.tensor([True, False])
    found = gae(rewards, values, final, terminated, torch.tensor([0, 1]), 0.5, 0.95)
    assert found.advantages.tolist() == [0.0, 2.5]


def test_no_gradient_reaches_the_values():
    values = torch.ones(3, requires_grad=True)
    final = torch.ones(1, requires_grad=True)
    found = gae(torch.ones(3), values, final, torch.zeros(1), torch.zeros(3, dtype=torch.long), 1.0, 1.0)
    assert not found.advantages.requires_grad and not found.value_targets.requires_grad


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce", "ppo"])
def test_one_reward_at_the_end_credits_every_turn_with_the_episode(name):
    """Whatever the lengths, each turn gets what the whole episode's return would get."""
    torch.manual_seed(0)
    lengths = [3, 1, 5, 2, 4, 4]
    episodes = episodes_of(lengths)
    outcome = torch.randn(6)
    rewards = torch.zeros(len(episodes))
    rewards[torch.tensor(lengths).cumsum(0) - 1] = outcome
    groups = torch.tensor([7, 7, 7, 3, 3, 3])
    found = turn_advantages(name, discounted_returns(rewards, episodes, 1.0), groups, episodes)
    whole = outcome.view(2, 3)
    torch.testing.assert_close(found, advantages(name, whole).flatten()[episodes])


def test_leave_one_out_baseline_of_turns_equals_a_loop():
    torch.manual_seed(0)
    lengths, groups = [3, 1, 5, 2, 4, 0, 1], [0, 0, 0, 1, 1, 1, 2]
    episodes = episodes_of(lengths)
    returns = discounted_returns(torch.randn(len(episodes)), episodes, 0.9)
    parts = by_episode(returns, lengths)
    expected = []
    for episode, part in enumerate(parts):
        others = [
            other
            for number, other in enumerate(parts)
            if number != episode and groups[number] == groups[episode] and other
        ]
        for t, value in enumerate(part):
            baseline = [other[min(t, len(other) - 1)] for other in others]
            expected.append(value - sum(baseline) / len(baseline) if baseline else 0.0)
    found = turn_advantages("rloo", returns, torch.tensor(groups), episodes)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_no_turns_at_all():
    none, episodes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert discounted_returns(none, episodes, 0.9).shape == (0,)
    assert turn_advantages("rloo", none, torch.tensor([0]), episodes).shape == (0,)
    assert gae(none, none, torch.ones(1), torch.zeros(1), episodes, 0.9, 0.9).advantages.shape == (0,)


def test_integer_rewards_are_discounted():
    found = discounted_returns(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 0.5)
    assert found.tolist() == [0.25, 0.5, 1.0]


def test_scattered_turns_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="side by side"):
        discounted_returns(torch.ones(3), torch.tensor([0, 1, 0]), 0.9)
    with pytest.raises(ValueError, match="nonsense"):
        turn_advantages("nonsense", torch.ones(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
