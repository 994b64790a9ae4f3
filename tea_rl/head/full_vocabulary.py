"""The loss over the whole vocabulary without ever holding ``tokens x vocabulary`` numbers.

With reference logits ``l``, corrections ``delta`` and policy logits ``z = l + delta``, everything a loss needs is a handful of
sums over the vocabulary:

    log Z   = logsumexp z                    log Z_0 = logsumexp l
    log pi(a)     = z_a - log Z
    KL(pi || pi_0) = E_pi[delta]  - (log Z - log Z_0)
    KL(pi_0 || pi) = -E_pi0[delta] + (log Z - log Z_0)
    H(pi)         = log Z - E_pi[z]

They are gathered in one pass over blocks of tokens and chunks of the vocabulary, with running maxima. The gradients with
respect to ``delta`` need those sums only, so the backward pass computes each chunk's logits once more and reads them back
through the readout at once:

    d log pi(a) / d delta_v = [v = a] - pi_v            d KL(pi || pi_0) / d delta_v = pi_v (delta_v - E_pi[delta])
    d KL(pi_0 || pi) / d delta_v = pi_v - pi0_v          d H / d delta_v = -pi_v (log pi_v + H)

Shape letters: ``N`` actions, ``U`` states, ``V`` vocabulary, ``D`` hidden size, ``G`` numbers a correction is read from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tea_rl.head.policy import PolicyTerms

#: Numbers alive at once are a few times this product; both are large enough to keep matrix products busy.
TOKEN_BLOCK = 256
VOCABULARY_CHUNK = 2048


class Reads(NamedTuple):
    """One way a correction is read: ``inputs @ weight.T``.

    Shape:
        inputs ``(U, G)``; weight ``(V, G)``.
    """

    inputs: Tensor
    weight: Tensor


class Scales(NamedTuple):
    """Factors to policy units: of the reference logits, and of the correction at the head's strength."""

    base: float
    correction: float


def fused_terms(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reads: list[Reads],
    scales: Scales,
    actions: Tensor,
    at: Tensor,
    anchor: str,
) -> PolicyTerms:
    """Policy terms of actions over the whole vocabulary; differentiable in the inputs and weights of ``reads``.

    Shape:
        states ``(U, D)``, frozen weight ``(V, D)`` and bias ``(V,)`` of the reference head; actions ``(N,)``: token ids; ``at``
        ``(N,)``: the state of each. Returns four times ``(N,)``.

    Raises:
        ValueError: for an unknown anchor.
    """
    if anchor not in ("reverse_kl", "forward_kl", "logit_l1"):
        raise ValueError(f"unknown divergence {anchor!r}; expected reverse_kl, forward_kl or logit_l1")
    flat = [tensor for pair in reads for tensor in pair]
    problem = _Problem(scales, anchor)
    logps, kl, penalty, spread = _FusedTerms.apply(problem, states, weight, bias, actions, at, *flat)
    penalty = kl if anchor == "reverse_kl" else penalty
    return PolicyTerms(logps, penalty[at], kl[at], spread[at])


class _Problem(NamedTuple):
    scales: Scales
    anchor: str


