"""``shortlist_size: auto``: the loss over the whole vocabulary, estimated from few of its tokens.

The policy corrects every token, ``z_v = l_v + delta_v``, so ``log Z`` needs the tail's sum of ``exp(z_v)``. What is known
exactly at every position is the *base* model's tail mass ``exp(tau)``. The estimate looks at

* the shortlist ``S``, exactly;
* a set ``C`` of tokens common to the minibatch: every action in it (these are what training pushes up, and each position is
  another's negative), and about `NUM_SAMPLES` more, drawn without replacement with known inclusion probabilities ``p_v``.

Tokens of ``C`` that were certain to be in it (``p_v = 1``, the actions among them) count exactly. The rest of the tail, ``R``,
has the known base mass ``exp(tau) - sum of the certain ones' exp(l_v)``; the sample only says how the correction changes it:

    sum over R of exp(z_v)  ~=  mass(R) * (sum over sample of exp(z_v) / p_v) / (sum over sample of exp(l_v) / p_v)

This ratio estimate uses the base mass as control variate: it is exact for a fresh head, and for any correction that moves
``R`` as one, whatever was drawn; otherwise its bias is of order ``1 / NUM_SAMPLES``. In other words, each sampled token stands
for a share of ``R`` through a *virtual* base logit, and log-probabilities, KL and their gradients are those of a small finite
distribution: the KL is never negative and zero exactly where nothing was corrected. The entropy takes the known entropy of the
base tail as control variate in the same way.

Tokens are drawn (systematic sampling) in proportion to a mixture of the mean tail of the original model, the mean tail of the
current policy, both over a few random positions of the minibatch, and the uniform distribution.

Measured against the full loss on SmolLM2-135M (minibatches of 512 next tokens of English text, 3 % of the vocabulary looked
at; after 100 updates, KL to the original model 0.38 nats; 20 draws): mean log-probability off by -0.0007 +- 0.0004 nats, mean
KL by -0.0001; worst token 0.05; one draw at one token 0.017 (root mean square). The gradient of one draw lies 5 % off
(cosine 0.999); the mean of 20 lies 1.2 % off, of which noise alone explains 1.1 %: no bias was found beyond it. Far
from the original model (readout vocab, KL 1.05) the mean KL was 0.011 too low and the gradient 1.7 % off.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tea_rl.head.full_vocabulary import Reads, Scales
from tea_rl.head.policy import MASKED, PolicyTerms, Shortlist, entropy, shortlist_product
from tea_rl.objectives.anchor import divergence

#: Tokens drawn beside shortlists and actions.
NUM_SAMPLES = 1024
#: Positions whose full logits shape the proposal.
PROBE_STATES = 32
#: Shares of the proposal: original model's tail, policy's tail, uniform.
PROPOSAL_SHARES = (0.4, 0.4, 0.2)


def sampled_terms(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reads: list[Reads],
    scales: Scales,
    shortlist: Shortlist,
    actions: Tensor,
    at: Tensor,
    anchor: str,
) -> PolicyTerms:
    """Estimate of `tea_rl.head.full_vocabulary.fused_terms`; see the module's docstring.

    Shape:
        as there; shortlist of ``U`` rows. Returns four times ``(N,)``.
    """
    inclusion = _inclusion(states, weight, bias, reads, scales, shortlist, actions)
    tokens, certain = _draw(inclusion)
    log_odds = inclusion[tokens].log()

    base_top, base = shortlist.logits, _rows_of(states, weight, bias, scales, tokens)
    delta_top = torch.stack([shortlist_product(*read, shortlist.ids) for read in reads]).sum(dim=0)
    delta = torch.stack([F.linear(inputs.to(rows.dtype), rows[tokens]).float() for inputs, rows in reads])
    delta_top, delta = scales.correction * delta_top, scales.correction * delta.sum(dim=0)

    listed = _listed(shortlist.ids, tokens, weight.shape[0])
    virtual = _virtual_logits(base, log_odds, certain, listed, shortlist.tail_logsumexp)
    slots = torch.cat([base_top, virtual], dim=1)
    delta = torch.cat([delta_top, delta.masked_fill(listed, 0.0)], dim=1)
    logits = slots + delta
    logps, base_logps = logits.log_softmax(dim=-1), slots.log_softmax(dim=-1)

    kl = divergence("reverse_kl", logits, slots, logps, base_logps)
    penalty = kl
    if anchor == "logit_l1":
        penalty = _logit_l1(torch.cat([base_top, base], dim=1), delta, log_odds, listed, weight.shape[0])
    elif anchor != "reverse_kl":
        penalty = divergence(anchor, logits, slots, logps, base_logps)
    # A virtual slot is a crowd of tokens: each has the sampled token's own, smaller, probability.
    crowd = torch.where(listed, 0.0, virtual - base)
    tail_probs = logps[:, base_top.shape[1] :].exp()
    spread = entropy(logps, None) + (tail_probs * crowd).sum(dim=-1)
    # The base tail's entropy is known as well: take out what the sample gets wrong about it.
    tau = shortlist.tail_logsumexp.unsqueeze(1)
    estimate = ((virtual - tau).exp() * (tau - base)).sum(dim=-1)
    spread = spread - tail_probs.sum(dim=-1) * (estimate - shortlist.tail_entropy)

    columns = _columns_of(actions, shortlist.ids[at], tokens)
    return PolicyTerms(logps[at].gather(1, columns.unsqueeze(1)).squeeze(1), penalty[at], kl[at], spread[at])


@torch.no_grad()
def _inclusion(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reads: list[Reads],
    scales: Scales,
    shortlist: Shortlist,
    actions: Tensor,
) -> Tensor:
    """Probability of each token to be looked at by all positions, ``(V,)``, positive everywhere; 1 for the actions."""
    probe = torch.randperm(len(states), device=states.device)[:PROBE_STATES]
    base = F.linear(states[probe].to(weight.dtype), weight, bias).float() * scales.base
    logits = base.clone()
    for inputs, readout in reads:
        logits += scales.correction * F.linear(inputs[probe].to(readout.dtype), readout).float()
    ids = shortlist.ids[probe]
    on_base, on_policy, uniform = PROPOSAL_SHARES
    proposal = on_base * base.scatter_(1, ids, MASKED).softmax(dim=-1).mean(dim=0)
    proposal += on_policy * logits.scatter_(1, ids, MASKED).softmax(dim=-1).mean(dim=0)
    proposal += uniform / weight.shape[0]
    return (proposal * NUM_SAMPLES).clamp_(max=1.0).index_fill_(0, actions, 1.0)


@torch.no_grad()
def _draw(inclusion: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic sample: ids of the drawn tokens, ascending, and which of them were certain."""
    certain = inclusion >= 1.0
    exact = torch.float64 if inclusion.device.type != "mps" else torch.float32  # MPS has nothing finer
    steps = inclusion.to(exact).masked_fill(certain, 0.0).cumsum(dim=0)
    steps = (steps + torch.rand((), dtype=exact, device=steps.device)).floor()
    drawn = steps > torch.cat([steps.new_zeros(1), steps[:-1]])
    tokens = (drawn | certain).nonzero().squeeze(1)
    return tokens, certain[tokens]


