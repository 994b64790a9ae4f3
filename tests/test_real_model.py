"""The invariants on the real 135M model, and the quickstart itself, shortened. Marked ``model``."""

import json

import pytest
import torch

from tea_rl import DecodeSettings, HeadConfig, TeaHead, generate, load_backbone
from tea_rl.backbone import Backbone
from tea_rl.cli import main
from tea_rl.devices import resolve_dtype
from tea_rl.packaged import INSTALL_COMMAND, packaged_gguf
from tea_rl.rollout import sequences
from tea_rl.rollout.tape import tape_of

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        packaged_gguf() is None, reason="the packaged model is not installed: " + INSTALL_COMMAND
    ),
]
PROMPTS = ["The movie was", "The restaurant turned out to be", "My new phone", "In the end, the weather"]


@pytest.fixture(scope="module", params=["auto", "float32"])
def backbone(request) -> Backbone:
    if request.param == "float32" and resolve_dtype("auto", torch.device("cpu")) == torch.float32:
        pytest.skip("float32 is what auto takes here")
    return load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct", request.param, device="cpu")


def transformers_greedy(backbone, texts, new_tokens):
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True)
    out = backbone.model.generate(**batch, do_sample=False, max_new_tokens=new_tokens)
    return backbone.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def encode(backbone):
    return [backbone.tokenizer(text).input_ids for text in PROMPTS]


def test_fresh_head_changes_nothing(backbone):
    """Invariants 1 and 5: logits, KL and greedy text of the base model."""
    head = TeaHead.for_backbone(backbone)
    states = backbone.forward(torch.tensor([encode(backbone)[1]]))
    # The plain product, whatever the model's own output layer has become.
    expected = torch.nn.functional.linear(states, backbone.reference.weight).float()
    assert torch.equal(backbone.reference(states).float(), expected)
    assert torch.equal(head(states), expected)
    plain = transformers_greedy(backbone, PROMPTS, 16)
    backbone.install(head)
    assert transformers_greedy(backbone, PROMPTS, 16) == plain
    backbone.uninstall()
    ours = generate(backbone, head, encode(backbone), DecodeSettings(max_new_tokens=16, greedy=True))
    assert ours.texts == plain
    assert ours.tokens.kl.abs().max() == 0


def test_trained_head_decodes_like_transformers_and_replays(backbone):
    """Invariants 4, 5 and 6 with a head that changes the text."""
    head = TeaHead.for_backbone(backbone, HeadConfig(dropout=0.1))
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=3e-3)
    head.eval()
    plain = transformers_greedy(backbone, PROMPTS, 16)
    backbone.install(head)
    changed = transformers_greedy(backbone, PROMPTS, 16)
    backbone.uninstall()
    assert changed != plain
    greedy = DecodeSettings(max_new_tokens=16, greedy=True)
    assert generate(backbone, head, encode(backbone), greedy).texts == changed

    tokens = generate(backbone, head, encode(backbone), DecodeSettings(4, 16)).tokens
    terms = head.shortlist_terms(tokens.states, tokens.shortlist, tokens.slots, tokens.within_tail_logps)
    # Where products are bfloat16, a sum in another order is rounded to another number now and then.
    tolerance = 1e-4 if head.members.product_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(terms.logps, tokens.logps, atol=tolerance, rtol=tolerance)
    assert (tokens.slots == head.shortlist_size).any()  # the tail is sampled, too

    head.strength = 0.0
    assert generate(backbone, head, encode(backbone), greedy).texts == plain


def test_played_layers_say_what_their_modules_say(backbone, monkeypatch):
    head = TeaHead.for_backbone(backbone)
    settings = DecodeSettings(num_generations=4, max_new_tokens=16)
    played = generate(backbone, head, encode(backbone), settings).tokens
    assert tape_of(backbone) is not None
    monkeypatch.setattr(sequences, "tape_of", lambda _: None)
    by_modules = generate(backbone, head, encode(backbone), settings).tokens
    assert torch.equal(played.actions, by_modules.actions) and torch.equal(played.states, by_modules.states)


def test_compiled_pieces_say_what_the_modules_say(backbone):
    dtype = "float32" if backbone.dtype == torch.float32 else "bfloat16"
    compiled = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct", dtype, device="cpu", compile=True)
    settings, rollouts = DecodeSettings(4, 16), []
    for each in (backbone, compiled):
        head = TeaHead.for_backbone(each)
        torch.manual_seed(0)
        torch.nn.init.normal_(head.members.readout, std=3e-3)
        rollouts.append(generate(each, head.eval(), encode(each), settings).tokens)
        assert tape_of(each) is not None
    plain, fused = rollouts
    # Later ones are of other texts as soon as rounding has moved a choice.
    second = [tokens.states[tokens.positions == 1][:4].float() for tokens in rollouts]
    assert torch.equal(plain.actions[plain.positions == 0], fused.actions[fused.positions == 0])
    assert (second[0] - second[1]).norm() < (1e-3 if dtype == "float32" else 0.05) * second[0].norm()
    # What was recorded is what is learnt from.
    terms = head.terms(fused)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    torch.testing.assert_close(terms.logps, fused.logps, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_backbone_generates(quantization):
    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct", quantization=quantization)
    result = generate(backbone, TeaHead.for_backbone(backbone), encode(backbone), DecodeSettings(2, 6))
    assert len(result.texts) == 8 and bool((result.lengths > 0).all())


def test_quickstart_shortened(tmp_path, capsys):
    """The README's recipe through the command line: it learns within a few steps and leaves a usable head."""
    sets = ["train.max_steps=4", "train.eval_steps=4", "train.eval_generations=2"]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "train",
                "quickstart",
                "--output",
                str(tmp_path / "run"),
                *(x for s in sets for x in ("--set", s)),
            ]
        )
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "base model" in printed and "curves.png" in printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_reward" in row]
    assert evaluations[-1]["eval_reward"] > evaluations[0]["eval_reward"] + 0.05
    assert evaluations[0]["eval_kl"] == 0 < evaluations[-1]["eval_kl"] < 1
    with pytest.raises(SystemExit) as done:
        main(["generate", "--head", str(tmp_path / "run" / "head"), "--prompt", "The soup was", "--compare"])
    assert done.value.code == 0 and "trained" in capsys.readouterr().out