class _Sums:
    """Running sums over the vocabulary for one block of tokens, each ``(block,)``; exponentials relative to running maxima."""

    def __init__(self, count: int, device: torch.device, anchor: str) -> None:
        def zeros() -> Tensor:
            return torch.zeros(count, device=device)

        self.anchor = anchor
        self.top, self.base_top = zeros() - torch.inf, zeros() - torch.inf
        self.mass, self.base_mass = zeros(), zeros()
        self.delta, self.logit, self.base_delta = zeros(), zeros(), zeros()
        self.moments = torch.zeros(3, count, device=device, dtype=_exact(device))

    def add(self, base: Tensor, delta: Tensor, logits: Tensor) -> None:
        """Take in a chunk; all ``(block, chunk)``."""
        if self.anchor == "logit_l1":
            for row, values in enumerate((delta.abs(), base, base.square())):
                self.moments[row] += values.sum(dim=1)
        self.top, keep, weights = _rescale(self.top, logits)
        self.mass = self.mass * keep + weights.sum(dim=1)
        self.delta = self.delta * keep + torch.linalg.vecdot(weights, delta)
        self.logit = self.logit * keep + torch.linalg.vecdot(weights, logits)
        self.base_top, keep, weights = _rescale(self.base_top, base)
        self.base_mass = self.base_mass * keep + weights.sum(dim=1)
        if self.anchor == "forward_kl":
            self.base_delta = self.base_delta * keep + torch.linalg.vecdot(weights, delta)

    def finish(self, vocab_size: int) -> tuple[Tensor, ...]:
        """``log Z, log Z_0, E_pi[delta], H, KL(pi || pi_0), penalty, 1 / (V std(l) + V)``, each ``(block,)``."""
        logsumexp, base_logsumexp = self.top + self.mass.log(), self.base_top + self.base_mass.log()
        gain = logsumexp - base_logsumexp
        mean_delta = self.delta / self.mass
        spread = logsumexp - self.logit / self.mass
        kl = mean_delta - gain
        penalty, steepness = kl, torch.zeros_like(kl)
        if self.anchor == "forward_kl":
            penalty = gain - self.base_delta / self.base_mass
        elif self.anchor == "logit_l1":
            distance, mean, square = self.moments / vocab_size
            variance = (square - mean.square()) * (vocab_size / (vocab_size - 1))
            steepness = (1.0 / (variance.clamp(min=0.0).sqrt() + 1.0) / vocab_size).float()
            penalty = distance.float() * vocab_size * steepness
        return logsumexp, base_logsumexp, mean_delta, spread, kl, penalty, steepness


def _exact(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type != "mps" else torch.float32  # MPS has nothing finer


def _rescale(top: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new running maximum, the factor of what was summed so far, and the chunk's exponentials."""
    new_top = torch.maximum(top, values.amax(dim=1))
    return new_top, (top - new_top).exp(), (values - new_top.unsqueeze(1)).exp_()


def _chunks(size: int, chunk: int) -> Iterator[slice]:
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


def _chunk_logits(
    scales: Scales, states: Tensor, weight: Tensor, bias: Tensor | None, reads: list[Reads], part: slice
) -> tuple[Tensor, Tensor]:
    """Reference logits and corrections of a block of tokens on a chunk of the vocabulary, float32."""
    own_bias = None if bias is None else bias[part]
    base = F.linear(states.to(weight.dtype), weight[part], own_bias).float().mul_(scales.base)
    delta = torch.zeros_like(base)
    for inputs, readout in reads:
        delta += F.linear(inputs.to(readout.dtype), readout[part])
    return base, delta.mul_(scales.correction)


def _actions_in(actions: Tensor, at: Tensor, block: slice, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Which actions fall into a block of states and a chunk of the vocabulary, and where in it."""
    inside = (actions >= part.start) & (actions < part.stop) & (at >= block.start) & (at < block.stop)
    index = inside.nonzero().squeeze(1)
    return index, at[index] - block.start, actions[index] - part.start


class _FusedTerms(torch.autograd.Function):
    """``(logps (N,), kl (U,), penalty (U,), entropy (U,))``; see the module's docstring."""

    @staticmethod
    def forward(  # noqa: ANN205
        ctx: Any,
        problem: _Problem,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        actions: Tensor,
        at: Tensor,
        *flat: Tensor,
    ):
        chosen = torch.zeros(actions.shape, device=states.device)
        blocks = []
        for block in _chunks(len(states), TOKEN_BLOCK):
            sums = _Sums(block.stop - block.start, states.device, problem.anchor)
            own = [Reads(inputs[block], readout) for inputs, readout in _pairs(flat)]
            for part in _chunks(weight.shape[0], VOCABULARY_CHUNK):
                base, delta = _chunk_logits(problem.scales, states[block], weight, bias, own, part)
                logits = base + delta
                index, row, column = _actions_in(actions, at, block, part)
                chosen[index] = logits[row, column]
                sums.add(base, delta, logits)
            blocks.append(torch.stack(sums.finish(weight.shape[0])))
        saved = torch.cat(blocks, dim=1)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, states, weight, bias, actions, at, *flat)
        return chosen - saved[0][at], saved[4].clone(), saved[5].clone(), saved[3].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # noqa: ANN205
        ctx: Any,
        grad_logps: Tensor | None,
        grad_kl: Tensor | None,
        grad_penalty: Tensor | None,
        grad_spread: Tensor | None,
    ):
        saved, states, weight, bias, actions, at, *flat = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        grads = [
            torch.zeros(tensor.shape, device=tensor.device) if need else None
            for tensor, need in zip(flat, needed, strict=True)
        ]
        pull = _Pull(ctx.problem, saved, at, grad_logps, grad_kl, grad_penalty, grad_spread)
        for block in _chunks(len(states), TOKEN_BLOCK):
            own = [Reads(inputs[block], readout) for inputs, readout in _pairs(flat)]
            for part in _chunks(weight.shape[0], VOCABULARY_CHUNK):
                base, delta = _chunk_logits(ctx.problem.scales, states[block], weight, bias, own, part)
                out = pull.of_correction(base, delta, block)
                if grad_logps is not None:
                    index, row, column = _actions_in(actions, at, block, part)
                    out.index_put_((row, column), grad_logps[index], accumulate=True)
                out.mul_(ctx.problem.scales.correction)
                for place, (inputs, readout) in enumerate(own):
                    lowered = out.to(readout.dtype)
                    if (grad_inputs := grads[2 * place]) is not None:
                        grad_inputs[block] += lowered @ readout[part]
                    if (grad_readout := grads[2 * place + 1]) is not None:
                        grad_readout[part] += lowered.t() @ inputs.to(readout.dtype)
        cast = [
            None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, flat, strict=True)
        ]
        return None, None, None, None, None, None, *cast


