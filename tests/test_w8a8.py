"""8-bit products of a backbone on a CPU: close to the dense ones, row by row, and the same however they are asked for."""

import pytest
import torch
from tiny import save_tiny
from torch import nn

from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.rollout.decode import score_tokens
from tea_rl.w8a8 import STRENGTHS, Int8Group, W8A8Linear, W8A8Output, best_group, quantise_rows

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gpt2", "qwen2")}


def group_of(sizes=(6, 3), width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for size in sizes]


def test_rows_are_rounded_to_their_own_step():
    x = torch.tensor([[1.0, -0.5, 0.004], [1000.0, 3.0, -1000.0], [0.0, 0.0, 0.0], [0.0, 3e-8, 0.0]])
    quantised, steps = quantise_rows(x)
    assert quantised.tolist() == [[127, -64, 1], [127, 0, -127], [0, 0, 0], [0, 30, 0]]
    torch.testing.assert_close(steps.squeeze(1), torch.tensor([1 / 127, 1000 / 127, 1e-9, 1e-9]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_product_is_that_of_the_rounded_numbers(dtype, smoothed):
    weights = group_of()
    smoothing = torch.linspace(0.5, 2, 32) if smoothed else None
    group = Int8Group(weights, smoothing)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = group.product(x, 0, 9)
    assert result.shape == (2, 5, 9) and result.dtype == dtype
    c = 1 if smoothing is None else smoothing
    rows, steps = quantise_rows(x.reshape(10, 32).float() / c)
    columns, widths = quantise_rows(torch.cat(weights) * c)
    exact = (rows.double() * steps) @ (columns.double() * widths).T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        result.double().view(10, 9), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item()
    )


def test_rounded_numbers_have_the_same_product():
    """What stores, full-vocabulary losses and shortlist reads multiply in float is what the integers say."""
    group = Int8Group(group_of(), torch.linspace(0.5, 2, 32))
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1)) * 7
    rounded = group.rounded_input(x)
    assert rounded.shape == x.shape and 0 < (rounded - x).abs().max() < 0.3
    torch.testing.assert_close(group.rounded_input(rounded), rounded)
    torch.testing.assert_close(rounded @ group.rounded_weight().T, group.product(x, 0, 9))
    torch.testing.assert_close(group.product(rounded, 0, 9), group.product(x, 0, 9))
    half = group.rounded_input(rounded.half().float())  # as a store keeps them
    torch.testing.assert_close(half, rounded, rtol=1e-3, atol=1e-3)


def test_members_take_their_columns_and_never_stale_ones():
    weights = group_of()
    group = Int8Group(weights, None)
    first, second = W8A8Linear(group, 0, None), W8A8Linear(group, 1, torch.ones(3))
    x, y = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    alone = [Int8Group([weight], None) for weight in weights]

    def right(given):
        return alone[0].product(given, 0, 6), alone[1].product(given, 0, 3) + 1

    for given in (x, y, x):
        for got, wanted in zip((first(given), second(given)), right(given), strict=True):
            assert torch.equal(got, wanted)
    first(x)  # a forward pass that breaks off before the second member is asked
    assert torch.equal(second(y), right(y)[1])
    first(x)
    x.mul_(2)  # the same object, other numbers
    assert torch.equal(second(x), right(x)[1])
    with torch.inference_mode():
        z = torch.randn(1, 32)
        assert torch.equal(first(z), right(z)[0])
        assert torch.equal(second(z), right(z)[1])


def test_an_input_is_let_go_once_all_have_read_it():
    group = Int8Group(group_of(), None)
    x = torch.randn(4, 32)
    group.outputs(x, 0)
    assert group._shared._known.x is x
    group.outputs(x, 1)
    assert group._shared._known is None


