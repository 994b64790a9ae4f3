"""The decode loop against transformers' own, its records against recomputation, its randomness against the batch."""

import pytest
import torch
from tiny import SUPPORTED
from torch import nn

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate, sequences
from tea_rl.rollout.decode import _greedy_slots, row_uniforms
from tea_rl.rollout.sequences import shared_prefix

PROMPTS = ["Hello", "A much longer prompt than the first one", "x", "Some words in between"]


def trained_head(backbone, **config) -> TeaHead:
    """A head that changes the model's choices, as after training."""
    config = {"hidden_sizes": [16, 8], "shortlist_size": 24, **config}
    head = TeaHead.for_backbone(backbone, HeadConfig(**config))
    torch.manual_seed(3)
    nn.init.normal_(head.members.readout, std=0.05)
    return head.eval()


def encode(backbone, texts=PROMPTS):
    return [backbone.tokenizer(text).input_ids for text in texts]


def transformers_generate(backbone, head, texts, **options):
    """Greedy completions of transformers with the head installed, as lists of ids up to the first EOS."""
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True)
    backbone.install(head)
    try:
        out = backbone.model.generate(**batch, do_sample=False, pad_token_id=backbone.pad_token_id, **options)
    finally:
        backbone.uninstall()
    completions = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in backbone.eos_token_ids), len(row))
        completions.append(row[:end])
    return completions


def completions(result):
    return [result.token_ids(row).tolist() for row in range(len(result.texts))]


