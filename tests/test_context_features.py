"""Context features of a backbone: one pass, token by token, padded, expanded, and inside the wrapped model's generate."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import SUPPORTED, tiny_backbone
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig, HeadConfig
from tea_rl.head.context import ContextState
from tea_rl.head.layer import TeaHead
from tea_rl.packaged import DEFAULT_MODEL, INSTALL_COMMAND, packaged_gguf

TEXTS = ["Hello", "A much longer prompt than the first one", "x", "Some words in between"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HORIZONS = ["all", 5.0]


class ReadsMeans(nn.Module):
    """A head whose choices hang on the means; it remembers every state that it was given."""

    def __init__(self, backbone, context: ContextConfig, gain: float = 0.5) -> None:
        super().__init__()
        self.config = HeadConfig(context=context)
        self.width, self.weight, self.bias = backbone.hidden_size, backbone.reference.weight, None
        generator = torch.Generator().manual_seed(1)
        shape = (backbone.vocab_size, backbone.hidden_size * context.num_means)
        self.gain = gain * torch.randn(shape, generator=generator)
        self.seen: list[torch.Tensor] = []

    def forward(self, states):
        self.seen.append(states)
        base = F.linear(states[..., : self.width], self.weight).float()
        return base + F.linear(states[..., self.width :].float(), self.gain)


def context_of(family: str) -> ContextConfig:
    # OPT's inner layers are wider than what its output layer reads.
    return ContextConfig(layers=[-1] if family == "opt" else [1, 2], horizons=HORIZONS)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Tiny backbones by family, made once; three layers, so that an inner one is read."""
    made = {}

    def get(family):
        if family not in made:
            options = {} if family == "gemma3" else {"num_hidden_layers": 3}
            if family in ("qwen2", "qwen3"):
                options["layer_types"] = ["full_attention"] * 3
            made[family] = tiny_backbone(tmp_path_factory.mktemp("models"), family, **options)
        return made[family]

    return get


def encode(backbone, text):
    return backbone.tokenizer(text, return_tensors="pt").input_ids


def whole(backbone, ids, context):
    """Wide states of one row without padding, in one pass."""
    return backbone.forward(ids, torch.ones_like(ids), context=ContextState(context))[0]


