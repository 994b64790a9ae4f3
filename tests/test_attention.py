"""Grouped attention on a CPU: the numbers of transformers' own, and its own wherever it must be."""

from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny, tiny_model

import tea_rl.attention as attention
from tea_rl.attention import NAME, compiled_newest_token, grouped_attention, newest_attention
from tea_rl.backbone import load_backbone

IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_states_are_those_of_the_plain_model(family, tmp_path):
    backbone = load_backbone(str(save_tiny(family, tmp_path)), "float32", device="cpu")
    assert backbone.model.config._attn_implementation == NAME
    plain = tiny_model(family)
    assert plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        wanted = plain.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    real = MASK.bool()
    torch.testing.assert_close(backbone.forward(IDS, MASK)[real], wanted[real], rtol=1e-4, atol=1e-4)


def test_a_model_that_was_asked_for_otherwise_keeps_it(tmp_path):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    attention.use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_selects_tokens_keeps_its_own(monkeypatch):
    """Its attention may ask for the name ``sdpa`` before it applies the selection."""
    model = tiny_model("llama")
    monkeypatch.setattr(attention, "DynamicCache", lambda config: SimpleNamespace(layers=[object()]))
    attention.use_grouped_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_original_serves_what_the_kernel_does_not(monkeypatch):
    asked = []
    original = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda *args, **kwargs: (asked.append(kwargs), original(*args, **kwargs))[1],
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 3, 8, generator=generator) for _ in range(2))
    mask = torch.ones(3, 3).tril().bool().expand(2, 1, 3, 3)
    wanted, _ = original(module, query, key, value, mask, scaling=0.3)
    assert not asked
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert not asked and found.shape == (2, 3, 4, 8) and found.is_contiguous()
    torch.testing.assert_close(found, wanted)
    # No mask; a gradient; heads that share nothing; a bias.
    torch.testing.assert_close(grouped_attention(module, query, key, value, None, scaling=0.3)[0], wanted)
    grown = query.clone().requires_grad_()
    grouped_attention(module, grown, key, value, mask)[0].sum().backward()
    assert grown.grad is not None
    module.num_key_value_groups = 1
    grouped_attention(module, query[:, :2], key, value, mask)
    grouped_attention(module, query[:, :2], key, value, mask, position_bias=torch.zeros(1, 2, 3, 3))
    assert len(asked) == 4


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
def test_one_new_token_a_row(heads, groups, rows, kind):
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(rows, heads, 1, 8, generator=generator)
    key, value = (torch.randn(rows, groups, 7, 8, generator=generator)[:, :, :5] for _ in range(2))
    seen = torch.rand(rows, 1, 1, 5, generator=generator) < 0.6
    seen[..., -1] = True
    mask = {"none": None, "bool": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -1e4)}[kind]
    keys, values = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    found = newest_attention(query, key, value, mask, 0.3)
    assert found.shape == (rows, 1, heads, 8)
    torch.testing.assert_close(found.transpose(1, 2), wanted)
    default = newest_attention(query, key, value, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    torch.testing.assert_close(default.transpose(1, 2), wanted)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_serves_one_new_token_where_it_is_fast(monkeypatch, fast, masked):
    asked = []
    monkeypatch.setattr(attention, "kernel_is_fast", lambda dtype: dtype == torch.bfloat16 and fast)
    monkeypatch.setattr(
        attention, "newest_attention", lambda *given: (asked.append(given), newest_attention(*given))[1]
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 16, generator=generator)
    key, value = (torch.randn(3, 2, 6, 16, generator=generator) for _ in range(2))
    seen = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    seen[0, :, :, :2] = False
    mask = seen if masked else None
    half = [part.bfloat16() for part in (query, key, value)]
    exact = [half[0].float(), *(part.float().repeat_interleave(2, dim=1) for part in half[1:])]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3)
    found, _ = grouped_attention(module, *half, mask, scaling=0.3)
    assert found.shape == (3, 1, 4, 16) and len(asked) == (not fast)
    torch.testing.assert_close(found.transpose(1, 2).float(), wanted, atol=0.02, rtol=0.02)
    grouped_attention(module, query, key, value, mask, scaling=0.3)  # in float32 never
    assert len(asked) == 1 + (not fast)


def test_scores_of_half_precision_are_not_rounded():
    # Scores of about 30 are 0.1 apart in bfloat16, and so are the logarithms of weights made of rounded ones.
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (scale * torch.randn(16, heads, tokens, 64, generator=generator)).bfloat16()
        for heads, tokens, scale in ((4, 1, 4), (2, 20, 4), (2, 20, 1))
    )
    exact = [part.float().repeat_interleave(4 // part.shape[1], dim=1) for part in (query, key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact)
    found = newest_attention(query, key, value, None)
    assert found.dtype == torch.bfloat16
    rounded = (exact[0] @ exact[1].transpose(2, 3)).bfloat16().float() / 8
    error = (rounded.softmax(-1) @ exact[2] - wanted).abs().mean()
    assert (found.transpose(1, 2).float() - wanted).abs().mean() < error / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_of_the_newest_token(dtype):
    """One code for all rows, heads and lengths; keys and values lie in a cache with room."""
    torch.manual_seed(0)
    for rows, groups, heads, slots, width in [
        (1, 1, 1, 1, 8),
        (1, 3, 9, 30, 64),
        (5, 2, 2, 17, 20),
        (3, 1, 4, 256, 16),
    ]:
        # Cut from the product of queries, keys and values.
        query = torch.randn(rows, 1, heads + 3, width).to(dtype).transpose(1, 2)[:, :heads]
        key, value = (torch.randn(rows, groups, slots + 9, width).to(dtype)[:, :, :slots] for _ in range(2))
        hidden = torch.rand(rows, 1, 1, slots) < 0.3
        hidden[..., -1] = False
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        for given in (mask, None):
            found = compiled_newest_token(query, key, value, given, 0.3)
            expected = newest_attention(
                query.float(), key.float(), value.float(), None if given is None else given.float(), 0.3
            )
            close = {"rtol": 0.01, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, **close)


@pytest.mark.parametrize(
    "case", ["long", "owned", "other strides", "strides unlike", "a mask for every head", "true or false"]
)
def test_what_compiled_attention_leaves_to_others(case, monkeypatch):
    asked, slots = [], 300 if case == "long" else 20
    monkeypatch.setattr(attention, "newest_token", lambda *given: asked.append(given))
    monkeypatch.setattr(attention, "_compiled_attention", lambda *_: lambda given: pytest.fail("asked"))
    query, key, value = torch.randn(2, 4, 1, 8), *torch.randn(2, 2, 2, slots, 8)
    mask = torch.zeros(2, 1, 1, slots)
    if case == "owned":
        setattr(key, attention.OWNER, object())
    elif case == "other strides":
        key, value = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value))
    elif case == "strides unlike":
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
    elif case == "a mask for every head":
        mask = torch.zeros(2, 4, 1, slots)
    elif case == "true or false":
        mask = mask.bool()
    compiled_newest_token(query, key, value, mask, 0.3)
    assert asked == [(query, key, value, mask, 0.3)]
