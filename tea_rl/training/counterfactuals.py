"""What a completion would have earned with one of its tokens replaced: ``objective.counterfactuals``.

A reward of a whole completion says nothing of its single tokens. Rewards cost next to nothing beside generating, so they can be
asked: token ``t`` is replaced by another one ``b`` that the policy might have chosen there, the rest is left as it is, and

    change = R(y_1 .. b .. y_T) - R(y_1 .. y_t .. y_T)

A token's own credit is by how much its completion beats those with another token in its place, ``-change`` on the mean: the idea of
the counterfactual baseline of Foerster et al. (2018, COMA, eq. 4), with the reward itself where they fit a critic. Theirs counts the
token taken as well and weighs by the policy; here only others are asked, the unlikely ones more often, so that a likely token's
credit is larger than theirs by ``1 / (1 - pi)`` and the mean over the policy is not 0. The luck of the other tokens is not in it. What the rest
would have become behind another token is not in it either: the completion's advantage keeps the other part (`tea_rl.training.drawn.credit`).

The last token of a completion that ended by itself stays; an alternative that ends a completion ends it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import Rollout
from tea_rl.rollout.decode import ending_tokens
from tea_rl.rollout.trajectory import TokenBatch

#: Alternatives are drawn from the policy at so many times its temperature: likely enough, and not always the same ones.
_FLATTENED = 2.0


class Counterfactuals(NamedTuple):
    """``E`` completions with one token replaced, and what became of their rewards.

    Shape:
        at ``(E,)``, number of the token in its rollout; actions ``(E,)``, the token that stands there instead; changes ``(E,)``
        float32, reward of the changed completion minus that of the sampled one; all on the CPU.
    """

    at: Tensor
    actions: Tensor
    changes: Tensor


@torch.no_grad()
def ask(
    backbone: Backbone,
    head: TeaHead,
    rollout: Rollout,
    rewards: Tensor,
    score: Callable[[Sequence[str]], Sequence[float]],
    count: int,
    temperature: float,
    stop: tuple[str, ...],
    generator: torch.Generator,
) -> Counterfactuals:
    """Replace tokens and ask what the completions earn.

    Each of ``count`` rounds replaces one token of every completion, and its texts are scored together, as those of a rollout
    are: a reward may compare them. A completion's tokens take turns; none comes twice before all came once.

    Args:
        rollout: made with a shortlist.
        rewards: of its completions, NaN where unknown, ``(B,)``.
        score: rewards of as many texts, one for each completion, NaN where unknown.
        temperature: of the rollout.
        stop: strings that end a completion.
        generator: draws positions and alternatives; on the CPU.

    Returns:
        those whose both rewards are known, at most ``B * count``.
    """
    tokens, ending = rollout.tokens, ending_tokens(backbone, stop).cpu()
    rounds = _positions(rollout, count, generator)
    at = torch.cat(rounds)
    actions = _alternatives(head, tokens.select(at.to(tokens.rows.device)), temperature, generator)

    sampled = [ids.tolist() for ids in tokens.actions.cpu().split(rollout.lengths.tolist())]
    starts = (rollout.lengths.cumsum(dim=0) - rollout.lengths).tolist()
    rows, ends = tokens.rows.cpu(), ending[actions].tolist()
    found: list[Tensor] = []
    done = 0
    for positions in rounds:
        texts = [list(ids) for ids in sampled]
        own = slice(done, done + len(positions))
        done += len(positions)
        replaced = zip(positions.tolist(), actions[own].tolist(), ends[own], strict=True)
        for place, action, is_end in replaced:
            row = int(rows[place])
            offset = place - starts[row]
            texts[row][offset] = action
            if is_end:
                del texts[row][offset + 1 :]
        earned = torch.tensor(
            score(backbone.tokenizer.batch_decode(texts, skip_special_tokens=True)), dtype=torch.float32
        )
        found.append((earned - rewards)[rows[positions]])
    changes = torch.cat(found)
    known = ~changes.isnan()
    return Counterfactuals(at[known], actions[known], changes[known])


def _alternatives(
    head: TeaHead, tokens: TokenBatch, temperature: float, generator: torch.Generator
) -> Tensor:
    """Another token of the shortlist for each, ``(N,)`` on the CPU."""
    training = head.training
    head.eval()
    assert tokens.shortlist is not None  # the recipe is checked for it
    logits = head.slot_logits(tokens.states, tokens.shortlist, temperature)[:, :-1].float()
    head.train(training)
    logits = logits.masked_fill(tokens.shortlist.ids == tokens.actions.unsqueeze(1), -torch.inf)
    slots = torch.multinomial((logits / _FLATTENED).softmax(dim=-1).cpu(), 1, generator=generator)
    return tokens.shortlist.ids.cpu().gather(1, slots).squeeze(1)


def _positions(rollout: Rollout, count: int, generator: torch.Generator) -> list[Tensor]:
    """Tokens to replace in each round: one of every completion that has any, which take turns in random order."""
    rows, lengths = rollout.tokens.rows.cpu(), rollout.lengths.cpu()
    places = torch.arange(len(rows))
    last = lengths.cumsum(dim=0) - 1
    free = torch.ones(len(rows), dtype=torch.bool)
    free[last[rollout.finished.cpu()]] = False
    # In random order within each completion.
    order = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    places = places[torch.argsort(rows + order)]
    places = places[free[places]]
    sizes = torch.bincount(rows[places], minlength=len(lengths))
    starts, some = sizes.cumsum(dim=0) - sizes, sizes > 0
    return [places[starts[some] + number % sizes[some]] for number in range(count)]


def own_credit(edits: Counterfactuals, count: int) -> tuple[Tensor, Tensor]:
    """What each of ``count`` tokens adds to its completion's reward, float32, and whether it was asked for (0 where not), ``(count,)`` each."""
    total, asked = torch.zeros(count), torch.zeros(count)
    total.index_add_(0, edits.at, -edits.changes)
    asked.index_add_(0, edits.at, torch.ones(len(edits.at)))
    return total / asked.clamp(min=1), asked > 0
