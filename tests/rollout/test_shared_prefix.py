"""Attention worked out by the cache, prompts held once: the same states as without, wherever a model lets it be."""

import pytest
import torch
from test_decode import completions, encode, trained_head, transformers_generate
from tiny import SUPPORTED, save_tiny

from tea_rl.attention import UnservedAttention
from tea_rl.backbone import load_backbone
from tea_rl.head.config import ContextConfig
from tea_rl.rollout import DecodeSettings, generate, probe_step, shared_prefix
from tea_rl.rollout.shared_prefix import Readers, SharedPrefixLayer

LONG = [
    "A prompt that is long enough for its keys to be held once for all of its completions",
    "Another one, which is somewhat shorter than the first but long all the same",
    "And a third: " + "many words " * 5,
]
#: Those whose attention may be divided: full attention in every layer, positions given, nothing added to the scores.
DIVISIBLE = {
    "llama",
    "llama_untied",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gemma",
    "cohere",
    "granite",
}


@pytest.fixture
def attended(monkeypatch):
    """Rows of every call of `SharedPrefixLayer.attend`."""
    rows = []
    original = SharedPrefixLayer.attend
    monkeypatch.setattr(
        SharedPrefixLayer,
        "attend",
        lambda self, query, *given: (rows.append(len(query)), original(self, query, *given))[1],
    )
    return rows


#: What all prompts begin with runs once: their padding then stands in the middle.
ALIKE = [
    f"{'Worked examples. ' * 3}{question}" for question in ("One?", "Another question?", "And a third one?")
]


@pytest.mark.parametrize("texts", [LONG, ALIKE], ids=["long", "alike"])
@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_states_are_those_of_a_plain_pass(backbones, family, texts, attended):
    backbone = backbones(family)
    head, prompts = trained_head(backbone), encode(backbone, texts)
    result = generate(backbone, head, prompts, DecodeSettings(num_generations=5, max_new_tokens=12))
    assert (family in DIVISIBLE) == bool(attended and max(attended) > len(LONG))
    for row in range(len(result.texts)):
        prompt, completion = prompts[result.prompt_index[row]], result.token_ids(row).tolist()
        ids = torch.tensor([prompt + completion])
        states = backbone.forward(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        found = result.tokens.states[result.tokens.rows == row]
        torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-4)


def test_running_means_beside_shared_prompts(backbones, attended):
    backbone = backbones("llama")
    context = ContextConfig(layers=[-1, 1])
    head, prompts = trained_head(backbone, context=context), encode(backbone, ALIKE)
    together = generate(backbone, head, prompts, DecodeSettings(4, 10), prompt_keys=[0, 1, 2])
    assert attended
    for row, prompt in enumerate(prompts):
        alone = generate(
            backbone, head, [prompt], DecodeSettings(2, 10), prompt_keys=[row]
        )  # too few to share
        mine = (together.tokens.rows >= 4 * row) & (together.tokens.rows < 4 * row + 2)
        assert alone.texts == together.texts[4 * row : 4 * row + 2]
        torch.testing.assert_close(together.tokens.states[mine], alone.tokens.states, atol=1e-5, rtol=1e-4)


def test_the_kernel_says_what_the_products_say():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 24, 16, generator=generator).bfloat16()
    keys, values = (torch.randn(2, 3, 50, 16, generator=generator).bfloat16() for _ in range(2))
    seen = torch.ones(2, 50)
    seen[0, :17] = 0
    bias = Readers(seen).bias
    found = shared_prefix._weighed(query, keys, values, bias, 0.7)
    wanted = shared_prefix._weighed(query, keys.float(), values.float(), bias, 0.7)
    assert found.shape == (2, 3, 24, 17) and found.dtype == torch.float32
    torch.testing.assert_close(
        found[..., -1], wanted[..., -1], atol=1e-4, rtol=1e-4
    )  # the mass is not rounded
    torch.testing.assert_close(found[..., :-1], wanted[..., :-1], atol=0.01, rtol=0.02)
    exact = torch.softmax(0.7 * query.float() @ keys.float().transpose(2, 3) + bias, dim=-1) @ values.float()
    torch.testing.assert_close(wanted[..., :-1], exact, atol=1e-5, rtol=1e-5)
    assert (shared_prefix._weighed(query, keys, values, None, 0.7) - found)[
        0
    ].abs().max() > 0.1  # padding matters


