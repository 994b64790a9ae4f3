"""Gates of the members: they equal the formula, and they learn to keep silent."""

import torch
from naive_policy import HIDDEN, make_head, naive_terms

from tea_rl.head.policy import Shortlist


def test_gated_policy_equals_the_naive_one():
    head = make_head(gate=True, shortlist_size=20, spread=0.2)
    states, actions = torch.randn(30, HIDDEN), torch.randint(300, (30,))
    wanted = naive_terms(head, states, actions)
    logps = head(states).log_softmax(-1).gather(1, actions.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logps, wanted["logps"], atol=1e-4, rtol=1e-4)
    without = make_head(shortlist_size=20, spread=0.2)
    assert not torch.allclose(naive_terms(without, states, actions)["logps"], wanted["logps"], atol=1e-3)


def test_a_gate_keeps_the_head_silent_where_it_was_held_back():
    """Taught one token at states of one kind and held to the original at others, a gated head strays less on unseen ones."""
    torch.manual_seed(0)
    direction = torch.randn(HIDDEN)
    taught, held, unseen = (torch.randn(200, HIDDEN) + sign * 1.5 * direction for sign in (1, -1, -1))
    drift = {}
    for gate in (False, True):
        head = make_head(spread=0.0, gate=gate, shortlist_size="all", hidden_sizes=[24])
        torch.nn.init.zeros_(head.members.readout)
        optimizer = torch.optim.Adam(head.trainable_parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            wrong = -head(taught).log_softmax(-1)[:, 7].mean()
            (wrong + 2.0 * kl(head, held)).backward()
            optimizer.step()
        assert head(taught).softmax(-1)[:, 7].mean() > 0.9
        drift[gate] = kl(head, unseen).item()
    assert drift[True] < 0.7 * drift[False]


def kl(head, states):
    policy, base = head(states).log_softmax(-1), (states @ head.weight.t()).log_softmax(-1)
    return (base.exp() * (base - policy)).sum(-1).mean()


def test_a_shortlist_is_untouched_by_gates_it_does_not_have():
    """A head without gates has no gate parameters: old heads load as they are."""
    assert not [name for name in make_head().members.state_dict() if "gate" in name]
    assert isinstance(make_head(gate=True).shortlist_of(torch.randn(2, HIDDEN))[0], Shortlist)