def hooks(backbone) -> int:
    """Hooks on the model's modules; transformers adds some of its own when it is first asked for inner states."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.model.modules()
    )


def as_defined(backbone, ids, context) -> torch.Tensor:
    """Wide states from the hidden states that transformers returns."""
    states = backbone.body(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    blocks = [states.last_hidden_state[0]]
    for layer in context.layers:
        x = states.hidden_states[layer][0].double()
        x = F.layer_norm(x, x.shape[-1:])
        for horizon in context.horizons:
            rate = 0.0 if horizon == "all" else 1 / horizon
            rows = [x[0]]
            for t in range(1, len(x)):
                weights = torch.exp(-rate * torch.arange(t - 1, -1, -1).double())
                rows.append(weights @ x[1 : t + 1] / weights.sum())
            blocks.append(torch.stack(rows).float())
    return torch.cat(blocks, dim=1)


# ---- Backbone.forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_one_pass_is_the_definition(backbones, family):
    backbone, context = backbones(family), context_of(family)
    ids = encode(backbone, TEXTS[1])
    before = hooks(backbone)
    with torch.no_grad():
        wide = whole(backbone, ids, context)
        assert hooks(backbone) == before
        assert wide.shape == (ids.shape[1], backbone.hidden_size * (1 + context.num_means))
        torch.testing.assert_close(wide, as_defined(backbone, ids, context), **CLOSE)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_single_tokens_equal_one_pass(backbones, family, side):
    """Invariant 4: the rows of a padded batch, and the same token by token behind a cache, are the rows alone."""
    backbone, context = backbones(family), context_of(family)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wide = backbone.forward(ids, mask, positions, context=ContextState(context))
    state, cache = ContextState(context), DynamicCache(config=backbone.model.config)
    steps = [
        backbone.forward(ids[:, t : t + 1], mask[:, : t + 1], positions[:, t : t + 1], cache, state)
        for t in range(ids.shape[1])
    ]
    stepped = torch.cat(steps, dim=1)
    assert torch.equal(state.tokens, mask.sum(1))
    for row, text in enumerate(TEXTS):
        real = mask[row].bool()
        alone = whole(backbone, encode(backbone, text), context)
        torch.testing.assert_close(wide[row, real], alone, **CLOSE)
        torch.testing.assert_close(stepped[row, real], alone, **CLOSE)


def test_a_cache_and_its_means_expand_together(backbones):
    backbone, context = backbones("llama"), context_of("llama")
    ids = encode(backbone, "A shared beginning, and an end")
    state, cache = ContextState(context), DynamicCache(config=backbone.model.config)
    backbone.forward(ids[:, :20], torch.ones(1, 20), past_key_values=cache, context=state)
    cache.batch_repeat_interleave(3)
    state.repeat_interleave(3)
    more = torch.stack([ids[0, 20:], ids[0, 20:].flip(0), ids[0, 20:].roll(1)])
    mask = torch.ones(3, 20 + more.shape[1])
    wide = backbone.forward(more, mask, past_key_values=cache, context=state)
    for row in range(3):
        alone = whole(backbone, torch.cat([ids[:, :20], more[row : row + 1]], 1), context)
        torch.testing.assert_close(wide[row], alone[20:], **CLOSE)


def test_without_context_nothing_happens(backbones, monkeypatch):
    backbone = backbones("llama")
    ids = encode(backbone, TEXTS[1])
    expected = backbone.body(ids, use_cache=False).last_hidden_state
    before = hooks(backbone)

    def forbidden(*args, **kwargs):
        raise AssertionError("a hook was installed")

    monkeypatch.setattr(nn.Module, "register_forward_hook", forbidden)
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", forbidden)
    head = TeaHead.for_backbone(backbone, HeadConfig(shortlist_size=24))
    backbone.install(head)
    assert torch.equal(backbone.forward(ids), expected)
    backbone.uninstall()
    assert hooks(backbone) == before


def test_hooks_go_when_the_pass_fails(backbones):
    backbone = backbones("llama")
    before = hooks(backbone)
    with pytest.raises(IndexError):
        backbone.forward(torch.tensor([[10**6]]), context=ContextState(context_of("llama")))
    assert hooks(backbone) == before


def test_half_precision_states_keep_their_type(tmp_path):
    from tea_rl.backbone import load_backbone

    folder = tiny_backbone(tmp_path).name_or_path
    backbone, context = load_backbone(folder, dtype="bfloat16", device="cpu"), ContextConfig(layers=[1, -1])
    state = ContextState(context)
    ids = encode(backbone, TEXTS[1])
    wide = backbone.forward(ids, context=state)
    assert wide.dtype == torch.bfloat16 and state.means.dtype == torch.float32
    assert torch.equal(wide[..., : backbone.hidden_size], backbone.forward(ids))


def test_layers_of_another_width_are_refused(backbones):
    backbone = backbones("opt")
    before = hooks(backbone)
    with pytest.raises(TeaError, match=r"32 wide .* reads 24: take layers \[-1\]"):
        backbone.forward(torch.tensor([[5, 6]]), context=ContextState(ContextConfig(layers=[1])))
    with pytest.raises(TeaError, match="layers are 1 to 3"):
        backbone.install(ReadsMeans(backbone, ContextConfig(layers=[9])))
    assert not backbone.installed and hooks(backbone) == before


# ---- the wrapped model ----------------------------------------------------------------------------------------------


@pytest.fixture
def wrapped(backbones):
    """Installs a head that reads means into a family's backbone, and takes it out afterwards."""
    used = []

    def get(family, gain=0.5):
        backbone = backbones(family)
        head = ReadsMeans(backbone, context_of(family), gain)
        backbone.install(head)
        used.append(backbone)
        return backbone, head

    yield get
    for backbone in used:
        backbone.uninstall()


