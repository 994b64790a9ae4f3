"""Causal running means of hidden states, which members may read beside the last state (DESIGN section 4).

The last state forgets what a mean remembers. The means are carried beside the key-value cache, so decoding stays O(1) a
token. With ``x_t`` the layer-normalised state of a chosen layer at token ``t`` (``t = 0, 1, ...``; padding is no token),

    mean_0 = x_0,     mean_t = sum_{s=1..t} w^(t-s) x_s / sum_{s=1..t} w^(t-s),

``w = 1`` for the horizon "all" and ``exp(-1 / horizon)`` otherwise. Token 0 is left out as soon as there is another one:
in most models its state is an outlier that says nothing about the text.

A *wide state* is the state that feeds the output layer followed by the means, layer by layer and for each layer horizon
by horizon: ``D * (1 + num_means)`` numbers. Shape letters: ``B`` rows, ``T`` positions, ``D`` hidden size, ``M`` means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig

#: Positions that one matrix product sums up; a longer pass carries its means from block to block.
BLOCK = 64


class ContextState:
    """What the means of a batch have read so far; it goes beside a key-value cache and follows its rows.

    `tea_rl.backbone.Backbone.forward` reads and advances it. A fresh one stands for "nothing read yet".

    Attributes:
        config: layers and horizons.
        means: of the normalised states read, ``(B, M, D)`` float32; None before the first pass.
        tokens: tokens read, padding not counted, ``(B,)``; None before the first pass.
        length: positions read, padding counted: the length of the cache it belongs to.
    """

    def __init__(self, config: ContextConfig) -> None:
        self.config = config
        self.reset()

    @classmethod
    def begin(cls, config: ContextConfig) -> ContextState | None:
        """A fresh state, or None where ``config`` names no layers: what `Backbone.forward` takes as ``context``."""
        return cls(config) if config.num_means else None

    def reset(self) -> None:
        """Forget everything."""
        self.means: Tensor | None = None
        self.tokens: Tensor | None = None
        self.length = 0

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at ``index``, in that order and with repeats."""
        if self.means is not None and self.tokens is not None:
            index = index.to(self.means.device)
            self.means, self.tokens = self.means[index], self.tokens[index]

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side."""
        if self.means is not None and self.tokens is not None:
            self.means = self.means.repeat_interleave(repeats, dim=0)
            self.tokens = self.tokens.repeat_interleave(repeats, dim=0)


class ContextPass:
    """One pass of the transformer: takes the states of the chosen layers as they appear, then widens the last ones.

    Args:
        state: advanced by `finish`.
        rates: ``1 / horizon`` of each horizon, 0 for "all".
        real: False on padding, ``(B, T)``.
    """

    def __init__(self, state: ContextState, rates: list[float], real: Tensor) -> None:
        rows = len(real)
        if state.tokens is not None and len(state.tokens) != rows:
            raise TeaError(
                f"the context features have read {len(state.tokens)} rows, but the batch has {rows}: give them a batch of "
                "the same rows, or begin anew"
            )
        self._state, self._rates, self._real = state, rates, real
        before = real.new_zeros(rows, dtype=torch.long) if state.tokens is None else state.tokens
        tokens = real.cumsum(dim=1) + before.unsqueeze(1)
        self._tokens = tokens[:, -1]
        #: Tokens that enter the means: all but the first of a row.
        self._counted = (real & (tokens > 1)).float()
        #: How many have entered up to each position; the first column stands for what came before this pass: ``(B, T + 1)``.
        self._entered = torch.cat([before.unsqueeze(1), tokens], dim=1).sub(1).clamp(min=0).float()
        self._weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._read: dict[int, Tensor] = {}
        self._carried: dict[int, Tensor] = {}

    def read(self, place: int, states: Tensor) -> None:
        """Take the states ``(B, T, D)`` of the layer at ``place`` in the configuration."""
        # What a model computes at padding may be anything, even NaN, which a zero weight would let through.
        x = F.layer_norm(states.float(), states.shape[-1:]).masked_fill_(~self._real.unsqueeze(2), 0.0)
        nothing_yet = (self._entered[:, 1:] == 0).unsqueeze(2)
        for number in range(len(self._rates)):
            mean = place * len(self._rates) + number
            carried = None if self._state.means is None else self._state.means[:, mean]
            means = self._running_means(x, number, carried)
            self._carried[mean] = means[:, -1]
            self._read[mean] = torch.where(nothing_yet, x, means).to(states.dtype)

    def finish(self, last: Tensor) -> Tensor:
        """Put the means behind the last states, ``(B, T, D)`` to ``(B, T, D * (1 + M))``, and advance the state."""
        order = range(self._state.config.num_means)
        self._state.means = torch.stack([self._carried[mean] for mean in order], dim=1)
        self._state.tokens = self._tokens
        self._state.length += self._real.shape[1]
        return torch.cat([last, *(self._read[mean] for mean in order)], dim=-1)

    def _running_means(self, x: Tensor, number: int, carried: Tensor | None) -> Tensor:
        """Means at every position, ``(B, T, D)``."""
        blocks = []
        for start in range(0, x.shape[1], BLOCK):
            kernel, fresh = self._block_weights(number, start)
            means = torch.bmm(kernel, x[:, start : start + BLOCK])
            if carried is not None:
                # Moved towards the new states, not decayed: a decay rounded once per token would drift from the weights.
                means = means + (carried.unsqueeze(1) - fresh * carried.unsqueeze(1))
            carried = means[:, -1]
            blocks.append(means)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def _block_weights(self, number: int, start: int) -> tuple[Tensor, Tensor]:
        """What each position's mean takes from the positions of its block, ``(B, C, C)``, and their sum ``(B, C, 1)``."""
        if (number, start) not in self._weights:  # made once for all layers
            rate, end = self._rates[number], start + BLOCK
            entered = self._entered[:, start + 1 : end + 1]
            age = (entered.unsqueeze(2) - entered.unsqueeze(1)).clamp(min=0)
            kernel = (-rate * age).exp().tril() * self._counted[:, start:end].unsqueeze(1)
            total = _total_weight(entered, rate).clamp(min=1)
            fresh = _total_weight(entered - self._entered[:, start : start + 1], rate) / total
            self._weights[number, start] = kernel / total.unsqueeze(2), fresh.unsqueeze(2)
        return self._weights[number, start]


