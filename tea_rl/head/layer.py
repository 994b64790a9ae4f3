"""The TEA head: a drop-in for ``lm_head`` that adds the ensemble's correction to the reference logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tea_rl.errors import TeaError
from tea_rl.head.compiled_terms import compiled_terms
from tea_rl.head.config import HeadConfig
from tea_rl.head.full_vocabulary import Scales, fused_terms
from tea_rl.head.logits import CorrectedLogits
from tea_rl.head.policy import PolicyTerms, Shortlist, action_logps, entropy, expected_value
from tea_rl.head.returns import shared_work
from tea_rl.head.sampled import sampled_terms
from tea_rl.objectives.anchor import divergence

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.rollout.trajectory import TokenBatch

#: Shortlist of ``shortlist_size: auto`` where the recorded tokens bring none.
AUTO_SHORTLIST_SIZE = 128
#: States whose reference logits are alive at once while such shortlists are made.
_SHORTLIST_BLOCK = 64
#: Share of different states among tokens above which every token does its own work on a shortlist.
_MOSTLY_ALONE = 0.8


class TeaHead(CorrectedLogits):
    """Original output layer plus an ensemble of residual networks over the same state.

    ``head(h)`` returns the full logits of the policy of DESIGN section 3, so that ``model.lm_head = head`` works with
    ``generate``, pipelines and trainers. The reference weight is **shared, not copied**, gets frozen, and never changes; with
    ``train_reference`` a separate, zero-initialised difference to it is trained.

    Args:
        reference: the original output layer (``nn.Linear`` or alike, weight ``(V, D)``).
        config: shape of the ensemble.
        logit_scale: factor the model applies to the output of its ``lm_head``; policies include it.
        seed: of the initialisation.

    Attributes:
        strength: inference-time scale ``alpha`` of the correction; 0 is the original model exactly.
        uses_compiler: whether products with shortlists are compiled code, see `use_compiler`.
        compiles_terms: whether `terms` that are differentiated are, gradients and all, where they can be; see `compiled_terms`.
        writes_products: whether products with shortlists are written in basic operations, while a compiler looks on.
        asked_return: the desired return, ``()`` or ``(B,)``, with ``return_conditioning``; see `set_return`.
        base_model_name_or_path, reference_digest, base_settings: the base model it belongs to and how that was loaded
            (None and empty for a bare output layer).

    Raises:
        TeaError: if the output layer has no plain weight matrix, or the shortlist exceeds the vocabulary.
    """

    @classmethod
    def for_backbone(cls, backbone: Backbone, config: HeadConfig | None = None, seed: int = 0) -> TeaHead:
        """A fresh head for a backbone (not installed yet); it corrects nothing until it is trained."""
        head = cls(backbone.reference, config, logit_scale=backbone.logit_scale, seed=seed)
        head.base_model_name_or_path, head.reference_digest = backbone.name_or_path, backbone.digest
        head.base_settings = backbone.settings
        head.uses_compiler = backbone.compile
        return head

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head (not the base model) into ``folder``; see `tea_rl.head.checkpoint`."""
        from tea_rl.head.checkpoint import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: Backbone) -> TeaHead:
        """Load a saved head for the backbone it was trained on; see `tea_rl.head.checkpoint`."""
        from tea_rl.head.checkpoint import from_pretrained

        return from_pretrained(folder, backbone)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Save the head and upload it to the Hugging Face Hub; returns the address of the commit."""
        from tea_rl.head.checkpoint import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything that learns: the ensemble and, with ``train_reference``, the difference to the reference."""
        own = list(self.members.parameters())
        return own if self.reference_delta is None else [*own, self.reference_delta]

    def head_state(self) -> dict[str, Tensor]:
        """State without the shared reference weight: what a saved head holds."""
        return {name: value for name, value in self.state_dict().items() if name not in ("weight", "bias")}

    def is_finite(self) -> bool:
        """Whether every trainable number is finite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trainable_parameters())

    # -- what a loss needs --------------------------------------------------------------------------------------------

    def terms(
        self,
        batch: TokenBatch,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        returns: Tensor | None = None,
        token_values: Tensor | None = None,
    ) -> PolicyTerms:
        """What a loss needs of recorded tokens, the way ``shortlist_size`` asks for; differentiable.

        "auto" is exact in evaluation mode and an estimate in training mode (`sampled_terms`).

        Tokens chosen in the same state (equal ``state_ids``) share all work but that on the action. A batch's shortlist must
        have been made at ``temperature``; with "all" it is ignored and may be missing.

        Args:
            returns: desired return of each token's completion, ``(N,)`` or ``()``, NaN where unknown; None: the one set.
            token_values: worth of every token of the vocabulary, ``(V,)``, whose expectation is wanted; a shortlist is needed.

        Returns:
            four or five times ``(N,)``, in the order of the batch.

        Raises:
            TeaError: if the batch's shortlist is of another size than the head's, or the returns do not fit.
        """
        asked = self.asked_return if returns is None else returns
        # Short answers are mostly tokens of few states.
        states, at = torch.unique(shared_work(batch.state_ids, asked), return_inverse=True)
        read, shortlist = batch.states, batch.shortlist
        if not self.full_vocabulary and len(states) > _MOSTLY_ALONE * len(at):
            at = None  # to look shared work up would cost more than to do it again
        else:
            first = torch.empty_like(states).scatter_(0, at, torch.arange(len(at), device=at.device))
            read = read[first]
            shortlist = None if shortlist is None else Shortlist(*(part[first] for part in shortlist))
            if asked is not None and asked.dim():
                asked = asked[first]
        if self.config.shortlist_size == "auto" and self.training:
            return self.sampled_terms(read, batch.actions, shortlist, temperature, anchor, at, asked)
        if self.full_vocabulary:
            return self.full_terms(read, batch.actions, temperature, anchor, at, asked)
        size = None if shortlist is None else shortlist.ids.shape[1]
        if shortlist is None or size != self.shortlist_size:
            raise TeaError(
                f"head.shortlist_size is {self.shortlist_size}, but the recorded tokens have {size or 'no shortlist'}; "
                "use the size they were recorded with"
            )
        given = (read, shortlist, batch.slots, batch.within_tail_logps, temperature, anchor)
        if self.compiles_terms and at is None:
            found = compiled_terms(self, *given, asked, token_values)
            if found is not None:
                return found
        return self.shortlist_terms(*given, at, asked, token_values)

    def shortlist_terms(
        self,
        hidden_states: Tensor,
        shortlist: Shortlist,
        slots: Tensor,
        within_tail_logps: Tensor,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
        returns: Tensor | None = None,
        token_values: Tensor | None = None,
    ) -> PolicyTerms:
        """Log-probability of the actions, anchor, exact KL to the original model and entropy, from cached shortlists.

        Differentiable with respect to the ensemble.

        Shape:
            hidden_states ``(U, D)`` and shortlist of ``U`` rows; slots and within_tail_logps ``(N,)``; ``at`` ``(N,)``: the
            row of each action's state (None: ``U = N``, each its own); desired returns as in `read_members`, ``(U,)``. Returns
            four times ``(N,)``.
        """
        delta, shift = self.shortlist_correction(hidden_states, shortlist.ids, returns)
        return self.terms_of_correction(
            delta, shift, shortlist, slots, within_tail_logps, temperature, anchor, at, token_values
        )

    def terms_of_correction(
        self,
        delta: Tensor,
        shift: Tensor,
        shortlist: Shortlist,
        slots: Tensor,
        within_tail_logps: Tensor,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
        token_values: Tensor | None = None,
    ) -> PolicyTerms:
        """`shortlist_terms` from what `shortlist_correction` returned, for callers that compute it for many heads at once.

        Shape:
            delta ``(U, k)`` and shift ``(U,)``, in policy units at strength 1 and temperature 1.
        """
        base = shortlist.slot_logits()
        logits = base + (self.strength / temperature) * torch.cat([delta, shift.unsqueeze(1)], dim=1)
        logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
        kl = divergence("reverse_kl", logits, base, logps, base_logps)
        penalty = kl if anchor == "reverse_kl" else divergence(anchor, logits, base, logps, base_logps)
        spread = entropy(logps, shortlist.tail_entropy)
        value = None if token_values is None else expected_value(logps, token_values[shortlist.ids])
        if at is not None:
            logps, penalty, kl, spread = logps[at], penalty[at], kl[at], spread[at]
            value = value if value is None else value[at]
        return PolicyTerms(action_logps(logps, slots, within_tail_logps), penalty, kl, spread, value)

    def full_terms(
        self,
        hidden_states: Tensor,
        actions: Tensor,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
        returns: Tensor | None = None,
    ) -> PolicyTerms:
        """`shortlist_terms` over the whole vocabulary, without ever holding ``N x V`` numbers.

        ``actions`` are token ids ``(N,)``; see `tea_rl.head.full_vocabulary`.
        """
        g, _ = self.read_members(hidden_states, returns)
        if at is None:
            at = torch.arange(len(actions), device=actions.device)
        reads = self.reads(hidden_states, g)
        states = self.reference_states(hidden_states)
        return fused_terms(
            states, self.weight, self.bias, reads, self._scales(temperature), actions, at, anchor
        )

    def sampled_terms(
        self,
        hidden_states: Tensor,
        actions: Tensor,
        shortlist: Shortlist | None,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
        returns: Tensor | None = None,
    ) -> PolicyTerms:
        """An estimate of `full_terms` from a shortlist, the actions and sampled tokens; see `tea_rl.head.sampled`.

        Draws from torch's global generator. ``shortlist`` None: it is computed here, at the cost of one reference product.
        """
        if shortlist is None:
            size = min(AUTO_SHORTLIST_SIZE, self.vocab_size - 1)
            with torch.no_grad():
                parts = [
                    self.shortlist_of(block, temperature, size)[0]
                    for block in hidden_states.split(_SHORTLIST_BLOCK)
                ]
            shortlist = Shortlist(*(torch.cat(column) for column in zip(*parts, strict=True)))
        g, _ = self.read_members(hidden_states, returns)
        if at is None:
            at = torch.arange(len(actions), device=actions.device)
        reads = self.reads(hidden_states, g)
        states = self.reference_states(hidden_states)
        return sampled_terms(
            states, self.weight, self.bias, reads, self._scales(temperature), shortlist, actions, at, anchor
        )

    def _scales(self, temperature: float) -> Scales:
        base = self.logit_scale / temperature
        return Scales(base, self.strength * base)
