"""``model.compile`` on a CPU: small operations of played layers as compiled pieces, which say what the modules say up to rounding."""

import logging
from functools import cache
from threading import Thread

import pytest
import torch
from spared_compiler import spare_compiler
from test_tape import LONG, PLAYED, PROMPTS, write
from tiny import SUPPORTED, save_tiny, tiny_backbone

from tea_rl import attention
from tea_rl import generated as module
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head import logits
from tea_rl.head.config import ContextConfig, HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, fusion, generate
from tea_rl.rollout.tape import tape_of


@pytest.fixture
def made(monkeypatch):
    """Graphs of pieces; the compiler is spared, they run as they are."""
    graphs = spare_compiler(monkeypatch)
    monkeypatch.setattr(fusion, "_pieces", {})
    monkeypatch.setattr(attention, "_compiled_attention", cache(attention._compiled_attention.__wrapped__))
    monkeypatch.setattr(logits, "compiled_product", cache(logits.compiled_product.__wrapped__))
    return graphs


def compiled(folder, family="llama", dtype="float32", **loading):
    return load_backbone(str(save_tiny(family, folder)), dtype, device="cpu", compile=True, **loading)


def agree(found, expected):
    assert torch.equal(found.actions, expected.actions)
    torch.testing.assert_close(found.states, expected.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("texts", [PROMPTS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_pieces_say_what_the_modules_say(family, texts, tmp_path, made, caplog):
    expected = write(tiny_backbone(tmp_path / "plain", family), texts)
    backbone = compiled(tmp_path, family)
    agree(write(backbone, texts), expected)
    assert (backbone.tape.refused is None) == (family in PLAYED)
    if family in PLAYED:
        assert made
    else:
        assert "model.compile changes nothing" in caplog.text


def test_layers_share_their_pieces(tmp_path, made):
    folder = save_tiny("llama", tmp_path, num_hidden_layers=5)
    for _ in range(2):
        write(load_backbone(str(folder), "float32", device="cpu", compile=True))
    # Norm, rotations, attention, norm after it (gate and up are two products here, with one operation after each); the head's product
    # with shortlists.
    assert len(made) == 5


def test_products_are_not_in_pieces(tmp_path, made):
    write(compiled(tmp_path))
    targets = {str(node.target) for graph in made for node in graph.graph.nodes if node.op == "call_function"}
    assert any("rsqrt" in target for target in targets)
    assert not any(
        product in target for target in targets for product in ("mm", "matmul", "linear", "attention")
    )


@pytest.mark.parametrize("loading", [{"dtype": "bfloat16"}, {"dtype": "float32", "quantization": "w8a8"}])
def test_layers_laid_out_for_inference_have_pieces(tmp_path, made, loading):
    plain = load_backbone(str(save_tiny("llama", tmp_path)), device="cpu", **loading)
    backbone = compiled(tmp_path, **loading)
    assert tape_of(backbone) is not None and len(made) >= 4
    tokens, expected = write(backbone), write(plain)
    # Rounding moves the choice of a token now and then, and then the text.
    assert (tokens.states[:3].float() - expected.states[:3].float()).norm() < 0.05 * expected.states[
        :3
    ].float().norm()


def test_a_piece_that_says_something_else_is_not_played(tmp_path, made, monkeypatch, caplog):
    plain = write(tiny_backbone(tmp_path / "plain", "llama"))
    generated = module.compiled

    def wrong(graph):
        piece = generated(graph)
        right, piece.current_callable = (
            piece.current_callable,
            lambda given: [1.01 * part for part in right(given)],
        )
        return piece

    monkeypatch.setattr(module, "compiled", wrong)
    with caplog.at_level(logging.WARNING):
        backbone = compiled(tmp_path)
        assert torch.equal(write(backbone).states, plain.states)
    assert (
        "not what the modules say" in backbone.tape.refused and "model.compile changes nothing" in caplog.text
    )


@pytest.fixture
def broken(monkeypatch):
    """A compiler that fails."""

    def fail(*given, **options):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", fail)
    monkeypatch.setattr(fusion, "_pieces", {})
    monkeypatch.setattr(logits, "compiled_product", logits.compiled_product.__wrapped__)


def test_a_failing_compiler_is_one_line(tmp_path, broken):
    backbone = compiled(tmp_path)
    with pytest.raises(
        TeaError,
        match=r"model\.compile is true, but torch\.compile fails .*\(.*no compiler.*set model\.compile",
    ):
        write(backbone)
    assert not any("forward" in vars(layer) for layer in backbone.model.model.layers)


def test_a_head_without_a_compiler_is_one_line(tmp_path, broken):
    head = TeaHead.for_backbone(compiled(tmp_path))
    with pytest.raises(TeaError, match=r"torch\.compile fails on .*llama .*\(.*no compiler"):
        head.use_compiler()
    states, ids = torch.randn(3, head.hidden_size), torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(TeaError, match=r"torch\.compile fails on .*llama .*\(.*no compiler"):
        head.shortlist_correction(states, ids)


def test_context_features_are_read_between_layers_with_pieces(tmp_path, made):
    plain, backbone = tiny_backbone(tmp_path / "plain", "llama"), compiled(tmp_path)
    written = []
    for each in (plain, backbone):
        config = HeadConfig(
            hidden_sizes=[8], shortlist_size=16, context=ContextConfig(layers=[1, -1], horizons=["all", 6])
        )
        head = TeaHead.for_backbone(each, config)
        prompts = [each.tokenizer(text).input_ids for text in PROMPTS]
        written.append(
            generate(each, head, prompts, DecodeSettings(num_generations=3, max_new_tokens=8)).tokens
        )
    agree(*written)
    assert made and tape_of(backbone) is not None


def changes_in_place(x):
    return x.add(1).mul_(2).sub_(x)


def changes_what_it_is_given(x):
    return x.clone().view(-1).add_(1).view(x.shape) + x


def changes_behind_a_view(x):
    whole = x * 2
    part = whole[..., :5]
    whole.add_(1)
    return torch.cat([part, x[..., 5:]], dim=-1)


def chooses(x):
    return (x.abs() + 1)[torch.nonzero(x[:, 0, 0] > -9).squeeze(1)]


def splits(x):
    one, other = (x + 1).chunk(2, dim=-1)
    return torch.cat([other * 2, one], dim=-1).flip(-1)


def several_results(x):
    return x + 2 * x.exp().max(dim=-1, keepdim=True).values


@pytest.mark.parametrize(
    "does",
    [
        changes_in_place,
        changes_what_it_is_given,
        changes_behind_a_view,
        chooses,
        splits,
        several_results,
    ],
)
def test_what_a_layer_may_do_between_products(tmp_path, made, monkeypatch, does):
    backbone = compiled(tmp_path)
    mlp = type(backbone.model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, does(x)))
    expected = write(tiny_backbone(tmp_path / "plain", "llama"))
    agree(write(backbone), expected)
    assert tape_of(backbone) is not None


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_compiled_code_says_what_the_modules_say(family, tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "_pieces", {})
    expected = write(tiny_backbone(tmp_path / "plain", family))
    backbone = compiled(tmp_path, family)
    tokens = write(backbone)
    assert torch.equal(tokens.actions, expected.actions)
    torch.testing.assert_close(tokens.states, expected.states, rtol=1e-5, atol=1e-5)
    assert tape_of(backbone) is not None and fusion._pieces


def test_layers_with_other_constants_or_formats_have_pieces_of_their_own(tmp_path, made):
    for number, eps in enumerate([1e-6, 1e-2]):
        backbone = load_backbone(
            str(save_tiny("llama", tmp_path / str(number), rms_norm_eps=eps)), "float32", compile=True
        )
        write(backbone)
    few = len(made)
    assert tape_of(backbone) is not None
    assert sum("0.01" in graph.code for graph in made) == sum("1e-06" in graph.code for graph in made) == 2
    write(load_backbone(str(tmp_path / "1" / "llama"), "bfloat16", compile=True))
    assert len(made) > few


def test_examples_keep_the_rows_apart():
    """Sizes that are equal in an example are taken for one."""
    given = [(torch.empty(7, 61), torch.empty(11, 61)), (torch.empty(61), torch.empty(61))]
    (rows, same), free = fusion._examples(given, (7, 11))
    assert rows.shape == (67, 61) and same.shape == (61,) and rows.stride() == (61, 1)
    assert free == {67}
    (columns, three), free = fusion._examples(
        [(torch.empty(5, 7), torch.empty(5, 11)), (torch.empty(21), torch.empty(33))], (7, 11)
    )
    assert columns.shape == (5, 61) and columns.stride() == (61, 1) and three.shape == (183,)
    assert free == {61, 183}


@pytest.mark.parametrize("sizes", [(5, 6), (8, 12), (14, 11)])
def test_what_depends_on_more_than_the_rows_is_no_piece(sizes):
    one, other = (torch.empty(rows, size) for rows, size in zip((7, 11), sizes, strict=True))
    assert fusion._examples([(one, other)], (7, 11)) is None


def test_a_function_that_changes_what_it_is_given_is_not_generated():
    assert module.generate(lambda x: (x.add_(1).exp(),), [torch.empty(61, 67)]) is None
    assert module.generate(lambda x: (x * x.sum().item(),), [torch.empty(61, 67)]) is None
    assert module.generate(lambda x: (x[x[:, 0].nonzero().squeeze(1)] + 1,), [torch.empty(61, 67)]) is None


def test_threads_generate_one_after_the_other():
    numbers, found = [1.0, 2.0, 3.0], {}

    def work(number):
        piece = module.generate(lambda x: (x.exp() * number + 0.125,), [torch.empty(61, 67)])
        found[number] = piece([torch.zeros(3, 5)])[0]

    threads = [Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: result.unique().tolist() for number, result in found.items()} == {
        n: [n + 0.125] for n in numbers
    }


def test_an_old_torch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch._inductor.compile_fx, "compile_fx_inner", lambda graph, given, **options: object()
    )
    monkeypatch.setattr(logits, "compiled_product", logits.compiled_product.__wrapped__)
    head = TeaHead.for_backbone(compiled(tmp_path))
    with pytest.raises(TeaError, match=r"torch\.compile fails on .*\(.*torch .* is too old"):
        head.use_compiler()