def completions_and_scores(backbone, head, out, prompt_length, prompt_mask):
    """Summed log-probabilities of completions (no EOS among them), each recomputed from one pass over its own tokens."""
    scores = []
    for row, sequence in enumerate(out):
        prompt = sequence[:prompt_length][prompt_mask[row].bool()]
        ids = torch.cat([prompt, sequence[prompt_length:]]).unsqueeze(0)
        wide = whole(backbone, ids, head.config.context)
        logps = head(wide[len(prompt) - 1 : -1]).mul(backbone.logit_scale).log_softmax(-1)
        scores.append(logps.gather(1, ids[0, len(prompt) :].unsqueeze(1)).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_generate_hands_over_the_states_of_one_pass(backbones, wrapped, family):
    """Greedy, with left padding: every state the head saw is that of the finished text in one pass."""
    before = hooks(backbones(family))
    backbone, head = wrapped(family)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    out = backbone.model.generate(**batch, do_sample=False, max_new_tokens=12, eos_token_id=None)
    seen = torch.cat([states[:, -1:] for states in head.seen], dim=1)
    length = batch["input_ids"].shape[1]
    for row, text in enumerate(TEXTS):
        prompt = encode(backbone, text)
        ids = torch.cat([prompt, out[row : row + 1, length:]], dim=1)
        alone = whole(backbone, ids, head.config.context)
        torch.testing.assert_close(seen[row], alone[prompt.shape[1] - 1 : -1], **CLOSE)
    backbone.uninstall()
    assert hooks(backbone) == before
    # The means do change what is written, or this would prove nothing.
    plain = backbone.model.generate(**batch, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert not torch.equal(plain, out)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_beam_search_takes_the_means_along(wrapped, family):
    """Scores of beams are those of their texts, although rows were exchanged on the way."""
    backbone, head = wrapped(family, gain=0.05)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    orders = []
    reorder = DynamicCache.reorder_cache

    def spy(cache, beam_idx):
        orders.append(beam_idx.tolist())
        return reorder(cache, beam_idx)

    DynamicCache.reorder_cache = spy
    try:
        out = backbone.model.generate(
            **batch,
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=10,
            eos_token_id=None,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    finally:
        DynamicCache.reorder_cache = reorder
    assert any(order != sorted(order) or len(set(order)) < len(order) for order in orders)
    mask = batch["attention_mask"].repeat_interleave(3, dim=0)
    expected = completions_and_scores(backbone, head, out.sequences, batch["input_ids"].shape[1], mask)
    torch.testing.assert_close(out.sequences_scores, expected, rtol=1e-4, atol=1e-3)


def test_sampled_sequences_and_chunked_prefill(wrapped):
    backbone, head = wrapped("llama", gain=0.05)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 8, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    out = backbone.model.generate(
        **batch, do_sample=True, top_k=0, num_return_sequences=3, prefill_chunk_size=7, **options
    )
    length = batch["input_ids"].shape[1]
    logps = torch.stack(out.logits, 1).log_softmax(-1)
    found = logps.gather(2, out.sequences[:, length:].unsqueeze(2)).sum((1, 2))
    mask = batch["attention_mask"].repeat_interleave(3, dim=0)
    expected = completions_and_scores(backbone, head, out.sequences, length, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert len(set(map(tuple, out.sequences.tolist()))) == len(out.sequences)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_a_prompt_cache_is_reused_copied_and_expanded(wrapped, family):
    """The usual way to share a prompt: fill a cache once, copy it for every continuation."""
    backbone, head = wrapped(family)
    model = backbone.model
    prompt = encode(backbone, "A prompt that many share. ")
    cache = model(prompt, use_cache=True).past_key_values  # made by the transformer itself
    ends = [encode(backbone, "one"), encode(backbone, "two!")]
    for end in ends:
        ids = torch.cat([prompt, end], dim=1)
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        fresh = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        again = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=copy.deepcopy(cache), **options
        )
        assert torch.equal(fresh, again)
    if family == "bloom":  # builds its position biases from the mask, which a bare call below does not give
        return
    more = torch.cat([encode(backbone, "abc"), encode(backbone, "xyz")])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 0]))
    head.seen.clear()
    with torch.no_grad():
        model(more, past_key_values=cache)
    for row in range(2):
        alone = whole(backbone, torch.cat([prompt, more[row : row + 1]], 1), head.config.context)
        torch.testing.assert_close(head.seen[0][row], alone[-3:], **CLOSE)
    cache.reset()
    head.seen.clear()
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    torch.testing.assert_close(head.seen[0][0], whole(backbone, prompt, head.config.context), **CLOSE)


