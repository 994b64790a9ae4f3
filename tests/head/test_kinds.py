"""Every kind of head through the decode loop and an update, on a tiny backbone."""

import pytest
import torch
from tiny import tiny_backbone

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.training.learner import Learner

KINDS = [
    {"readout": "vocab", "readout_rank": 8, "shortlist_size": 24},
    {"readout": "vocab", "readout_rank": 8, "shortlist_size": "all"},
    {"readout": "vocab", "readout_rank": 8, "shortlist_size": "auto"},
    {"member_kind": "memory", "memory_slots": 12, "shortlist_size": 24},
    {"member_kind": "memory", "memory_slots": 12, "readout": "vocab", "shortlist_size": "auto"},
    {"shortlist_size": "auto", "aggregation": "mean"},
    {"gate": True, "shortlist_size": 24},
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


def names(kind):
    return "-".join(map(str, kind.values()))


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_an_update_makes_rewarded_tokens_likelier(backbone, kind):
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], **kind))
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    tokens = generate(backbone, head, prompts, DecodeSettings(8, 12)).tokens
    assert tokens.kl.abs().max() == 0
    train = TrainConfig(learning_rate=3e-3, warmup_steps=0)
    objective = ObjectiveConfig(name="grpo", inner_epochs=4, minibatch_tokens=64)
    learner = Learner(head, objective, AnchorConfig(), train, 1.0, total_steps=10)
    good = tokens.actions % 2 == 0
    learner.update(tokens, torch.where(good, 1.0, -1.0), torch.Generator().manual_seed(0))
    gain = head.terms(tokens).logps - tokens.logps
    assert gain[good].mean() > gain[~good].mean() + 0.05


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_replay_equals_the_record_and_the_drop_in(backbone, kind):
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], **kind))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    head.eval()
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    tokens = generate(backbone, head, prompts, DecodeSettings(4, 8, temperature=0.9)).tokens
    terms = head.terms(tokens, 0.9)
    for mine, recorded in zip(terms[:4], (tokens.logps, tokens.kl, tokens.kl, tokens.entropy), strict=True):
        torch.testing.assert_close(mine, recorded, atol=1e-4, rtol=1e-4)
    logps = (head(tokens.states) * backbone.logit_scale / 0.9).log_softmax(-1)
    chosen = logps.gather(1, tokens.actions.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, tokens.logps, atol=1e-4, rtol=1e-4)