@pytest.mark.parametrize("kernel", [True, False])
def test_half_precision_by_the_kernel_or_by_products(tmp_path, monkeypatch, attended, kernel):
    """Both ways, whatever this machine would choose; bfloat16 tells states apart by a hundredth."""
    monkeypatch.setattr(shared_prefix, "kernel_is_fast", lambda dtype: kernel)
    backbone = load_backbone(str(save_tiny("llama", tmp_path)), "bfloat16", device="cpu")
    prompts = encode(backbone, LONG)
    result = generate(backbone, trained_head(backbone), prompts, DecodeSettings(5, 12))
    assert max(attended) > len(LONG)
    for row in range(len(result.texts)):
        ids = torch.tensor([prompts[result.prompt_index[row]] + result.token_ids(row).tolist()])
        states = backbone.forward(ids, attention_mask=torch.ones_like(ids))
        states = states[0, len(prompts[result.prompt_index[row]]) - 1 : -1].float()
        found = result.tokens.states[result.tokens.rows == row].float()
        assert (found - states).norm() < 0.02 * states.norm()


def test_greedy_and_samples_beside_each_other(backbones, attended):
    """Rows part, end at different times and leave; greedy ones write what transformers does."""
    backbone = backbones("llama")
    head, prompts = trained_head(backbone), encode(backbone, LONG)
    free = generate(backbone, head, prompts, DecodeSettings(4, 20, greedy_last=True))
    before, backbone.eos_token_ids = (
        backbone.eos_token_ids,
        (free.token_ids(3)[9].item(), free.token_ids(4)[2].item(), 1),
    )
    try:
        ours = generate(backbone, head, prompts, DecodeSettings(4, 20, greedy_last=True))
        wanted = transformers_generate(
            backbone, head, LONG, max_new_tokens=20, eos_token_id=list(backbone.eos_token_ids)
        )
        assert completions(ours)[3::4] == wanted
        few = generate(
            backbone, head, prompts[1:2], DecodeSettings(2, 20), prompt_keys=[1]
        )  # too few to share
        assert completions(few) == completions(ours)[4:6]
    finally:
        backbone.eos_token_ids = before
    assert min(ours.lengths) < max(ours.lengths)
    assert len(set(attended)) > 1


def test_short_prompts_and_few_completions_are_copied(backbones, attended):
    backbone = backbones("llama")
    head = trained_head(backbone)
    generate(backbone, head, encode(backbone, ["short"]), DecodeSettings(8, 4))
    generate(backbone, head, encode(backbone, LONG), DecodeSettings(2, 4))
    assert not attended


def test_a_model_that_touches_its_keys_is_left_alone(backbones, monkeypatch):
    backbone, original = backbones("llama"), SharedPrefixLayer.update
    with monkeypatch.context() as patch:
        patch.setattr(
            SharedPrefixLayer,
            "update",
            lambda self, *given: tuple(part.clone() for part in original(self, *given)),
        )
        assert not shared_prefix._divides_attention(backbone)
    assert shared_prefix._divides_attention(backbone)
    # Attention that is divided and wrong is found out as well, and so is a layer that was not asked.
    with monkeypatch.context() as patch:
        patch.setattr(SharedPrefixLayer, "attend", _without_own)
        assert not shared_prefix._divides_attention(backbone)
    monkeypatch.setattr(probe_step, "_EXACT", 10.0)
    assert shared_prefix._divides_attention(backbone)
    monkeypatch.setattr(SharedPrefixLayer, "attend", _without_own)
    assert not shared_prefix._divides_attention(backbone)


def _without_own(self, query, mask, scale):  # noqa: ARG001
    return torch.zeros(query.shape).transpose(1, 2)


def test_a_mask_that_says_more_than_padding_is_refused():
    readers = Readers(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    readers.select(torch.tensor([0, 1, 1]))
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[0, :, :, 0] = False
    readers.check(mask)
    windowed, own = mask.clone(), mask.clone()
    windowed[1, :, :, 0] = own[2, :, :, 3] = False
    for wrong in (windowed, own, mask.float(), mask.expand(3, 2, 1, 5), mask[..., :2], None):
        with pytest.raises(UnservedAttention, match="cannot be shared"):
            readers.check(wrong)
    Readers(torch.ones(2, 3)).check(None)


@pytest.mark.parametrize("prompt", [[0, 0, 1, 1], [0, 1, 1, 1, 3], [3], [2, 2, 0]])
def test_rows_find_their_way_back(prompt):
    readers = Readers(torch.ones(4, 3))
    readers.select(torch.tensor(prompt))
    rows = torch.arange(float(len(prompt))).unsqueeze(1)
    placed = readers.by_prompt(rows)
    assert placed.shape[:2] == (4, max(prompt.count(number) for number in range(4)))
    assert torch.equal(readers.by_row(placed), rows)
    for number in range(4):
        own = {float(row) for row, of in enumerate(prompt) if of == number}
        assert own <= set(placed[number].flatten().tolist())
    # Chosen again: the second row's prompt twice.
    readers.select(torch.tensor([len(prompt) // 2] * 2))
    twice = torch.tensor([[5.0], [6.0]])
    assert torch.equal(readers.by_row(readers.by_prompt(twice)), twice)