def test_other_ways_to_call_the_model(wrapped):
    """No cache, tuples, embeddings instead of ids, only the last logits, inner states: the head sees the same."""
    backbone, head = wrapped("llama")
    ids = encode(backbone, TEXTS[1])
    alone = whole(backbone, ids, head.config.context)
    expected = head(alone)
    with torch.no_grad():
        embeddings = backbone.model.get_input_embeddings()(ids)
        results = [
            backbone.model(ids, use_cache=False).logits[0],
            backbone.model(ids, return_dict=False)[0][0],
            backbone.model(inputs_embeds=embeddings).logits[0],
            backbone.model(input_ids=ids, output_hidden_states=True).logits[0],
        ]
        last = backbone.model(ids, logits_to_keep=1).logits[0]
    for result in results:
        torch.testing.assert_close(result, expected, **CLOSE)
    torch.testing.assert_close(last, expected[-1:], **CLOSE)


def test_backbone_forward_is_the_same_while_a_head_is_installed(backbones, wrapped):
    plain = backbones("gpt2").forward(torch.tensor([[5, 6, 7]]))
    backbone, _ = wrapped("gpt2")
    assert torch.equal(backbone.forward(torch.tensor([[5, 6, 7]])), plain)
    other = ContextConfig(layers=[2], horizons=[4])
    wide = backbone.forward(torch.tensor([[5, 6, 7]]), context=ContextState(other))
    assert wide.shape[-1] == 2 * backbone.hidden_size


def test_another_head_replaces_the_hooks(backbones, wrapped):
    before = hooks(backbones("llama"))
    backbone, _ = wrapped("llama")
    number = hooks(backbone)
    wrapped("llama")
    assert hooks(backbone) == number > before
    backbone.install(backbone.reference)
    assert hooks(backbone) == before


def test_a_real_head_needs_the_wrapped_model(backbones):
    backbone, context = backbones("llama"), context_of("llama")
    head = TeaHead.for_backbone(backbone, HeadConfig(shortlist_size=24, context=context))
    ids = encode(backbone, TEXTS[1])
    with torch.no_grad():
        plain = backbone.model(ids).logits
        backbone.install(head)
        try:
            torch.testing.assert_close(backbone.model(ids).logits, plain, **CLOSE)
        finally:
            backbone.uninstall()
    with pytest.raises(TeaError, match="wrapped model"):
        head(backbone.forward(ids))


def test_caches_that_do_not_fit_are_refused(backbones, wrapped):
    backbone = backbones("llama")
    ids = encode(backbone, TEXTS[1])
    foreign = backbone.model(ids, use_cache=True).past_key_values
    wrapped("llama")
    with pytest.raises(TeaError, match=f"holds {ids.shape[1]} positions that .* not read") as caught:
        backbone.model(ids[:, :1], past_key_values=foreign)
    assert "\n" not in str(caught.value)
    own = backbone.model(ids, use_cache=True).past_key_values
    with pytest.raises(TeaError, match="cannot forget"):
        own.crop(-1)
    own.crop(0)
    with pytest.raises(TeaError, match="static cache"):
        backbone.model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(TeaError, match="assisted generation"):
        backbone.model.generate(ids.repeat(1, 2), max_new_tokens=8, prompt_lookup_num_tokens=2)
    # An error leaves nothing half open behind.
    backbone.model(ids)


# ---- the real model -------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.skipif(packaged_gguf() is None, reason="the packaged model is not installed: " + INSTALL_COMMAND)
def test_real_model_reads_the_same_means_everywhere():
    from tea_rl.backbone import load_backbone

    backbone = load_backbone(DEFAULT_MODEL, dtype="float32", device="cpu")
    context = ContextConfig(layers=[15, -1], horizons=["all", 20])
    head = ReadsMeans(backbone, context, gain=0.02)
    texts = ["The movie was", "Once upon a time there was a little girl who", "In"]
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True)
    backbone.install(head)
    options = {"max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}
    out = backbone.model.generate(
        **batch, num_beams=3, num_return_sequences=3, length_penalty=0.0, output_scores=True, **options
    )
    backbone.uninstall()
    mask = batch["attention_mask"].repeat_interleave(3, dim=0)
    expected = completions_and_scores(backbone, head, out.sequences, batch["input_ids"].shape[1], mask)
    torch.testing.assert_close(out.sequences_scores, expected, rtol=1e-4, atol=1e-3)
    ids = encode(backbone, texts[1])
    with torch.no_grad():
        torch.testing.assert_close(
            whole(backbone, ids, context), as_defined(backbone, ids, context), rtol=1e-4, atol=1e-4
        )
