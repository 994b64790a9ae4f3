"""The policy in the letter of DESIGN section 3: explicit logits over the whole vocabulary, members one by one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead

HIDDEN, VOCAB, TOKENS = 32, 300, 40


def make_head(logit_scale: float = 1.0, spread: float = 0.05, **config) -> TeaHead:
    torch.manual_seed(0)
    reference = nn.Linear(HIDDEN, VOCAB, bias=config.pop("bias", False)).requires_grad_(False)
    reference.weight.mul_(4.0)  # a peaked distribution, as language models have
    config = {"hidden_sizes": [24, 12], "readout_rank": 5, "memory_slots": 9, **config}
    head = TeaHead(reference, HeadConfig(**config), logit_scale=logit_scale, seed=1)
    with torch.no_grad():
        for parameter in head.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return head.eval()


def member_correction(head: TeaHead, k: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Correction ``(N, V)`` at scale 1, and tail shift ``(N,)``, of member ``k`` alone; states may be wide."""
    members, config = head.members, head.config
    blocks = list(states.split(head.hidden_size, dim=1))
    if members.feature_index is not None:
        picked = members.feature_index[k].chunk(len(blocks))
        blocks = [
            block[:, index - n * head.hidden_size]
            for n, (block, index) in enumerate(zip(blocks, picked, strict=True))
        ]
    x = torch.cat([F.layer_norm(block, block.shape[1:]) for block in blocks], dim=1)
    normed = x
    x = x * members.norm_scale[k] + members.norm_shift[k]
    outputs = []
    for layer, (weight, bias) in enumerate(zip(members.weights, members.biases, strict=True)):
        own, packed = int(members.widths[k, layer]), weight.shape[2]
        x = x @ weight[k, : x.shape[1], :own] + bias[k, :, :own]
        if config.member_kind == "memory":
            keys, values = members.keys[layer][k, :, :own], members.values[layer][k, :, :own]
            x = (x @ keys.t() / own**0.5).softmax(-1) @ values
        else:
            x = F.silu(x)
        outputs.append(F.pad(x, (0, packed - own)))
    features = torch.cat(outputs, dim=1)
    if config.gate:
        features = features * 2 / (1 + (-(normed @ members.gate_weight[k] + members.gate_bias[k])).exp())
    out = features @ members.readout.chunk(config.num_members, dim=1)[k].t()
    if config.readout == "tied":
        delta = out[:, :-1] @ head.weight.t()
        if head.reference_delta is not None:
            delta = delta + out[:, :-1] @ head.reference_delta.t()
    else:
        own_columns = members.vocab_readout.chunk(config.num_members, dim=1)[k]
        delta = 10 * (features @ members.rank_readout[k]) @ own_columns.t()
    return delta, 10 * out[:, -1]


def correction(head: TeaHead, states: Tensor) -> tuple[Tensor, Tensor]:
    """The ensemble's correction ``(N, V)`` and tail shift ``(N,)``, at scale 1."""
    parts = [member_correction(head, k, states) for k in range(head.config.num_members)]
    share = 1.0 if head.config.aggregation == "sum" else 1.0 / len(parts)
    delta = share * sum(part[0] for part in parts)
    if head.reference_delta is not None:
        delta = delta + states[:, : head.hidden_size] @ head.reference_delta.t()
    return delta, share * sum(part[1] for part in parts)


def logits_of(head: TeaHead, states: Tensor) -> tuple[Tensor, Tensor]:
    """Policy and reference logits at temperature 1, ``(N, V)``."""
    hidden = states[:, : head.hidden_size]
    base = head.logit_scale * (hidden @ head.weight.t() + (0 if head.bias is None else head.bias))
    delta, shift = correction(head, states)
    corrected = base + head.strength * head.logit_scale * delta
    if head.full_vocabulary:
        return corrected, base
    top = base.topk(head.config.shortlist_size).indices
    inside = torch.zeros_like(base, dtype=torch.bool).scatter_(1, top, True)
    return torch.where(inside, corrected, base + head.strength * shift.unsqueeze(1)), base


def naive_terms(
    head: TeaHead, states: Tensor, actions: Tensor, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probability of the actions, every divergence and entropy, each ``(N,)``."""
    logits, base = (values / temperature for values in logits_of(head, states))
    logps, base_logps = logits.log_softmax(-1), base.log_softmax(-1)
    return {
        "logps": logps.gather(1, actions.unsqueeze(1)).squeeze(1),
        "reverse_kl": (logps.exp() * (logps - base_logps)).sum(-1),
        "forward_kl": (base_logps.exp() * (base_logps - logps)).sum(-1),
        "logit_l1": (logits - base).abs().mean(-1) / (base.std(-1) + 1),
        "entropy": -(logps.exp() * logps).sum(-1),
    }
