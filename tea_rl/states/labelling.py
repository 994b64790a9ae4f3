"""From states and the tokens that followed them to what a store keeps of each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import Shortlist, action_logps, build_shortlist
from tea_rl.head.scratch import Scratch
from tea_rl.rollout.trajectory import TokenBatch

#: States whose full-vocabulary logits are alive at once.
_CHUNK = 64


class TokenLabeller:
    """Looks tokens up in the reference head's shortlists.

    Args:
        head: gives the reference head; its ensemble is not asked.
        shortlist_size: ``k``.
        temperature: divides the logits.
    """

    def __init__(self, head: TeaHead, shortlist_size: int, temperature: float) -> None:
        self._head = head
        self.shortlist_size, self.temperature = shortlist_size, temperature
        self._scratch = Scratch()

    @classmethod
    def for_backbone(cls, backbone: Backbone, shortlist_size: int, temperature: float) -> TokenLabeller:
        """A labeller with the backbone's output layer."""
        smallest = HeadConfig(num_members=1, hidden_sizes=[1], shortlist_size=shortlist_size)
        return cls(TeaHead.for_backbone(backbone, smallest), shortlist_size, temperature)

    @torch.no_grad()
    def label(self, states: Tensor, actions: Tensor, lengths: Sequence[int]) -> TokenBatch:
        """Records of tokens as if the original model had sampled them (``logps`` equals ``base_logps``).

        Shape:
            states ``(N, W)``, wide or not; actions ``(N,)`` token ids; ``lengths``: tokens of each row, summing to ``N``.
        """
        parts = [
            self._shortlist(some, chosen)
            for some, chosen in zip(states.split(_CHUNK), actions.split(_CHUNK), strict=True)
        ]
        shortlist = Shortlist(*(torch.cat(column) for column in zip(*(p[0] for p in parts), strict=True)))
        within_tail = torch.cat([part[1] for part in parts])
        matches = shortlist.ids == actions.unsqueeze(1)
        in_tail = ~matches.any(dim=1)
        slots = torch.where(in_tail, self.shortlist_size, matches.int().argmax(dim=1))
        within_tail = torch.where(in_tail, within_tail, 0.0)
        base_logps = action_logps(shortlist.slot_logits().log_softmax(dim=-1), slots, within_tail)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths))
        zeros = torch.zeros_like(base_logps)
        return TokenBatch(
            states=states,
            shortlist=shortlist,
            actions=actions,
            slots=slots,
            within_tail_logps=within_tail,
            logps=base_logps,
            base_logps=base_logps,
            kl=zeros,
            entropy=zeros,
            state_ids=torch.arange(len(actions)),
            rows=rows,
            positions=torch.cat([torch.arange(length) for length in lengths]),
        )

    def _shortlist(self, states: Tensor, actions: Tensor) -> tuple[Shortlist, Tensor]:
        """Shortlists, and ``l_a - tau`` of every action (of use where it lies in the tail)."""
        logits = self._head.reference_logits(states, self.temperature, self._scratch)
        # Before `build_shortlist` overwrites them.
        chosen = logits.gather(1, actions.unsqueeze(1)).squeeze(1)
        shortlist, _ = build_shortlist(logits, self.shortlist_size, self._scratch)
        return shortlist, chosen - shortlist.tail_logsumexp
