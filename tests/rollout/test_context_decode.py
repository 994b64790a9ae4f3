"""The decode loop with context features: against transformers, against one plain pass, against other batches."""

import pytest
import torch
from tiny import SUPPORTED
from torch import nn

from tea_rl.head.config import ContextConfig, HeadConfig
from tea_rl.head.context import ContextState
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.rollout.sequences import shared_prefix

PROMPTS = ["Hello", "A much longer prompt than the first one", "x", "Some words in between"]
CONTEXT = ContextConfig(layers=[1, -1], horizons=["all", 6])


def trained_head(backbone, family="llama", **config) -> TeaHead:
    """A head that changes the model's choices, as after training, and reads the means."""
    context = ContextConfig(layers=[-1], horizons=["all", 6]) if family == "opt" else CONTEXT
    head = TeaHead.for_backbone(
        backbone, HeadConfig(hidden_sizes=[16, 8], context=context, **{"shortlist_size": 24, **config})
    )
    torch.manual_seed(3)
    nn.init.normal_(head.members.readout, std=0.3)
    return head.eval()


def encode(backbone, texts=PROMPTS):
    return [backbone.tokenizer(text).input_ids for text in texts]


def completions(result):
    return [result.token_ids(row).tolist() for row in range(len(result.texts))]


def transformers_generate(backbone, head, texts, **options):
    """Greedy completions of transformers with the head installed, as lists of ids up to the first EOS."""
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True)
    backbone.install(head)
    try:
        out = backbone.model.generate(**batch, do_sample=False, **options)
    finally:
        backbone.uninstall()
    found = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in backbone.eos_token_ids), len(row))
        found.append(row[:end])
    return found


@pytest.mark.parametrize("family", sorted(SUPPORTED))
@pytest.mark.parametrize("shortlist_size", [24, "all"])
def test_greedy_equals_transformers(backbones, family, shortlist_size):
    """Invariant 5, with the wrapped model."""
    backbone = backbones(family)
    head = trained_head(backbone, family, shortlist_size=shortlist_size)
    for texts in (PROMPTS, PROMPTS[:1]):
        ours = generate(
            backbone, head, encode(backbone, texts), DecodeSettings(max_new_tokens=12, greedy=True)
        )
        assert completions(ours) == transformers_generate(backbone, head, texts, max_new_tokens=12)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_records_equal_recomputation(backbones, family):
    """Invariant 4: wide states and log-probabilities of the decode loop, where sequences part, equal one plain pass."""
    backbone = backbones(family)
    head = trained_head(backbone, family)
    prompts = encode(backbone)
    result = generate(backbone, head, prompts, DecodeSettings(num_generations=3, max_new_tokens=10))
    tokens = result.tokens
    assert tokens.states.shape[1] == head.state_width > backbone.hidden_size
    for row in range(len(result.texts)):
        mine = tokens.rows == row
        prompt, completion = prompts[result.prompt_index[row]], result.token_ids(row).tolist()
        ids = torch.tensor([prompt + completion])
        state = ContextState(head.config.context)
        states = backbone.forward(ids, torch.ones_like(ids), context=state)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(tokens.states[mine], states, atol=1e-5, rtol=1e-5)
        logps = (head(states) * backbone.logit_scale).log_softmax(-1)
        found = logps.gather(1, tokens.actions[mine].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(tokens.logps[mine], found, atol=2e-4, rtol=1e-4)
    assert tokens.kl.max() > 0


def test_rows_that_end_early_leave_with_their_means(backbones):
    """Several rows end and are dropped from the batch at different times."""
    backbone = backbones("llama")
    head = trained_head(backbone)
    settings = DecodeSettings(max_new_tokens=20, greedy=True)
    free = completions(generate(backbone, head, encode(backbone), settings))
    before, backbone.eos_token_ids = backbone.eos_token_ids, (free[0][3], free[1][9], 1)
    try:
        ours = generate(backbone, head, encode(backbone), settings)
        ends = list(backbone.eos_token_ids)
        theirs = transformers_generate(backbone, head, PROMPTS, max_new_tokens=20, eos_token_id=ends)
        assert completions(ours) == theirs
    finally:
        backbone.eos_token_ids = before
    assert min(ours.lengths) < max(ours.lengths)


def test_samples_do_not_depend_on_the_batch_or_ashared_prefix(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    examples = "Worked example one. Worked example two. "
    prompts = encode(backbone, [examples + text for text in ("a", "bcd", "efghij")])
    assert shared_prefix(prompts) == len(examples)
    settings = DecodeSettings(num_generations=2, max_new_tokens=10)
    together = generate(backbone, head, prompts, settings, prompt_keys=[0, 1, 2])
    for row, prompt in enumerate(prompts):  # alone, nothing is shared
        alone = generate(backbone, head, [prompt], settings, prompt_keys=[row])
        assert alone.texts == together.texts[2 * row : 2 * row + 2]
        mine = together.tokens.rows.div(2, rounding_mode="floor") == row
        torch.testing.assert_close(together.tokens.states[mine], alone.tokens.states, atol=1e-5, rtol=1e-5)


def test_means_change_what_is_written(backbones):
    """The same members with the means cut off write something else, or the tests above would prove nothing."""
    backbone = backbones("llama")
    head = trained_head(backbone)
    plain = generate(backbone, head, encode(backbone), DecodeSettings(max_new_tokens=12, greedy=True))
    forgetful = trained_head(backbone)
    width = backbone.hidden_size
    through = forgetful.members.forward
    forgetful.members.forward = lambda states: through(
        torch.cat([states[:, :width], torch.zeros_like(states[:, width:])], dim=1)
    )
    other = generate(backbone, forgetful, encode(backbone), DecodeSettings(max_new_tokens=12, greedy=True))
    assert completions(plain) != completions(other)