def _rows_of(states: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales, tokens: Tensor) -> Tensor:
    """Reference logits of the tokens at every position, ``(U, C)`` float32."""
    own_bias = None if bias is None else bias[tokens]
    return F.linear(states.to(weight.dtype), weight[tokens], own_bias).float() * scales.base


def _listed(ids: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Which tokens are on a position's shortlist already, ``(U, C)``."""
    place = torch.full((vocab_size,), len(tokens), device=ids.device)
    place[tokens] = torch.arange(len(tokens), device=ids.device)
    hits = torch.zeros(len(ids), len(tokens) + 1, dtype=torch.bool, device=ids.device)
    return hits.scatter_(1, place[ids], True)[:, :-1]


def _virtual_logits(base: Tensor, log_odds: Tensor, certain: Tensor, listed: Tensor, tau: Tensor) -> Tensor:
    """Base logits of slots whose masses sum to ``exp(tau)``: certain tokens keep theirs, sampled ones share the rest.

    Shape:
        base ``(U, C)``, log_odds and certain ``(C,)``, listed ``(U, C)``, tau ``(U,)``; returns ``(U, C)``.
    """
    own = base.masked_fill(listed, MASKED)
    known = own.masked_fill(~certain, MASKED).logsumexp(dim=-1)
    # Rounding may make the certain tokens heavier than the whole tail.
    rest = tau + torch.log1p(-(known - tau).exp().clamp(max=1.0 - 1e-6))
    weighed = (own - log_odds).masked_fill(certain | listed, MASKED)
    shared = weighed + (rest - weighed.logsumexp(dim=-1)).unsqueeze(1)
    return torch.where(certain | listed, own, shared)


def _logit_l1(base: Tensor, delta: Tensor, log_odds: Tensor, listed: Tensor, vocab_size: int) -> Tensor:
    """Horvitz-Thompson estimate of ``mean |delta| / (std(l) + 1)`` over the vocabulary, ``(U,)``."""
    size = base.shape[1] - listed.shape[1]
    weights = torch.cat([torch.ones_like(base[:, :size]), (-log_odds).exp() * ~listed], dim=1)
    total = weights.sum(dim=-1)
    mean = (weights * base).sum(dim=-1) / total
    variance = (weights * (base - mean.unsqueeze(1)).square()).sum(dim=-1) / (total - 1.0)
    return (weights * delta.abs()).sum(dim=-1) / vocab_size / (variance.sqrt() + 1.0)


def _columns_of(actions: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """Slot of each action: its place on the shortlist, else behind that among the common tokens, ``(N,)``."""
    hits = ids == actions.unsqueeze(1)
    common = ids.shape[1] + torch.searchsorted(tokens, actions)
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), common)