@pytest.mark.parametrize("family", sorted(SUPPORTED))
@pytest.mark.parametrize("shortlist_size", [24, "all"])
def test_greedy_equals_transformers(backbones, family, shortlist_size):
    """Invariant 5: batch by batch, with padding and EOS."""
    backbone = backbones(family)
    head = trained_head(backbone, shortlist_size=shortlist_size)
    for texts in (PROMPTS, PROMPTS[:1], PROMPTS[::-1]):
        ours = generate(
            backbone, head, encode(backbone, texts), DecodeSettings(max_new_tokens=12, greedy=True)
        )
        assert completions(ours) == transformers_generate(backbone, head, texts, max_new_tokens=12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_fresh_head_writes_the_base_models_text(backbones, family):
    """Invariant 1 on text: greedy completions of the model without any head."""
    backbone = backbones(family)
    head = TeaHead.for_backbone(backbone, HeadConfig(shortlist_size=24))
    ours = generate(backbone, head, encode(backbone), DecodeSettings(max_new_tokens=12, greedy=True))
    assert completions(ours) == transformers_generate(
        backbone, backbone.reference, PROMPTS, max_new_tokens=12
    )
    assert ours.tokens.kl.abs().max() == 0
    assert torch.equal(ours.tokens.logps, ours.tokens.base_logps)


def test_several_eos_ids_and_early_finish(backbones):
    """Rows end at different times, at any of several ids, and leave the batch without disturbing the others."""
    backbone = backbones("llama")
    head = trained_head(backbone)
    settings = DecodeSettings(max_new_tokens=20, greedy=True)
    free = completions(generate(backbone, head, encode(backbone), settings))
    ends = (free[0][3], free[1][9], 1)
    before, backbone.eos_token_ids = backbone.eos_token_ids, ends
    try:
        ours = generate(backbone, head, encode(backbone), settings)
        assert completions(ours) == transformers_generate(
            backbone, head, PROMPTS, max_new_tokens=20, eos_token_id=list(ends)
        )
    finally:
        backbone.eos_token_ids = before
    assert min(ours.lengths) < max(ours.lengths)
    for row, ids in enumerate(completions(ours)):
        assert bool(ours.finished[row]) == (ids[-1] in ends)
        assert not any(token in ends for token in ids[:-1])


@pytest.mark.parametrize("family", sorted(SUPPORTED))
@pytest.mark.parametrize(("shortlist_size", "temperature"), [(24, 1.0), (24, 0.7), ("all", 1.3)])
def test_records_equal_recomputation(backbones, family, shortlist_size, temperature):
    """Invariant 4: states, log-probabilities, KL and entropy from the decode loop equal those of one plain pass."""
    backbone = backbones(family)
    head = trained_head(backbone, shortlist_size=shortlist_size)
    prompts = encode(backbone)
    settings = DecodeSettings(num_generations=3, max_new_tokens=10, temperature=temperature)
    result = generate(backbone, head, prompts, settings)
    tokens = result.tokens
    in_tail = 0
    for row in range(len(result.texts)):
        mine = tokens.rows == row
        prompt, completion = prompts[result.prompt_index[row]], result.token_ids(row).tolist()
        ids = torch.tensor([prompt + completion])
        states = backbone.forward(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(tokens.states[mine], states, atol=1e-5, rtol=1e-4)
        logps = (head(states) * backbone.logit_scale / temperature).log_softmax(-1)
        base = (backbone.reference(states) * backbone.logit_scale / temperature).log_softmax(-1)
        chosen = tokens.actions[mine].unsqueeze(1)
        close = {"atol": 2e-4, "rtol": 1e-4}
        torch.testing.assert_close(tokens.logps[mine], logps.gather(1, chosen).squeeze(1), **close)
        torch.testing.assert_close(tokens.base_logps[mine], base.gather(1, chosen).squeeze(1), **close)
        torch.testing.assert_close(tokens.kl[mine], (logps.exp() * (logps - base)).sum(-1), **close)
        torch.testing.assert_close(tokens.entropy[mine], -(logps.exp() * logps).sum(-1), **close)
        in_tail += int((tokens.within_tail_logps[mine] != 0).sum())
    assert in_tail > 0 or shortlist_size == "all"


@pytest.mark.parametrize("shortlist_size", [24, "all"])
def test_replay_equals_the_record(backbones, shortlist_size):
    """Invariant 4: what the learner recomputes from a record is what was recorded."""
    backbone = backbones("llama")
    head = trained_head(backbone, shortlist_size=shortlist_size)
    tokens = generate(backbone, head, encode(backbone), DecodeSettings(2, 10, temperature=0.9)).tokens
    if shortlist_size == "all":
        terms = head.full_terms(tokens.states, tokens.actions, 0.9)
    else:
        terms = head.shortlist_terms(
            tokens.states, tokens.shortlist, tokens.slots, tokens.within_tail_logps, 0.9
        )
    torch.testing.assert_close(terms.logps, tokens.logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.kl, tokens.kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.entropy, tokens.entropy, atol=1e-5, rtol=1e-5)


def test_samples_do_not_depend_on_the_batch(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    prompts = encode(backbone)
    settings = DecodeSettings(num_generations=3, max_new_tokens=12)
    together = generate(backbone, head, prompts, settings, seed=(5,), prompt_keys=[10, 11, 12, 13])
    backwards = generate(backbone, head, prompts[::-1], settings, seed=(5,), prompt_keys=[13, 12, 11, 10])
    alone = generate(backbone, head, prompts[2:3], settings, seed=(5,), prompt_keys=[12])
    fewer = generate(backbone, head, prompts[2:3], DecodeSettings(1, 12), seed=(5,), prompt_keys=[12])
    assert together.texts[6:9] == alone.texts == backwards.texts[3:6]
    assert fewer.texts == alone.texts[:1]
    assert len(set(together.texts)) == len(together.texts)
    other = generate(backbone, head, prompts, settings, seed=(6,), prompt_keys=[10, 11, 12, 13])
    assert other.texts != together.texts


def test_sampling_follows_the_policy(backbones):
    """First tokens of many generations against the policy's own probabilities, tail included."""
    backbone = backbones("llama")
    head = trained_head(backbone, shortlist_size=8)
    prompt = encode(backbone, ["Once"])
    count = 6000
    result = generate(
        backbone, head, prompt, DecodeSettings(num_generations=count, max_new_tokens=1, temperature=1.2)
    )
    state = backbone.forward(torch.tensor(prompt))[:, -1]
    probs = (head(state) / 1.2).softmax(-1)[0]
    shares = torch.bincount(result.tokens.actions, minlength=backbone.vocab_size) / count
    sigma = (probs * (1 - probs) / count).sqrt()
    assert ((shares - probs).abs() < 5 * sigma + 1e-4).all()
    tail = result.tokens.slots == 8
    assert 0 < tail.float().mean() < 1


def test_shared_prefix_changes_nothing(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    examples = "Worked example one. Worked example two. "
    prompts = encode(backbone, [examples + text for text in ("a", "bcd", "efghij")])
    assert shared_prefix(prompts) == len(examples)
    together = generate(backbone, head, prompts, DecodeSettings(2, 10), prompt_keys=[0, 1, 2])
    for row, prompt in enumerate(prompts):  # alone, nothing is shared
        alone = generate(backbone, head, [prompt], DecodeSettings(2, 10), prompt_keys=[row])
        assert alone.texts == together.texts[2 * row : 2 * row + 2]


def test_a_remembered_prefix_is_the_computed_one(backbones):
    """The second batch with the same worked examples takes their cache from the first, which must not have touched it."""
    backbone = backbones("llama")
    head = trained_head(backbone)
    prompts = encode(
        backbone, [f"{'three worked examples ' * 3}{question}" for question in ("a?", "b?", "cc?")]
    )
    settings = DecodeSettings(num_generations=2, max_new_tokens=6)
    backbone.newest_prefix = None
    first = generate(backbone, head, prompts, settings)
    assert backbone.newest_prefix is not None
    again = generate(backbone, head, prompts, settings)
    assert torch.equal(first.tokens.states, again.tokens.states)
    assert completions(first) == completions(again)
    # Another prefix takes its place.
    others = encode(backbone, [f"{'quite another prefix ' * 3}{question}" for question in ("a?", "b?")])
    generate(backbone, head, others, settings)
    assert torch.equal(generate(backbone, head, prompts, settings).tokens.states, first.tokens.states)


def test_the_last_completion_is_greedy_beside_the_same_samples(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    prompts = encode(backbone)
    both = completions(
        generate(
            backbone, head, prompts, DecodeSettings(num_generations=3, max_new_tokens=8, greedy_last=True)
        )
    )
    greedy = generate(backbone, head, prompts, DecodeSettings(max_new_tokens=8, greedy=True))
    sampled = completions(
        generate(backbone, head, prompts, DecodeSettings(num_generations=3, max_new_tokens=8))
    )
    assert both[2::3] == completions(greedy)
    assert [both[0::3], both[1::3]] == [sampled[0::3], sampled[1::3]]


def test_identical_prompts_keep_a_token_of_their_own(backbones):
    backbone = backbones("llama")
    prompts = encode(backbone, ["exactly the same prompt"] * 2)
    assert shared_prefix(prompts) == len(prompts[0]) - 1
    assert len(generate(backbone, trained_head(backbone), prompts, DecodeSettings(1, 4)).texts) == 2


def test_stop_strings_end_a_completion(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    free = generate(backbone, head, encode(backbone), DecodeSettings(8, 30))
    stop = max(
        "abcdefghijklmnopqrstuvwxyz", key=lambda letter: sum(letter in text[1:-1] for text in free.texts)
    )
    stopped = generate(backbone, head, encode(backbone), DecodeSettings(8, 30, stop=(stop,)))
    ended = [text for text in stopped.texts if stop in text]
    assert ended
    assert all(text.index(stop) == len(text) - 1 for text in ended)
    for long, short in zip(free.texts, stopped.texts, strict=True):
        assert long.startswith(short.removesuffix("\ufffd"))


def test_rollout_leaves_the_backbone_alone(backbones):
    """Invariant 2, for generation: no tensor changes, nothing stays installed."""
    backbone = backbones("gpt2")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    generate(backbone, trained_head(backbone), encode(backbone), DecodeSettings(2, 6))
    assert not backbone.installed
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_uniforms_are_keyed():
    one = row_uniforms([(1, 2), (1, 3)], 5)
    two = row_uniforms([(1, 3)], 5)
    assert one.shape == (2, 5, 2)
    assert torch.equal(one[1], two[0])
    assert not torch.equal(one[0], one[1])
    assert torch.equal(
        row_uniforms([(1, 3)], 9)[0, :5], two[0]
    )  # a longer completion continues the same stream


def test_of_equal_logits_the_first_token_is_taken():
    """As ``argmax`` does; in half precision logits are often equal."""
    logits = torch.tensor([[2.0, 2.0, 1.0, -1.0], [2.0, 2.0, 1.0, 2.5], [2.0, 2.0, 1.0, 2.5]])
    listed = torch.tensor([[41, 7, 3]]).expand(3, -1)
    tail = torch.zeros(3, 60)
    tail[:, 10], tail[1, 10], tail[2, 10:20] = 1.0, 1.0, 0.1  # one likely token, or ten unlikely ones
    assert _greedy_slots(logits, listed, tail).tolist() == [1, 3, 1]
    assert _greedy_slots(logits, None, None).tolist() == [0, 3, 3]


def test_batches_are_multiples_and_nobody_notices(backbones, monkeypatch):
    """Rows are filled up when they are rearranged; records and texts are those of any other number of rows."""
    backbone, sizes = backbones("llama"), []
    head, prompts = trained_head(backbone), encode(backbone)
    forward = backbone.forward
    monkeypatch.setattr(
        backbone, "forward", lambda **given: (sizes.append(len(given["input_ids"])), forward(**given))[1]
    )
    settings = DecodeSettings(num_generations=6, max_new_tokens=14)
    before, backbone.eos_token_ids = (
        backbone.eos_token_ids,
        tuple(range(1, 60)),
    )  # a fifth of all tokens end one
    try:
        found = generate(backbone, head, prompts, settings)
        filled, sizes[:] = list(sizes), []
        monkeypatch.setattr(sequences, "_ROWS", 10**6)
        wanted = generate(backbone, head, prompts, settings)
    finally:
        backbone.eos_token_ids = before
    assert all(size <= 8 or size % 8 == 0 for size in filled) and any(size > 8 for size in filled)
    assert any(size > 8 and size % 8 for size in sizes)
    assert found.texts == wanted.texts
    torch.testing.assert_close(found.tokens.states, wanted.tokens.states, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.tokens.rows, wanted.tokens.rows)
    assert len(found.tokens.state_ids.unique()) == len(wanted.tokens.state_ids.unique())