def test_smoothing_is_chosen_where_channels_are_uneven():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 64, generator=generator)
    weight = [torch.randn(32, 64, generator=generator)]
    assert STRENGTHS[0] == 0
    rows[:, 3] *= 100
    weight[0][:, 3] /= 100
    dense = rows @ weight[0].T

    def error(group):
        return ((group.product(rows, 0, 32) - dense).norm() / dense.norm()).item()

    chosen = best_group(weight, rows)
    assert not torch.equal(chosen.inverse_smoothing, torch.ones(64))
    assert error(chosen) < 0.2 * error(Int8Group(weight, None))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_close_and_their_own_rows_business(folders, family, dtype):
    dense = load_backbone(str(folders[family]), "float32", "none", "cpu")
    backbone = load_backbone(str(folders[family]), dtype, "w8a8", "cpu")
    left = [name for name, child in backbone.body.named_modules() if type(child) is nn.Linear]
    assert not left and isinstance(backbone.body.get_submodule("layers.0.mlp.up_proj"), W8A8Linear)
    attention = backbone.body.get_submodule("layers.0.self_attn")
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group
    assert attention.o_proj.group is not attention.q_proj.group
    assert type(backbone.reference) is W8A8Output and backbone.settings["quantization"] == "w8a8"
    assert not any(p.requires_grad for p in backbone.model.parameters())
    states = backbone.forward(IDS)
    difference = (states.float() - dense.forward(IDS)).norm() / states.float().norm()
    assert 0 < difference < 0.05
    # Integer sums do not depend on the rows beside them, so nor does a state (attention alone may round differently).
    other = torch.cat([IDS, IDS.flip(1)])
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(backbone.forward(other)[:1, :-1], states[:, :-1], **tolerance)
    torch.testing.assert_close(backbone.forward(IDS[:, :4]), states[:, :4], **tolerance)


def test_same_weights_after_every_load(folders):
    one, other = (load_backbone(str(folders["llama"]), "float32", "w8a8", "cpu") for _ in range(2))
    assert torch.equal(one.forward(IDS), other.forward(IDS))
    assert one.digest == other.digest == load_backbone(str(folders["llama"]), "float32").digest


def test_head_and_output_layer_say_the_same(folders):
    backbone = load_backbone(str(folders["llama"]), "float32", "w8a8", "cpu")
    head = TeaHead.for_backbone(backbone).eval()
    states = backbone.forward(IDS)
    before = backbone.model(IDS).logits
    backbone.install(head)
    assert torch.equal(backbone.model(IDS).logits, before)
    assert torch.equal(head.reference_logits(states[0]), before[0])
    # The float product of the rounded numbers, which full-vocabulary losses take.
    torch.testing.assert_close(states @ head.weight.T, before, rtol=1e-4, atol=1e-4)
    assert set(head.head_state()) == set(
        TeaHead.for_backbone(load_backbone(str(folders["llama"]), "float32")).head_state()
    )


@pytest.mark.parametrize("size", [16, "all"])
def test_losses_see_what_was_sampled(folders, size):
    backbone = load_backbone(str(folders["llama"]), "float32", "w8a8", "cpu")
    head = TeaHead.for_backbone(backbone, HeadConfig(shortlist_size=size)).eval()
    torch.nn.init.normal_(head.members.readout, std=0.05)
    tokens = generate(backbone, head, [[5, 6, 7], [8, 9]], DecodeSettings(3, 8)).tokens
    terms = head.terms(tokens)
    torch.testing.assert_close(terms.logps, tokens.logps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.kl, tokens.kl, rtol=1e-3, atol=1e-4)


def test_rollouts_keep_what_they_sampled(folders):
    """Kept log-probabilities are those of the kept states, and `generate` with the head installed walks the same way."""
    backbone = load_backbone(str(folders["llama"]), "float32", "w8a8", "cpu")
    head = TeaHead.for_backbone(backbone)
    torch.nn.init.normal_(head.members.readout, std=0.05)
    rollout = generate(
        backbone, head, [[5, 6, 7], [8, 9]], DecodeSettings(num_generations=2, max_new_tokens=6, greedy=True)
    )
    tokens = rollout.tokens
    again = score_tokens(head.eval(), tokens.states, torch.arange(len(tokens.states)), tokens.actions, 1.0)
    torch.testing.assert_close(again.logps, tokens.logps, rtol=1e-4, atol=1e-4)
    backbone.install(head)
    whole = backbone.model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=6)
    assert whole[0, 3:].tolist()[: int(rollout.lengths[0])] == tokens.actions[tokens.rows == 0].tolist()


def test_what_does_not_fit_is_one_line(folders):
    with pytest.raises(TeaError, match="w8a8 replaces nn.Linear layers, but GPT2Model has none: use none"):
        load_backbone(str(folders["gpt2"]), "float32", "w8a8", "cpu")
    with pytest.raises(TeaError, match='Did you mean "w8a8"'):
        load_backbone(str(folders["llama"]), quantization="w8a")
    from tea_rl.quantization import check_quantization

    with pytest.raises(TeaError, match="w8a8 is for device cpu, got cuda: use int8 or nf4"):
        check_quantization("w8a8", torch.device("cuda"))
