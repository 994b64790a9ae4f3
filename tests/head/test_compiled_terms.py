"""Terms and their gradients as compiled code: what autograd says, up to rounding."""

import gc
import weakref

import pytest
import torch
from naive_policy import VOCAB, make_head
from spared_compiler import spare_compiler

from tea_rl.errors import TeaError
from tea_rl.head import compiled_terms as module
from tea_rl.head import logits
from tea_rl.head.config import ContextConfig
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.learner import Learner

SIZE = 20


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_known", {})


@pytest.fixture
def made(monkeypatch):
    return spare_compiler(monkeypatch)


def batch_for(head, count, seed=0, temperature=1.0, dtype=torch.float32, distinct=True):
    """Tokens as a rollout would leave them, of random states."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, head.state_width, generator=generator).to(dtype)
    with torch.no_grad():
        shortlist, _ = head.shortlist_of(states.float(), temperature)
    slots = torch.randint(SIZE + 1, (count,), generator=generator)
    numbers = torch.randn(3, count, generator=generator)
    within = torch.where(slots == SIZE, -numbers[0].abs(), 0.0)
    ids = torch.arange(count) if distinct else torch.arange(count) // 3
    logps = -numbers[1].abs()
    return TokenBatch(
        states, shortlist, slots, slots, within, logps, logps, logps, logps, ids, torch.zeros_like(ids), ids
    )


def terms_and_gradients(head, batch, compiles, **options):
    head.compiles_terms = compiles
    terms = head.terms(batch, **options)
    parts = [part for part in terms if part is not None]
    weights = torch.linspace(-1, 1, len(batch))
    (sum((part * weights).sum() * (n + 1) for n, part in enumerate(parts))).backward()
    gradients = [parameter.grad for parameter in head.trainable_parameters()]
    for parameter in head.trainable_parameters():
        parameter.grad = None
    return [part.detach() for part in parts], gradients


def agree(head, batch, rtol=1e-4, **options):
    found, expected = (terms_and_gradients(head, batch, compiles, **options) for compiles in (True, False))
    assert len(module._known) and None not in module._known.values()
    for mine, right in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert (mine is None) == (right is None)
        if right is not None:
            assert mine.dtype == right.dtype and mine.shape == right.shape
            assert (mine - right).norm() <= rtol * right.norm() + 1e-6


KINDS = [
    {},
    {"hidden_sizes": [24]},
    {"num_members": 1, "aggregation": "mean"},
    {"member_kind": "memory"},
    {"gate": True},
    {"random_widths": True, "feature_fraction": 0.5},
    {"context": ContextConfig(layers=[-1], horizons=["all", 4])},
    {"return_conditioning": True},
    {"logit_scale": 0.25, "bias": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_terms_are_those_of_autograd(kind, made):
    head = make_head(shortlist_size=SIZE, **kind)
    for count in (9, 300, 1021):
        agree(head, batch_for(head, count, seed=count))
    assert len(made) == 2


@pytest.mark.parametrize("anchor", ["reverse_kl", "forward_kl", "logit_l1"])
def test_anchors_temperatures_and_values_of_tokens(anchor, made):
    head = make_head(shortlist_size=SIZE)
    head.strength = 0.7
    batch = batch_for(head, 50, temperature=0.8)
    agree(head, batch, temperature=0.8, anchor=anchor)
    agree(head, batch, temperature=0.8, anchor=anchor, token_values=torch.randn(VOCAB))
    assert len(module._known) == 2


def test_desired_returns(made):
    head = make_head(shortlist_size=SIZE, return_conditioning=True)
    head.fit_returns(torch.randn(20))
    batch = batch_for(head, 50)
    returns = torch.where(torch.arange(50) % 5 == 0, torch.nan, torch.randn(50))
    agree(head, batch, returns=returns)
    agree(head, batch, returns=torch.tensor(0.3), token_values=torch.randn(VOCAB))
    assert len(module._known) == 2
    # What a head has seen of returns is given to the code, not part of it.
    head.fit_returns(torch.randn(20) * 3)
    agree(head, batch, returns=returns)
    assert len(module._known) == 2


def test_states_in_half_precision_and_parts_of_larger_tensors(made):
    head = make_head(shortlist_size=SIZE)
    head.members.product_dtype = torch.bfloat16
    batch = batch_for(head, 100, dtype=torch.bfloat16)
    agree(head, batch, rtol=0.05)
    wide = torch.randn(100, 2 * SIZE)
    wide[:, ::2] = batch.shortlist.logits
    batch.shortlist = batch.shortlist._replace(logits=wide[:, ::2])
    agree(head, batch, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_says_the_same(dtype):
    head = make_head(shortlist_size=SIZE)
    head.members.product_dtype = dtype
    for count in (9, 300):
        agree(head, batch_for(head, count), rtol=1e-4 if dtype == torch.float32 else 0.05)


def test_compiled_code_of_everything_at_once():
    head = make_head(
        shortlist_size=SIZE, member_kind="memory", gate=True, random_widths=True, return_conditioning=True,
        context=ContextConfig(layers=[-1], horizons=["all"]), bias=True, logit_scale=0.5,
    )  # fmt: skip
    head.fit_returns(torch.randn(20))
    batch = batch_for(head, 60, temperature=0.9)
    returns = torch.where(torch.arange(60) % 5 == 0, torch.nan, torch.randn(60))
    options = {"temperature": 0.9, "anchor": "forward_kl", "token_values": torch.randn(VOCAB)}
    agree(head, batch, returns=returns, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_numbers_of_other_formats(dtype):
    """With float64 somewhere the terms are not float32, and not compiled."""
    head = make_head(shortlist_size=SIZE)
    batch = batch_for(head, 30)
    batch.within_tail_logps = batch.within_tail_logps.to(dtype)
    found, expected = (terms_and_gradients(head, batch, compiles) for compiles in (True, False))
    assert (None in module._known.values()) == (dtype == torch.float64)
    for mine, right in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_written_down_is_told(made, monkeypatch, caplog):
    monkeypatch.setattr(module, "differentiable", lambda *given: None)
    head = make_head(shortlist_size=SIZE)
    head.compiles_terms = True
    batch = batch_for(head, 30)
    for _ in range(2):
        assert head.terms(batch).logps.requires_grad
    assert caplog.text.count("train.compile compiles at most") == 1


def test_wrong_rows_are_refused_as_ever(made):
    head = make_head(shortlist_size=SIZE)
    head.compiles_terms = True
    batch = batch_for(head, 30)
    batch.slots = batch.slots[:-1]
    with pytest.raises(RuntimeError):
        head.terms(batch)


def test_the_head_that_is_written_down_is_a_copy(made, monkeypatch):
    """Somebody else may use the head meanwhile."""
    head = make_head(shortlist_size=SIZE)
    batch = batch_for(head, 30)
    weights = [parameter.data_ptr() for parameter in head.parameters()]
    looked = []
    original = module.differentiable

    def look(function, *given):
        def looking(*tensors):
            looked.append((head.writes_products, [parameter.data_ptr() for parameter in head.parameters()]))
            return function(*tensors)

        return original(looking, *given)

    monkeypatch.setattr(module, "differentiable", look)
    head.compiles_terms = True
    head.terms(batch)
    assert looked and all(found == (False, weights) for found in looked)


def test_nothing_of_a_head_is_kept(made):
    head = make_head(shortlist_size=SIZE)
    head.compiles_terms = True
    head.terms(batch_for(head, 30))
    gone = weakref.ref(head), weakref.ref(head.weight)
    del head
    gc.collect()
    assert module._known and [found() for found in gone] == [None, None]


def test_heads_of_one_configuration_share_their_code(made):
    batch = batch_for(make_head(shortlist_size=SIZE), 30)
    for spread in (0.05, 0.2):
        agree(make_head(shortlist_size=SIZE, spread=spread), batch)
    assert len(module._known) == 1
    agree(make_head(shortlist_size=SIZE, aggregation="mean"), batch)
    assert len(module._known) == 2


def test_what_is_not_compiled(made):
    head = make_head(shortlist_size=SIZE)
    head.compiles_terms = True
    with torch.no_grad():
        head.terms(batch_for(head, 30))
    head.terms(batch_for(head, 7))
    head.terms(batch_for(head, 30, distinct=False))
    with torch.autocast("cpu", torch.bfloat16):
        head.terms(batch_for(head, 30))
    learns = batch_for(head, 30)
    learns.states.requires_grad_()
    head.terms(learns).logps.sum().backward()
    assert learns.states.grad is not None
    assert not made and not module._known
    head.terms(batch_for(head, 30))
    assert made


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"dropout": 0.1}, "head.dropout"),
        ({"member_dropout": 0.1}, "head.member_dropout"),
        ({"readout": "vocab"}, "head.readout vocab"),
        ({"train_reference": True}, "head.train_reference"),
        ({"shortlist_size": "all"}, 'head.shortlist_size is "all"'),
    ],
)
def test_heads_that_are_not_compiled_say_why(kind, reason, made):
    head = make_head(**{"shortlist_size": SIZE, **kind})
    assert reason in module.why_not_compiled(head)
    listed = make_head(shortlist_size=SIZE)
    batch = batch_for(listed, 30)
    head.train().compiles_terms = True
    head.terms(batch)
    assert not made


def test_another_device_is_not_compiled():
    assert "meta" in module.why_not_compiled(make_head(shortlist_size=SIZE).to("meta"))


def test_a_failing_compiler_is_one_line(monkeypatch):
    def fail(*given, **options):
        raise RuntimeError("no compiler\nhere")

    from torch._inductor import compile_fx

    head = make_head(shortlist_size=SIZE)
    batch = batch_for(head, 30)
    monkeypatch.setattr(compile_fx, "compile_fx_inner", fail)
    monkeypatch.setattr(logits, "compiled_product", logits.compiled_product.__wrapped__)
    head.compiles_terms = True
    with pytest.raises(
        TeaError, match=r"train\.compile is true, but .*no compiler.*set train\.compile to false"
    ):
        head.terms(batch)
    # A learner asks before anything was generated.
    with pytest.raises(TeaError, match=r"train\.compile is true, but .*no compiler"):
        Learner(head, ObjectiveConfig(), AnchorConfig(), TrainConfig(compile=True), 1.0, 10)


def test_a_learner_learns_the_same(made):
    heads = []
    for compiles in (False, True):
        head = make_head(shortlist_size=SIZE)
        batch = batch_for(head, 100)
        objective = ObjectiveConfig(name="grpo", inner_epochs=3, minibatch_tokens=40, target_kl=None)
        learner = Learner(
            head, objective, AnchorConfig(), TrainConfig(learning_rate=1e-3, compile=compiles), 1.0, 10
        )
        advantages = torch.randn(100, generator=torch.Generator().manual_seed(1))
        report = learner.update(batch, advantages, torch.Generator().manual_seed(0))
        heads.append((head, report))
    (plain, expected), (compiled, found) = heads
    assert made and found.loss == pytest.approx(expected.loss, rel=1e-4)
    start = make_head(shortlist_size=SIZE)
    for mine, right, before in zip(
        *(each.trainable_parameters() for each in (compiled, plain, start)), strict=True
    ):
        moved = (right - before).norm()
        assert moved > 0 and (mine - right).norm() < 0.01 * moved
