"""Logits of a TEA head: the reference logits and what the ensemble adds to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.devices import product_dtype
from tea_rl.errors import TeaError
from tea_rl.generated import CompilerFailed, Generated, compiler_failed
from tea_rl.head.config import HeadConfig
from tea_rl.head.full_vocabulary import Reads
from tea_rl.head.members import PackedMembers
from tea_rl.head.policy import (
    Shortlist,
    build_shortlist,
    compiled_product,
    largest,
    shortlist_product,
    written_product,
)
from tea_rl.head.returns import ReturnModulation, as_return, returns_of_positions
from tea_rl.head.scratch import Scratch
from tea_rl.packed_linear import PackedOutput
from tea_rl.w8a8 import W8A8Output

#: Products of half precision are taken by blocks of this many tokens of the vocabulary.
_VOCABULARY_BLOCK = 8192
#: Members are compared over at most so many of the likeliest tokens.
_COMPARED = 128


class CorrectedLogits(nn.Module):
    """The part of `tea_rl.head.layer.TeaHead` that reads states and gives logits; arguments and attributes are stated there."""

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
        # A bound method: as a submodule the layer would be saved with the head.
        self._fast_product = reference.logits if isinstance(reference, W8A8Output | PackedOutput) else None
        self.bias = getattr(reference, "bias", None)
        for shared in (self.weight, self.bias):
            if shared is not None:
                shared.requires_grad_(False)
        self.logit_scale = logit_scale
        self.strength = 1.0
        self.asked_return: Tensor | None = None
        self.uses_compiler = self.compiles_terms = self.writes_products = False
        self.base_model_name_or_path: str | None = None
        self.reference_digest: str | None = None
        self.base_settings: dict[str, Any] = {}
        self.members = PackedMembers(config, self.hidden_size, seed, self.vocab_size).to(weight.device)
        self.members.product_dtype = product_dtype(weight)
        self.reference_delta = None
        if config.train_reference:
            self.reference_delta = nn.Parameter(torch.zeros(weight.shape, device=weight.device))

    @property
    def full_vocabulary(self) -> bool:
        """True for ``shortlist_size`` "all" and "auto": every token is corrected, the tail is empty."""
        return self.config.shortlist_size in ("all", "auto")

    def reference_states(self, states: Tensor) -> Tensor:
        """What the reference head reads of (possibly wide) states: the hidden state, ``(..., D)``."""
        return states if states.shape[-1] == self.hidden_size else states[..., : self.hidden_size]

    # -- desired return -----------------------------------------------------------------------------------------------

    def set_return(self, value: float | Tensor | None) -> None:
        """Ask for a return from now on, wherever none is given explicitly; None asks for nothing in particular.

        Args:
            value: one number for every row, or a tensor ``(B,)`` with one for each row of the batches to come (NaN: unknown).

        Raises:
            TeaError: for a head without ``return_conditioning``, or a value that is no return.
        """
        if value is not None:
            self._check_conditioning()
        self.asked_return = None if value is None else as_return(value).to(self.weight.device)

    def fit_returns(self, returns: Tensor) -> None:
        """Take mean and standard deviation of the training returns, ``(R,)``, once before training; saved with the weights.

        Raises:
            TeaError: for a head without ``return_conditioning``, or if no return is known (not NaN) or one is infinite.
        """
        self._check_conditioning().fit(returns)

    def read_members(self, hidden_states: Tensor, returns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``g`` and tail shift of the members (see `PackedMembers`) at the desired returns, by default those that are set.

        Shape:
            hidden_states ``(N, W)``; returns ``()`` or ``(N,)``, NaN where unknown.

        Raises:
            TeaError: for a head without ``return_conditioning``, or another number of returns.
        """
        asked = self._asked(returns, hidden_states.shape[:-1])
        return self.members(hidden_states) if asked is None else self.members(hidden_states, asked)

    def _asked(self, returns: Tensor | None, positions: torch.Size) -> Tensor | None:
        """Desired return of all positions, ``()``, or of each, flat; None: nothing is asked for."""
        if returns is not None:
            self._check_conditioning()
        returns = self.asked_return if returns is None else returns
        return None if returns is None else returns_of_positions(returns.to(self.weight.device), positions)

    def _check_conditioning(self) -> ReturnModulation:
        if self.members.modulation is None:
            raise TeaError(
                "a return is asked for, but this head was made without head.return_conditioning; "
                "leave the return out, or train a head with it on"
            )
        return self.members.modulation

    # -- logits -------------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, returns: Tensor | None = None) -> Tensor:
        """Full logits, as the model's ``lm_head`` would return them (before the model's own logit scale).

        Shape:
            hidden_states ``(..., D)``, or wide with context on; desired returns (default: those set) ``()``, or with the first
            axes of hidden_states; returns ``(..., V)``, float32: added in half precision, small corrections would vanish.

        Raises:
            TeaError: if context is on and the running means are missing, or the returns do not fit.
        """
        if hidden_states.shape[-1] != self.state_width and self.config.context.num_means:
            raise TeaError(
                f"a head with context reads {self.state_width} numbers a position (hidden state and running means), got "
                f"{hidden_states.shape[-1]}; call the wrapped model of backbone.install(head), not the bare head"
            )
        raw = self._reference_product(self.reference_states(hidden_states))
        if self.strength == 0.0:
            return raw
        states = hidden_states.reshape(-1, self.state_width)
        asked = self._asked(returns, hidden_states.shape[:-1])
        flat = raw.view(-1, self.vocab_size)
        if self.full_vocabulary:
            out = flat + self.strength * self._full_correction(states, asked)
        else:
            top, ids = largest(flat, self.shortlist_size)
            delta, shift = self.shortlist_correction(states, ids, asked)
            # policy logits are logit_scale * raw, and the shift is in policy units
            strength = self.strength / self.logit_scale
            listed, shift = top + strength * delta, strength * shift.unsqueeze(1)
            if torch.is_grad_enabled():
                out = (flat + shift).scatter(1, ids, listed)
            else:  # nobody else has these logits: two passes over the vocabulary less
                out = flat.add_(shift).scatter_(1, ids, listed)
        return out.view(raw.shape)

    def reference_logits(
        self, hidden_states: Tensor, temperature: float = 1.0, scratch: Scratch | None = None
    ) -> Tensor:
        """Policy logits of the original model, ``(N, V)`` float32, in a buffer that the caller may overwrite.

        With ``scratch`` that buffer is there until the next ones are put into it, and nothing is differentiable.
        """
        states = self.reference_states(hidden_states).to(self.weight.dtype)
        logits = self._reference_product(states, scratch)
        factor = self.logit_scale / temperature
        return logits if factor == 1.0 else logits.mul_(factor)

    def _reference_product(self, states: Tensor, scratch: Scratch | None = None) -> Tensor:
        """What the reference head makes of states ``(..., D)``, ``(..., V)`` float32; with ``scratch`` of ``(N, D)``, in there."""
        if self._fast_product is not None:
            return self._fast_product(states, scratch)
        if scratch is None:
            half = self.weight.dtype != torch.float32
            if half and states.device.type == "cpu" and not torch.is_grad_enabled():
                return self._product_by_blocks(states)
            return F.linear(states, self.weight, self.bias).float()
        shape, device = (len(states), self.vocab_size), states.device
        product = scratch.take("product", shape, self.weight.dtype, device)
        if self.bias is None:
            torch.mm(states, self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, states, self.weight.t(), out=product)
        if product.dtype == torch.float32:
            return product
        return scratch.take("logits", shape, torch.float32, device).copy_(product)

    def _product_by_blocks(self, states: Tensor) -> Tensor:
        """The same without ever holding all logits in half precision: memory that is taken for one step has to be mapped first."""
        logits = states.new_empty((*states.shape[:-1], self.vocab_size), dtype=torch.float32)
        for start in range(0, self.vocab_size, _VOCABULARY_BLOCK):
            block = slice(start, start + _VOCABULARY_BLOCK)
            bias = None if self.bias is None else self.bias[block]
            logits[..., block] = F.linear(states, self.weight[block], bias)
        return logits

    def shortlist_correction(
        self, hidden_states: Tensor, ids: Tensor, returns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Corrections at strength 1 and temperature 1, in policy units.

        Shape:
            hidden_states ``(N, D)``, ids ``(N, k)``, desired returns as in `read_members`; returns ``(N, k)`` and the tail
            shift ``(N,)``.
        """
        g, shift = self.read_members(hidden_states, returns)
        products = [self._product(*read, ids) for read in self.reads(hidden_states, g)]
        total = products[0] if len(products) == 1 else products[0] + products[1]
        return (total if self.logit_scale == 1.0 else self.logit_scale * total), shift

    def use_compiler(self, setting: str = "model.compile") -> None:
        """Let the compiler of `torch.compile` write the products with shortlists (a CPU's only); they differ by rounding.

        Args:
            setting: whoever asked for it, for the error.

        Raises:
            TeaError: there is no C++ compiler, or one that does not do.
        """
        if self.weight.device.type == "cpu":
            self._compiled_product(
                self.weight, min(_COMPARED, self.shortlist_size), setting
            )  # whether it can
        self.uses_compiler = True

    def _compiled_product(
        self, weight: Tensor, listed: int, setting: str = "model.compile"
    ) -> Generated | None:
        try:
            return compiled_product(weight.dtype, *weight.shape, listed)
        except CompilerFailed as error:
            raise compiler_failed(self.base_model_name_or_path or "this head", error, setting) from error

    def _product(self, g: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        if self.writes_products:
            return shortlist_product(g, weight, ids, written_product)
        serves = self.uses_compiler and weight.is_contiguous() and weight.device.type == "cpu"
        return shortlist_product(
            g, weight, ids, self._compiled_product(weight, ids.shape[1]) if serves else None
        )

    def reads(self, hidden_states: Tensor, g: Tensor) -> list[Reads]:
        """The products whose sum is the correction (before ``logit_scale``), given what the members returned."""
        own = Reads(g, self.weight if self.config.readout == "tied" else self.members.vocab_readout)
        if self.reference_delta is None:
            return [own]
        states = self.reference_states(hidden_states).float()
        # The moved reference also reads what the reference reads.
        return [own, Reads(states + g if self.config.readout == "tied" else states, self.reference_delta)]

    def slot_logits(
        self,
        hidden_states: Tensor,
        shortlist: Shortlist,
        temperature: float = 1.0,
        returns: Tensor | None = None,
    ) -> Tensor:
        """Policy logits of the slots at this head's strength, ``(N, k + 1)``."""
        base = shortlist.slot_logits()
        if self.strength == 0.0:
            return base
        delta, shift = self.shortlist_correction(hidden_states, shortlist.ids, returns)
        return base + (self.strength / temperature) * torch.cat([delta, shift.unsqueeze(1)], dim=1)

    def full_logits(
        self,
        hidden_states: Tensor,
        reference: Tensor,
        temperature: float = 1.0,
        returns: Tensor | None = None,
    ) -> Tensor:
        """Policy logits of the whole vocabulary (``full_vocabulary``), ``(N, V)``, from the reference logits."""
        if self.strength == 0.0:
            return reference
        scale = self.strength * self.logit_scale / temperature
        return reference + scale * self._full_correction(hidden_states, returns)

    def _full_correction(self, hidden_states: Tensor, returns: Tensor | None) -> Tensor:
        g, _ = self.read_members(hidden_states, returns)
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

    @torch.no_grad()
    def disagreement(self, hidden_states: Tensor, returns: Tensor | None = None) -> Tensor:
        """Variance of the members' corrections on the shortlist, averaged over it: how unsure the ensemble is.

        Zero for a fresh head and for a single member. Shape: ``(..., D)`` to ``(...)``, in squared logit units; desired
        returns as in `forward`.
        """
        states = hidden_states.reshape(-1, self.state_width)
        size = min(_COMPARED, self.shortlist_size)
        ids = largest(self.reference_logits(states), size)[1]
        asked = self._asked(returns, hidden_states.shape[:-1])
        per_member, _ = self.members.corrections_per_member(states, asked)
        readout = self.weight if self.config.readout == "tied" else self.members.vocab_readout
        deltas = torch.stack([self._product(g, readout, ids) for g in per_member])
        variance = deltas.mul_(self.logit_scale).var(dim=0, correction=0).mean(dim=-1)
        return variance.view(hidden_states.shape[:-1])
