"""The ensemble: small residual networks that read one hidden state, packed into one batched matrix product.

DESIGN section 4. Shape letters: ``N`` tokens, ``D`` hidden size, ``K`` members, ``F`` features a member sees,
``S`` concatenated layer outputs of one member.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.head.config import HeadConfig

#: The tail shift is one number against a sum of hundreds, so its readout row is read at this gain: at equal learning
#: rates the shift would otherwise lag far behind the shortlist corrections.
TAIL_SHIFT_GAIN = 10.0


class PackedMembers(nn.Module):
    """``K`` dense-concat residual networks and their joint readout.

    A member is LayerNorm over its features, then SiLU layers; the outputs of *all* layers are concatenated and read by
    one zero-initialised matrix shared by the whole ensemble, so a fresh ensemble corrects nothing at all.

    Args:
        config: shape and regularisation.
        hidden_size: ``D`` of the backbone.
        seed: of the initialisation (weights, feature subsets, random widths).
    """

    feature_index: Tensor | None
    widths: Tensor

    def __init__(self, config: HeadConfig, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        rng = torch.Generator().manual_seed(seed)
        num_members = config.num_members
        num_features = max(1, round(config.feature_fraction * hidden_size))

        subsets = None
        if num_features < hidden_size:
            subsets = torch.stack(
                [
                    torch.randperm(hidden_size, generator=rng)[:num_features].sort().values
                    for _ in range(num_members)
                ]
            )
        self.register_buffer("feature_index", subsets)
        self.register_buffer("widths", _draw_widths(config, rng))

        self.norm_scale = nn.Parameter(torch.ones(num_members, 1, num_features))
        self.norm_shift = nn.Parameter(torch.zeros(num_members, 1, num_features))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        fan_in = torch.full((num_members,), num_features)
        packed_in = num_features
        for layer in range(len(config.hidden_sizes)):
            width = self.widths[:, layer]
            packed_out = int(width.max())
            weight = (
                torch.randn(num_members, packed_in, packed_out, generator=rng) * fan_in.rsqrt()[:, None, None]
            )
            self.weights.append(nn.Parameter(weight * _unit_mask(width, packed_out)))
            self.biases.append(nn.Parameter(torch.zeros(num_members, 1, packed_out)))
            fan_in, packed_in = width, packed_out
        packed_width = sum(bias.shape[-1] for bias in self.biases)
        self.readout = nn.Parameter(torch.zeros(hidden_size + 1, num_members * packed_width))

    def features(self, hidden_states: Tensor) -> Tensor:
        """Concatenated layer outputs of every member.

        Shape:
            hidden_states ``(N, D)``; returns ``(K, N, S)`` in float32.
        """
        x = hidden_states.float()
        if self.feature_index is None:
            x = F.layer_norm(x, x.shape[-1:]).unsqueeze(0).expand(self.config.num_members, -1, -1)
        else:
            x = x[:, self.feature_index].transpose(0, 1)
            x = F.layer_norm(x, x.shape[-1:])
        outputs = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer == 0:
                # The affine part of the norm is folded into the first product: (x s + t) W = x (s W) + t W.
                bias = bias + self.norm_shift @ weight
                weight = self.norm_scale.transpose(1, 2) * weight
            x = F.silu(torch.baddbmm(bias, x, weight))
            if self.config.random_widths:
                # Members narrower than the pack must not read their padding.
                x = x * _unit_mask(self.widths[:, layer], x.shape[-1])
            x = F.dropout(x, self.config.dropout, self.training)
            outputs.append(x)
        return torch.cat(outputs, dim=-1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Correction ``g`` and tail shift ``b`` of DESIGN section 3.

        Shape:
            hidden_states ``(N, D)``; returns ``g`` ``(N, D)`` and ``b`` ``(N,)``, float32.
        """
        features = self.features(hidden_states) * self._member_scales(hidden_states.device)
        out = features.transpose(0, 1).flatten(1) @ self.readout.t()
        return out[:, :-1], out[:, -1] * TAIL_SHIFT_GAIN

    def corrections_per_member(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What each member alone would answer if all ``K`` members were like it.

        Shape:
            hidden_states ``(N, D)``; returns ``(K, N, D)`` and ``(K, N)``, float32. Their mean over ``K`` is `forward`
            without dropout.
        """
        features = self.features(hidden_states)
        if self.config.aggregation == "sum":
            features = features * self.config.num_members
        readout = self.readout.unflatten(1, (self.config.num_members, -1)).permute(1, 2, 0)
        out = features @ readout
        return out[..., :-1], out[..., -1] * TAIL_SHIFT_GAIN

    def _member_scales(self, device: torch.device) -> Tensor:
        """``(K, 1, 1)`` weights of the members: aggregation, and member dropout while training."""
        num_members = self.config.num_members
        alive = torch.ones(num_members, device=device)
        if self.training and self.config.member_dropout > 0.0:
            alive = (torch.rand(num_members, device=device) >= self.config.member_dropout).float()
            if not alive.any():
                alive[torch.randint(num_members, (), device=device)] = 1.0
        total = float(num_members) if self.config.aggregation == "sum" else 1.0
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
