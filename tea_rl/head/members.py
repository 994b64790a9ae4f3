"""The ensemble: small residual networks that read one hidden state, packed into one batched matrix product.

DESIGN section 4. Shape letters: ``N`` tokens, ``D`` hidden size, ``K`` members, ``F`` features a member sees,
``S`` concatenated layer outputs of one member.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.head.config import HeadConfig
from tea_rl.head.returns import ReturnModulation

#: The tail shift is one number against a sum of hundreds, so its readout row is read at this gain: at equal learning
#: rates the shift would otherwise lag far behind the shortlist corrections.
TAIL_SHIFT_GAIN = 10.0
#: Likewise for a member's own vocabulary projection, whose logits are sums of a few dozen numbers.
VOCAB_READOUT_GAIN = 10.0
#: Initial size of memory keys: peaked enough that a query reads a handful of slots, not the mean of all.
KEY_SCALE = 2.0
#: States from which on products of half precision pay.
MANY_STATES = 8


class PackedFeatures(nn.Module):
    """``K`` dense-concat networks without a readout: what members make of a state.

    A member is LayerNorm over its features, then layers whose outputs are *all* concatenated for the readout. A layer is

    * ``mlp``: ``SiLU(x W + b)``;
    * ``memory``: a lookup in learned keys and values, ``softmax((x W + b) . keys / sqrt(width)) @ values``.

    With ``gate``, all outputs of a member are multiplied by ``2 sigmoid(x . w + v)`` of the same normalised features ``x``.

    With context on, a state is ``1 + num_means`` blocks of width ``D`` side by side (the hidden state, then the running
    means); each block has a normalisation and a feature subset of its own, lest one of larger scale drown the others.

    Args:
        config: shape and regularisation.
        hidden_size: ``D`` of the backbone.
        rng: draws weights, feature subsets and random widths.

    Attributes:
        packed_width: ``S``.
        product_dtype: number format that products are taken in, see `tea_rl.devices.product_dtype`; float32 unless it is set.
    """

    feature_index: Tensor | None
    widths: Tensor

    def __init__(self, config: HeadConfig, hidden_size: int, rng: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_blocks = 1 + config.context.num_means
        self.product_dtype = torch.float32
        num_members = config.num_members
        block_features = max(1, round(config.feature_fraction * hidden_size))
        num_features = block_features * self.num_blocks

        subsets = None
        if block_features < hidden_size:
            subsets = torch.stack(
                [
                    torch.randperm(hidden_size, generator=rng)[:block_features].sort().values
                    + block * hidden_size
                    for _ in range(num_members)
                    for block in range(self.num_blocks)
                ]
            ).view(num_members, num_features)
        self.register_buffer("feature_index", subsets)
        self.register_buffer("widths", _draw_widths(config, rng))

        self.norm_scale = nn.Parameter(torch.ones(num_members, 1, num_features))
        self.norm_shift = nn.Parameter(torch.zeros(num_members, 1, num_features))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        fan_in = torch.full((num_members,), num_features)
        packed_in = num_features
        for layer in range(len(config.hidden_sizes)):
            width = self.widths[:, layer]
            packed_out = int(width.max())
            mask = _unit_mask(width, packed_out)
            weight = (
                torch.randn(num_members, packed_in, packed_out, generator=rng) * fan_in.rsqrt()[:, None, None]
            )
            self.weights.append(nn.Parameter(weight * mask))
            self.biases.append(nn.Parameter(torch.zeros(num_members, 1, packed_out)))
            if config.member_kind == "memory":
                shape = (num_members, config.memory_slots, packed_out)
                self.keys.append(nn.Parameter(torch.randn(shape, generator=rng) * KEY_SCALE * mask))
                self.values.append(nn.Parameter(torch.randn(shape, generator=rng) * mask))
            fan_in, packed_in = width, packed_out
        self.packed_width = sum(bias.shape[-1] for bias in self.biases)
        if config.gate:
            self.gate_weight = nn.Parameter(torch.zeros(num_members, num_features, 1))
            self.gate_bias = nn.Parameter(torch.zeros(num_members, 1, 1))
        self.modulation = ReturnModulation(num_members, num_features) if config.return_conditioning else None

    def features(self, hidden_states: Tensor, returns: Tensor | None = None) -> Tensor:
        """Concatenated layer outputs of every member.

        Shape:
            hidden_states ``(N, D * (1 + num_means))``; desired returns ``(N,)``, or ``()`` for all positions, of effect with
            ``return_conditioning`` only; returns ``(K, N, S)`` in float32.
        """
        with self._products(hidden_states):
            return self._features(hidden_states, returns).float()

    def _products(self, states: Tensor) -> AbstractContextManager[object]:
        """Inside, products are of `product_dtype`; parameters and their gradients stay float32."""
        # To round all weights for a few states takes longer than to multiply them as they are.
        if self.product_dtype == torch.float32 or states.shape[0] < MANY_STATES:
            return nullcontext()
        return torch.autocast(self.norm_scale.device.type, dtype=self.product_dtype)

    def _features(self, hidden_states: Tensor, returns: Tensor | None) -> Tensor:
        """`features` in the number format that they were worked out in."""
        x = normed = self._normalised(hidden_states.float())
        scale, shift = self.norm_scale, self.norm_shift
        if returns is not None and self.modulation is not None:
            gamma, beta = self.modulation(returns)
            scale, shift = scale + gamma, shift + beta
        # More states than units: the affine part of the norm goes into the first product, (x s + t) W = x (s W) + t W.
        folds = scale.shape[1] == 1 and x.shape[1] >= self.weights[0].shape[2]
        if not folds:
            x = torch.addcmul(shift, x, scale)
        outputs = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer == 0 and folds:
                bias = bias + shift @ weight
                weight = scale.transpose(1, 2) * weight
            x = torch.baddbmm(bias, x, weight)
            # Members narrower than the pack must not read their padding.
            mask = _unit_mask(self.widths[:, layer], x.shape[-1]) if self.config.random_widths else None
            if self.config.member_kind == "memory":
                x = self._look_up(layer, x if mask is None else x * mask)
            else:
                x = F.silu(x)
            if mask is not None:
                x = x * mask
            x = F.dropout(x, self.config.dropout, self.training)
            outputs.append(x)
        features = torch.cat(outputs, dim=-1)
        if not self.config.gate:
            return features
        # Twice the sigmoid: a fresh gate is 1 and changes nothing.
        return features * (2.0 * torch.sigmoid(torch.baddbmm(self.gate_bias, normed, self.gate_weight)))

    def _look_up(self, layer: int, query: Tensor) -> Tensor:
        """Values under the softmax of the query against the keys; ``(K, N, width)`` both ways."""
        scale = self.widths[:, layer].float().rsqrt()[:, None, None]
        scores = (query * scale) @ self.keys[layer].transpose(1, 2)
        return scores.softmax(dim=-1) @ self.values[layer]

    def _normalised(self, states: Tensor) -> Tensor:
        """What each member sees, every block normalised for itself, ``(K, N, F)``."""
        if self.feature_index is None:
            blocks = states.unflatten(-1, (self.num_blocks, -1))
            x = F.layer_norm(blocks, blocks.shape[-1:]).flatten(-2)
            return x.unsqueeze(0).expand(self.config.num_members, -1, -1)
        blocks = states[:, self.feature_index].transpose(0, 1).unflatten(-1, (self.num_blocks, -1))
        return F.layer_norm(blocks, blocks.shape[-1:]).flatten(-2)


class PackedMembers(PackedFeatures):
    """`PackedFeatures` and their joint readout.

    The readout makes ``g``, what a correction is read from. ``tied``: one matrix shared by the whole ensemble, and the
    reference head reads ``g``. ``vocab``: each member projects to ``readout_rank`` numbers, and the rows of
    ``vocab_readout`` (all members' vocabulary projections side by side) read them. The matrix nearest the logits starts at
    zero, so a fresh ensemble corrects nothing at all.

    Args:
        config: shape and regularisation.
        hidden_size: ``D`` of the backbone.
        seed: of the initialisation (weights, feature subsets, random widths).
        vocab_size: ``V``; needed by ``readout: vocab`` only.
    """

    def __init__(
        self, config: HeadConfig, hidden_size: int, seed: int = 0, vocab_size: int | None = None
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        super().__init__(config, hidden_size, rng)
        num_members = config.num_members
        packed_width = self.packed_width
        #: Its last row reads the tail shift; the rows before it (none with ``vocab``) read ``g``.
        rows = hidden_size if config.readout == "tied" else 0
        self.readout = nn.Parameter(torch.zeros(rows + 1, num_members * packed_width))
        if config.readout == "vocab":
            if vocab_size is None:
                raise ValueError("readout vocab needs vocab_size")
            rank = config.readout_rank
            down = torch.randn(num_members, packed_width, rank, generator=rng) * packed_width**-0.5
            self.rank_readout = nn.Parameter(down)
            self.vocab_readout = nn.Parameter(torch.zeros(vocab_size, num_members * rank))

    def forward(self, hidden_states: Tensor, returns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the correction is read from, ``g``, and the tail shift ``b`` of DESIGN section 3.

        Shape:
            hidden_states ``(N, D * (1 + num_means))``; desired returns as in `features`; returns ``g`` ``(N, D)`` (``vocab``:
            ``(N, K * readout_rank)``) and ``b`` ``(N,)``, float32.
        """
        with self._products(hidden_states):
            features = self._features(hidden_states, returns)
            scales, common = self._member_scales(hidden_states.device), 1.0
            if isinstance(scales, float):
                common = scales  # of the result, which is smaller
            else:
                features = features * scales.to(features.dtype)
            out = F.linear(features.transpose(0, 1).flatten(1), self.readout).float() * common
            shift = out[:, -1] * TAIL_SHIFT_GAIN
            if self.config.readout == "tied":
                return out[:, :-1], shift
            codes = (features @ self.rank_readout).float()
        return codes.transpose(0, 1).flatten(1) * (common * VOCAB_READOUT_GAIN), shift

    def corrections_per_member(
        self, hidden_states: Tensor, returns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each member alone would answer if all ``K`` members were like it.

        Shape:
            hidden_states ``(N, D * (1 + num_means))``; desired returns as in `features`; returns ``g`` of each, ``(K, N, D)``
            (``vocab``: ``(K, N, K * readout_rank)``, zero outside the member's own columns), and ``(K, N)``, float32. Their
            mean over ``K`` is `forward` without dropout.
        """
        features = self.features(hidden_states, returns)
        num_members = self.config.num_members
        if self.config.aggregation == "sum":
            features = features * num_members
        readout = self.readout.unflatten(1, (num_members, -1)).permute(1, 2, 0)
        out = (features @ readout).float()  # less than that under autocast
        shift = out[..., -1] * TAIL_SHIFT_GAIN
        if self.config.readout == "tied":
            return out[..., :-1], shift
        codes = (features @ self.rank_readout).float().unsqueeze(2) * VOCAB_READOUT_GAIN
        own = torch.eye(num_members, device=codes.device)[:, None, :, None]
        return (codes * own).flatten(2), shift

    def _member_scales(self, device: torch.device) -> Tensor | float:
        """Weights of the members, ``(K, 1, 1)`` or one for all: aggregation, and member dropout while training."""
        num_members = self.config.num_members
        total = float(num_members) if self.config.aggregation == "sum" else 1.0
        if not self.training or self.config.member_dropout == 0.0:
            return total / num_members
        alive = (torch.rand(num_members, device=device) >= self.config.member_dropout).float()
        if not alive.any():
            alive[torch.randint(num_members, (), device=device)] = 1.0
        return (alive * (total / alive.sum())).view(-1, 1, 1)


def _draw_widths(config: HeadConfig, rng: torch.Generator) -> Tensor:
    """Layer widths of each member, ``(K, layers)``: fixed, or ``E/6 + Exp(5E/6)``, whose mean is ``E``."""
    expected = torch.tensor(config.hidden_sizes, dtype=torch.float32).expand(config.num_members, -1)
    if not config.random_widths:
        return expected.long()
    floor = expected / 6
    draw = torch.empty(expected.shape).exponential_(generator=rng) * (expected - floor)
    return (floor + draw).round().long().clamp_(min=1)


def _unit_mask(width: Tensor, packed_width: int) -> Tensor:
    """``(K, 1, packed_width)``: 1 where a member owns the unit, 0 in the padding of the pack."""
    return (torch.arange(packed_width, device=width.device) < width[:, None]).unsqueeze(1).float()