class _Pull:
    """Gradient of a loss with respect to the corrections, chunk by chunk, from its gradients on the terms."""

    def __init__(
        self,
        problem: _Problem,
        saved: Tensor,
        at: Tensor,
        grad_logps: Tensor | None,
        grad_kl: Tensor | None,
        grad_penalty: Tensor | None,
        grad_spread: Tensor | None,
    ) -> None:
        self.anchor, self.saved = problem.anchor, saved
        zeros = torch.zeros_like(saved[0])
        self.on_logps = zeros if grad_logps is None else zeros.index_add(0, at, grad_logps)
        self.on_kl, self.on_penalty, self.on_spread = grad_kl, grad_penalty, grad_spread
        if problem.anchor == "reverse_kl":  # the penalty is the KL itself
            self.on_penalty = None

    def of_correction(self, base: Tensor, delta: Tensor, block: slice) -> Tensor:
        """``(block, chunk)``, all but the action's own share; see the module's docstring."""
        logsumexp, base_logsumexp, mean_delta, spread, _, _, steepness = self.saved[:, block].unsqueeze(2)
        # Collected as the factor of pi_v, which every part but two has.
        log_probs = base + delta - logsumexp
        factor = (-self.on_logps[block]).unsqueeze(1)
        if self.on_kl is not None:
            factor = factor + self.on_kl[block].unsqueeze(1) * (delta - mean_delta)
        if self.on_spread is not None:
            factor = factor - self.on_spread[block].unsqueeze(1) * (log_probs + spread)
        if self.on_penalty is None:
            return log_probs.exp_() * factor
        weight = self.on_penalty[block].unsqueeze(1)
        if self.anchor == "forward_kl":
            return log_probs.exp_() * (factor + weight) - weight * (base - base_logsumexp).exp()
        return log_probs.exp_() * factor + weight * steepness * delta.sign()


def _pairs(flat: tuple[Tensor, ...] | list[Tensor]) -> list[Reads]:
    return [Reads(flat[index], flat[index + 1]) for index in range(0, len(flat), 2)]