class ContextReader:
    """Reads chosen layers of a transformer through forward hooks: no layer's states are kept for longer than their turn.

    Args:
        config: layers and horizons.
        layers: all layers of the transformer, see `find_layers`.
        hidden_size: ``D``.

    Raises:
        TeaError: a layer that the model does not have.
    """

    def __init__(self, config: ContextConfig, layers: nn.ModuleList, hidden_size: int) -> None:
        count = len(layers)
        for layer in config.layers:
            if abs(layer) > count:
                raise TeaError(
                    f"head.context.layers has {layer}, but this model's layers are 1 to {count}, or -1 (the last) to -{count}"
                )
        self.rates = [0.0 if horizon == "all" else 1.0 / horizon for horizon in config.horizons]
        self.config, self._hidden_size = config, hidden_size
        numbers = [layer if layer > 0 else count + 1 + layer for layer in config.layers]
        #: The last layer's state is the normalised one that feeds the output layer; the transformer returns it.
        self._last = [place for place, number in enumerate(numbers) if number == count]
        self._modules = [
            (place, layers[number - 1]) for place, number in enumerate(numbers) if number < count
        ]

    def begin(self, state: ContextState, real: Tensor) -> ContextPass:
        """Start a pass; ``real`` is False on padding, ``(B, T)``."""
        return ContextPass(state, self.rates, real)

    def hook(self, current: Callable[[], ContextPass | None]) -> list[Any]:
        """Have the inner layers' states read into the pass that ``current`` returns; gives the handles of the hooks."""

        def read(place: int, module: nn.Module, args: Any, output: Any) -> None:
            started = current()
            if started is not None:
                started.read(place, self._checked(_first(output)))

        return [module.register_forward_hook(partial(read, place)) for place, module in self._modules]

    def finish(self, started: ContextPass, last: Tensor) -> Tensor:
        """Wide states from the transformer's own result, ``(B, T, D)``."""
        for place in self._last:
            started.read(place, last)
        return started.finish(last)

    @contextmanager
    def reading(self, state: ContextState, real: Tensor) -> Iterator[ContextPass]:
        """Hooks for one pass of the transformer, whatever comes of it."""
        started = self.begin(state, real)
        handles = self.hook(lambda: started)
        try:
            yield started
        finally:
            for handle in handles:
                handle.remove()

    def _checked(self, states: Tensor) -> Tensor:
        if states.shape[-1] != self._hidden_size:
            raise TeaError(
                f"head.context reads layers {self.config.layers}, whose states are {states.shape[-1]} wide in this model, but "
                f"the output layer reads {self._hidden_size}: take layers [-1]"
            )
        return states


def layer_list(body: nn.Module, count: int) -> nn.ModuleList | None:
    """The first list of ``count`` modules in a transformer; None if there is none."""
    lists = (m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def find_layers(body: nn.Module, count: int, ids: Tensor) -> nn.ModuleList:
    """The ``count`` layers of a transformer, proved by one pass over ``ids`` ``(1, T)``: each feeds the next one.

    Raises:
        TeaError: there is no such list of modules, or its members do not hand their states on unchanged.
    """
    refused = TeaError(
        f"context features need a transformer whose layers hand their states on one to the next, but {type(body).__name__} "
        "is built otherwise: set head.context.layers to [], or choose another model"
    )
    layers = layer_list(body, count)
    if layers is None:
        raise refused
    seen: list[tuple[Tensor | None, Tensor]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args[0] if args else kwargs.get("hidden_states"), _first(output)))

    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    handed_on = zip(seen[:-1], seen[1:], strict=True)
    if len(seen) != count or not all(
        taken is not None and torch.equal(taken, given) for (_, given), (taken, _) in handed_on
    ):
        raise refused
    return layers


def _first(output: Any) -> Tensor:
    """The states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _total_weight(entered: Tensor, rate: float) -> Tensor:
    """``sum_{k < n} exp(-rate k)`` for ``n`` tokens in the sum."""
    if rate == 0.0:
        return entered
    # expm1: the difference of two numbers near 1 would lose the digits that a long horizon needs.
    return torch.expm1(-rate * entered) / torch.expm1(entered.new_tensor(-rate))
