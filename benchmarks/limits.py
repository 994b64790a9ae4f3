"""What this machine allows: measured bandwidth and product rates, and what a stage needs of them at the least.

A stage's work is a list of `Work`, phases that run one after the other. A phase takes at least the longer of two times: its
floating-point operations at the measured product rate of its number format, and the bytes it must move at the measured copy
bandwidth (bytes read plus bytes written a second). Only what no implementation can avoid is counted: weights, cached keys and
values, gathered rows and optimizer state once each; activations, norms, softmaxes, sampling and Python not at all. The *limit*
of a stage is the sum over its phases, and the *share reached* is the limit's time over the measured time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tea_rl import Backbone, TeaHead
from tea_rl.packed_linear import packed_weights

_FLOAT_BYTES = 4
#: AdamW reads weight, gradient and both moments and writes weight and both moments.
_ADAMW_PASSES = 7


class Work(NamedTuple):
    """One phase: floating-point operations (a multiply-add is two), bytes moved, and the format of the products."""

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Limits:
    """What was measured: GB/s read plus written by a copy, and TFLOP/s of square products."""

    copy_gb_per_second: float
    float32_tflops: float
    bfloat16_tflops: float

    def seconds(self, phases: Iterable[Work]) -> float:
        """The least time that the phases take one after the other."""
        half = self.bfloat16_tflops * 1e12
        rate = {torch.float32: self.float32_tflops * 1e12, torch.bfloat16: half, torch.float16: half}
        moving = self.copy_gb_per_second * 1e9
        return sum(max(work.flops / rate[work.dtype], work.bytes / moving) for work in phases)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"copy {self.copy_gb_per_second:.1f} GB/s, float32 {self.float32_tflops:.3f} TFLOP/s, "
            f"bfloat16 {self.bfloat16_tflops:.3f} TFLOP/s"
        )


def measure_limits(repeats: int = 5, megabytes: int = 256, size: int = 1536) -> Limits:
    """The best of some copies between two blocks larger than any cache, and of some products of square matrices."""
    source, target = (torch.ones(megabytes * 2**18) for _ in range(2))
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), repeats)

    def product(dtype: torch.dtype) -> float:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / _best(lambda: left @ right, repeats)

    return Limits(copy / 1e9, product(torch.float32) / 1e12, product(torch.bfloat16) / 1e12)


def _best(function: Any, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


class ModelWork:
    """What passes of a backbone need.

    Products read every weight of the transformer but its embeddings (a look-up): ``2 * weights`` operations a token. Attention
    adds ``4 * query width`` operations a layer for every earlier position. The output layer, ``2 * V * D``, is needed where a
    token is sampled only.
    """

    def __init__(self, backbone: Backbone) -> None:
        config = backbone.model.config.get_text_config()
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        embeddings = {id(m.weight) for m in backbone.body.modules() if isinstance(m, nn.Embedding)}
        self.dtype = backbone.dtype
        kept = [p.numel() for p in backbone.body.parameters() if p.dim() > 1 and id(p) not in embeddings]
        packed = [math.prod(sample.shape) for sample in packed_weights(backbone.body).values()]
        self.body = sum(kept) + sum(packed)
        self.output = backbone.vocab_size * backbone.hidden_size
        self.query_width = config.num_hidden_layers * heads * head_width
        self.cached = 2 * config.num_hidden_layers * shared * head_width * self.dtype.itemsize
        self.itemsize = self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return (self.body + self.output) * self.itemsize

    def prefill(self, lengths: Sequence[int]) -> list[Work]:
        """Prompts of these lengths, each run once; bytes: the weights once, and keys and values written."""
        attention = sum(2 * self.query_width * length**2 for length in lengths)
        tokens = sum(lengths)
        flops = 2 * self.body * tokens + attention
        return [Work(flops, self.body * self.itemsize + tokens * self.cached, self.dtype)]

    def decode(self, prompts: Sequence[int], lengths: Tensor) -> list[Work]:
        """Steps of one token of every completion that has not ended; bytes of each: the weights, every prompt's cached keys and values
        once for all of its completions, and what each completion has written itself.

        Args:
            prompts: length of each distinct prompt.
            lengths: tokens of each completion. The first comes from its prompt's pass, by the output layer alone.
        """
        mean = sum(prompts) / len(prompts)
        phases = [Work(2 * self.output * len(prompts), self.output * self.itemsize, self.dtype)]
        for position in range(1, int(lengths.max())):
            rows, seen = int((lengths > position).sum()), mean + position
            flops = rows * (2 * (self.body + self.output) + 4 * self.query_width * seen)
            cached = sum(prompts) + rows * position
            phases.append(Work(flops, self.num_bytes + cached * self.cached, self.dtype))
        return phases


class HeadWork:
    """What a head's passes need: every weight of the members is used once a state, and a shortlist's rows are read.

    A row that several states of a batch list need be read once only, so that no batch reads more than the vocabulary. An update
    adds the gradient of the weights (as many operations as the forward pass), the gradient of what enters a layer (not of the
    first: the states are frozen), the rows read again for the backward pass, and AdamW's passes.
    """

    def __init__(self, head: TeaHead) -> None:
        self.weights = sum(parameter.numel() for parameter in head.members.parameters())
        self.first = head.members.weights[0].numel()
        self.vocabulary = head.weight.shape[0]
        self.listed = self.vocabulary if head.full_vocabulary else int(head.shortlist_size)
        self.state_bytes = head.weight.shape[1] * head.weight.element_size()
        self.dtype = head.members.product_dtype

    def read_bytes(self, states: float) -> float:
        """Bytes of the vocabulary's rows that a batch of states reads."""
        return min(states * self.listed, self.vocabulary) * self.state_bytes

    def decode(self, lengths: Tensor) -> list[Work]:
        """The correction of every token sampled; the first ones of a prompt's completions are counted each, though one would do."""
        phases = []
        for position in range(int(lengths.max())):
            rows = int((lengths > position).sum())
            phases.append(Work(2 * rows * self.weights, self.weights * _FLOAT_BYTES, self.dtype))
            phases.append(Work(0, self.read_bytes(rows)))
        return phases

    def update(self, states: int, minibatches: int) -> list[Work]:
        """One pass over distinct states in minibatches of about equal size."""
        flops = states * (2 * self.weights + 2 * self.weights + 2 * (self.weights - self.first))
        passes = minibatches * self.weights * _FLOAT_BYTES
        return [
            Work(flops, 3 * passes + states * self.state_bytes, self.dtype),
            Work(0, 2 * minibatches * self.read_bytes(states / minibatches)),
            Work(0, _ADAMW_PASSES * passes),
        ]
