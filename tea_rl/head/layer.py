"""The TEA head: a drop-in for ``lm_head`` that adds the ensemble's correction to the reference logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.full_vocabulary import Reads, Scales, fused_terms
from tea_rl.head.members import PackedMembers
from tea_rl.head.policy import (
    PolicyTerms,
    Shortlist,
    action_logps,
    build_shortlist,
    entropy,
    shortlist_product,
)
from tea_rl.head.sampled import sampled_terms
from tea_rl.objectives.anchor import divergence

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.rollout.trajectory import TokenBatch

#: Shortlist of ``shortlist_size: auto`` where the recorded tokens bring none.
AUTO_SHORTLIST_SIZE = 128
#: States whose reference logits are alive at once while such shortlists are made.
_SHORTLIST_BLOCK = 64


class TeaHead(nn.Module):
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
        base_model_name_or_path, reference_digest, base_settings: the base model it belongs to and how that was loaded
            (None and empty for a bare output layer).

    Raises:
        TeaError: if the output layer has no plain weight matrix, or the shortlist exceeds the vocabulary.
    """

    def __init__(
        self,
        reference: nn.Module,
        config: HeadConfig | None = None,
        *,
        logit_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = config or HeadConfig()
        weight = getattr(reference, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise TeaError(
                f"a TEA head needs an output layer with a plain (vocabulary x hidden) weight, got {type(reference).__name__}; "
                "keep lm_head out of the quantization"
            )
        self.config = config
        self.vocab_size, self.hidden_size = weight.shape
        size = config.shortlist_size
        if isinstance(size, int) and size >= self.vocab_size:
            raise TeaError(
                f"head.shortlist_size {size} does not fit a vocabulary of {self.vocab_size} tokens; "
                'take a smaller one, or "all"'
            )
        #: ``k``; the whole vocabulary in full-vocabulary mode.
        self.shortlist_size = size if isinstance(size, int) else self.vocab_size
        #: Numbers a position carries: ``D``, and as many for every running mean of `HeadConfig.context`.
        self.state_width = self.hidden_size * (1 + config.context.num_means)
        self.weight = weight
        self.bias = getattr(reference, "bias", None)
        for shared in (self.weight, self.bias):
            if shared is not None:
                shared.requires_grad_(False)
        self.logit_scale = logit_scale
        self.strength = 1.0
        self.base_model_name_or_path: str | None = None
        self.reference_digest: str | None = None
        self.base_settings: dict[str, Any] = {}
        self.members = PackedMembers(config, self.hidden_size, seed, self.vocab_size).to(weight.device)
        self.reference_delta = None
        if config.train_reference:
            self.reference_delta = nn.Parameter(torch.zeros(weight.shape, device=weight.device))

    @classmethod
    def for_backbone(cls, backbone: Backbone, config: HeadConfig | None = None, seed: int = 0) -> TeaHead:
        """A fresh head for a backbone (not installed yet); it corrects nothing until it is trained."""
        head = cls(backbone.reference, config, logit_scale=backbone.logit_scale, seed=seed)
        head.base_model_name_or_path, head.reference_digest = backbone.name_or_path, backbone.digest
        head.base_settings = backbone.settings
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

    @property
    def full_vocabulary(self) -> bool:
        """True for ``shortlist_size`` "all" and "auto": every token is corrected, the tail is empty."""
        return self.config.shortlist_size in ("all", "auto")

    def reference_states(self, states: Tensor) -> Tensor:
        """What the reference head reads of (possibly wide) states: the hidden state, ``(..., D)``."""
        return states if states.shape[-1] == self.hidden_size else states[..., : self.hidden_size]

    # -- logits -------------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Full logits, as the model's ``lm_head`` would return them (before the model's own logit scale).

        Shape:
            hidden_states ``(..., D)``, or wide with context on; returns ``(..., V)``, float32: added in half precision,
            small corrections would vanish.

        Raises:
            TeaError: if context is on and the running means are missing.
        """
        if hidden_states.shape[-1] != self.state_width and self.config.context.num_means:
            raise TeaError(
                f"a head with context reads {self.state_width} numbers a position (hidden state and running means), got "
                f"{hidden_states.shape[-1]}; call the wrapped model of backbone.install(head), not the bare head"
            )
        raw = F.linear(self.reference_states(hidden_states), self.weight, self.bias).float()
        if self.strength == 0.0:
            return raw
        states = hidden_states.reshape(-1, self.state_width)
        flat = raw.view(-1, self.vocab_size)
        if self.full_vocabulary:
            out = flat + self.strength * self._full_correction(states)
        else:
            ids = flat.topk(self.shortlist_size, dim=-1).indices
            delta, shift = self.shortlist_correction(states, ids)
            # policy logits are logit_scale * raw, and the shift is in policy units
            tail = flat + (self.strength / self.logit_scale) * shift.unsqueeze(1)
            out = tail.scatter(1, ids, flat.gather(1, ids) + (self.strength / self.logit_scale) * delta)
        return out.view(raw.shape)

    def reference_logits(self, hidden_states: Tensor, temperature: float = 1.0) -> Tensor:
        """Policy logits of the original model, ``(N, V)`` float32, in a buffer that the caller may overwrite."""
        states = self.reference_states(hidden_states)
        logits = F.linear(states.to(self.weight.dtype), self.weight, self.bias)
        factor = self.logit_scale / temperature
        logits = logits.float() if logits.dtype != torch.float32 else logits
        return logits if factor == 1.0 else logits.mul_(factor)

    def shortlist_correction(self, hidden_states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections at strength 1 and temperature 1, in policy units.

        Shape:
            hidden_states ``(N, D)``, ids ``(N, k)``; returns ``(N, k)`` and the tail shift ``(N,)``.
        """
        g, shift = self.members(hidden_states)
        products = [shortlist_product(*read, ids) for read in self.reads(hidden_states, g)]
        return self.logit_scale * torch.stack(products).sum(dim=0), shift

    def reads(self, hidden_states: Tensor, g: Tensor) -> list[Reads]:
        """The products whose sum is the correction (before ``logit_scale``), given what the members returned."""
        own = Reads(g, self.weight if self.config.readout == "tied" else self.members.vocab_readout)
        if self.reference_delta is None:
            return [own]
        states = self.reference_states(hidden_states).float()
        # The moved reference also reads what the reference reads.
        return [own, Reads(states + g if self.config.readout == "tied" else states, self.reference_delta)]

    def slot_logits(self, hidden_states: Tensor, shortlist: Shortlist, temperature: float = 1.0) -> Tensor:
        """Policy logits of the slots at this head's strength, ``(N, k + 1)``."""
        base = shortlist.slot_logits()
        if self.strength == 0.0:
            return base
        delta, shift = self.shortlist_correction(hidden_states, shortlist.ids)
        return base + (self.strength / temperature) * torch.cat([delta, shift.unsqueeze(1)], dim=1)

    def full_logits(self, hidden_states: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        """Policy logits of the whole vocabulary (``full_vocabulary``), ``(N, V)``, from the reference logits."""
        if self.strength == 0.0:
            return reference
        scale = self.strength * self.logit_scale / temperature
        return reference + scale * self._full_correction(hidden_states)

    def _full_correction(self, hidden_states: Tensor) -> Tensor:
        g, _ = self.members(hidden_states)
        reads = self.reads(hidden_states, g)
        return sum(  # type: ignore[return-value]
            F.linear(inputs.to(weight.dtype), weight).float() for inputs, weight in reads
        )

    def shortlist_of(
        self, hidden_states: Tensor, temperature: float = 1.0, size: int | None = None
    ) -> tuple[Shortlist, Tensor]:
        """Reference shortlist of positions, and the tail's distribution ``(N, V)`` (see `build_shortlist`).

        ``size`` None is the head's own; heads of the full vocabulary have none and must be told.
        """
        if size is None and self.full_vocabulary:
            raise TeaError(f'shortlist_size "{self.config.shortlist_size}" has no shortlist; use full_logits')
        size = self.shortlist_size if size is None else size
        return build_shortlist(self.reference_logits(hidden_states, temperature), size)

    # -- what a loss needs --------------------------------------------------------------------------------------------

    def terms(self, batch: TokenBatch, temperature: float = 1.0, anchor: str = "reverse_kl") -> PolicyTerms:
        """What a loss needs of recorded tokens, the way ``shortlist_size`` asks for; differentiable.

        "auto" is exact in evaluation mode and an estimate in training mode (`sampled_terms`).

        Tokens chosen in the same state (equal ``state_ids``) share all work but that on the action. A batch's shortlist must
        have been made at ``temperature``; with "all" it is ignored and may be missing.

        Returns:
            four times ``(N,)``, in the order of the batch.

        Raises:
            TeaError: if the batch's shortlist is of another size than the head's.
        """
        # Short answers are mostly tokens of few states.
        states, at = torch.unique(batch.state_ids, return_inverse=True)
        first = torch.empty_like(states).scatter_(0, at, torch.arange(len(at), device=at.device))
        cached = batch.shortlist
        shortlist = None if cached is None else Shortlist(*(part[first] for part in cached))
        if self.config.shortlist_size == "auto" and self.training:
            return self.sampled_terms(batch.states[first], batch.actions, shortlist, temperature, anchor, at)
        if self.full_vocabulary:
            return self.full_terms(batch.states[first], batch.actions, temperature, anchor, at)
        size = None if shortlist is None else shortlist.ids.shape[1]
        if shortlist is None or size != self.shortlist_size:
            raise TeaError(
                f"head.shortlist_size is {self.shortlist_size}, but the recorded tokens have {size or 'no shortlist'}; "
                "use the size they were recorded with"
            )
        return self.shortlist_terms(
            batch.states[first], shortlist, batch.slots, batch.within_tail_logps, temperature, anchor, at
        )

    def shortlist_terms(
        self,
        hidden_states: Tensor,
        shortlist: Shortlist,
        slots: Tensor,
        within_tail_logps: Tensor,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
    ) -> PolicyTerms:
        """Log-probability of the actions, anchor, exact KL to the original model and entropy, from cached shortlists.

        Differentiable with respect to the ensemble.

        Shape:
            hidden_states ``(U, D)`` and shortlist of ``U`` rows; slots and within_tail_logps ``(N,)``; ``at`` ``(N,)``: the
            row of each action's state (None: ``U = N``, each its own). Returns four times ``(N,)``.
        """
        delta, shift = self.shortlist_correction(hidden_states, shortlist.ids)
        return self.terms_of_correction(
            delta, shift, shortlist, slots, within_tail_logps, temperature, anchor, at
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
        if at is not None:
            logps, penalty, kl, spread = logps[at], penalty[at], kl[at], spread[at]
        return PolicyTerms(action_logps(logps, slots, within_tail_logps), penalty, kl, spread)

    def full_terms(
        self,
        hidden_states: Tensor,
        actions: Tensor,
        temperature: float = 1.0,
        anchor: str = "reverse_kl",
        at: Tensor | None = None,
    ) -> PolicyTerms:
        """`shortlist_terms` over the whole vocabulary, without ever holding ``N x V`` numbers.

        ``actions`` are token ids ``(N,)``; see `tea_rl.head.full_vocabulary`.
        """
        g, _ = self.members(hidden_states)
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
        g, _ = self.members(hidden_states)
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

    @torch.no_grad()
    def disagreement(self, hidden_states: Tensor) -> Tensor:
        """Variance of the members' corrections on the shortlist, averaged over it: how unsure the ensemble is.

        Zero for a fresh head and for a single member. Shape: ``(..., D)`` to ``(...)``, in squared logit units.
        """
        states = hidden_states.reshape(-1, self.state_width)
        size = min(128, self.shortlist_size)
        ids = self.reference_logits(states).topk(size, dim=-1).indices
        per_member, _ = self.members.corrections_per_member(states)
        readout = self.weight if self.config.readout == "tied" else self.members.vocab_readout
        deltas = torch.stack([shortlist_product(g, readout, ids) for g in per_member])
        variance = deltas.mul_(self.logit_scale).var(dim=0, correction=0).mean(dim=-1)
        return variance.view(hidden_states.shape[:-1])
