"""Context features inside the wrapped model, so that ``generate`` gives the numbers of our own decode loop.

An output layer sees single positions and cannot know what came before. So while a head with `head.context` is installed,
hooks on the transformer hand wide states to it. The means so far live on the key-value cache object that the model passes
from call to call: what beam search, expansion or a prompt cache does to the cache's rows is then done to the means as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tea_rl.errors import TeaError
from tea_rl.head.context import ContextPass, ContextReader, ContextState

#: Attribute of a cache object that holds the `ContextState` of its rows.
_STATE = "_tea_context"


class ContextWrapper:
    """Hooks that make a transformer return wide states from the moment it is made until `remove`.

    Args:
        decoder: the module whose ``last_hidden_state`` the model gives to its output layer.
        reader: of the head's context.
    """

    def __init__(self, decoder: nn.Module, reader: ContextReader) -> None:
        self._reader = reader
        self._signature = inspect.signature(decoder.forward)
        self._paused = False
        self._pass: ContextPass | None = None
        self._state: ContextState | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
            *reader.hook(lambda: self._pass),
        ]

    def remove(self) -> None:
        """Take the hooks out; the transformer is as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The transformer returns its own states for a while."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass = self._state = None
        if self._paused:
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        read = given.get("input_ids")
        read = given["inputs_embeds"] if read is None else read
        self._state = self._state_of(given.get("past_key_values"))
        real = _real_positions(given.get("attention_mask"), read, self._state.length)
        self._pass = self._reader.begin(self._state, real)

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._pass is None or self._state is None:
            return None
        plain = isinstance(output, tuple)
        wide = self._reader.finish(self._pass, output[0] if plain else output.last_hidden_state)
        # A cache that the transformer made itself is first seen in what it returns.
        cache = self._signature.bind_partial(*args, **kwargs).arguments.get("past_key_values")
        cache = cache if cache is not None or plain else getattr(output, "past_key_values", None)
        if cache is not None:
            _attach(cache, self._state)
        self._pass = self._state = None
        if plain:
            return (wide, *output[1:])
        output.last_hidden_state = wide
        return output

    def _state_of(self, cache: Any) -> ContextState:
        """What was read of the rows of a cache; a fresh state for an empty cache or none."""
        length = 0 if cache is None else int(cache.get_seq_length())
        state = getattr(cache, _STATE, None)
        if length == 0:
            return ContextState(self._reader.config)
        if state is None or state.length != length or state.config != self._reader.config:
            raise TeaError(
                f"the key-value cache holds {length} positions that the installed head's context features have not read: "
                "fill a new cache while this head is installed"
            )
        return state


def _real_positions(mask: Any, read: Tensor, past: int) -> Tensor:
    """True where a position is no padding, ``(B, T)``, from the mask over everything read, ``(B, past + T)``."""
    rows, length = read.shape[:2]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=read.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < past + length:
        raise TeaError(
            "context features need an attention mask of rows x everything read so far, which a static cache (and a mask of "
            "another form) hides: generate with the default dynamic cache"
        )
    return mask[:, past : past + length].bool()


def _attach(cache: Any, state: ContextState) -> None:
    """Let the means follow the cache. Only this object changes, neither its class nor its layers; copies keep copies."""
    if getattr(cache, _STATE, None) is None:
        for function in (_reorder_cache, _batch_select_indices, _batch_repeat_interleave, _reset, _crop):
            setattr(cache, function.__name__[1:], MethodType(function, cache))
    setattr(cache, _STATE, state)


def _reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, _STATE).select_rows(beam_idx)


def _batch_select_indices(cache: Any, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    getattr(cache, _STATE).select_rows(indices)


def _batch_repeat_interleave(cache: Any, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    getattr(cache, _STATE).repeat_interleave(repeats)


def _reset(cache: Any) -> None:
    type(cache).reset(cache)
    getattr(cache, _STATE).reset()


def _crop(cache: Any, tokens_to_remove: int) -> None:
    if tokens_to_remove != 0:
        raise TeaError(
            "a mean cannot forget tokens again, so context features do not work with assisted generation or a cropped cache: "
            "generate without an assistant"
        )
    type(cache).crop(cache, tokens_to_remove)
