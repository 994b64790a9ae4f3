"""One way of measuring for every kind of model, held against naive computations on tiny ones."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from tiny import EOS, head_base, save_tiny, tiny_backbone, tiny_tokenizer

from tea_rl import HeadConfig, TeaHead
from tea_rl.compare import forgetting
from tea_rl.compare.forgetting import english_passages, measure_forgetting, perplexity, split_passage
from tea_rl.compare.measure import (
    MeasureSettings,
    adapter_base,
    evaluate_reward,
    measure,
    measure_frontier,
    measure_settings,
    separate_base,
    token_texts,
)
from tea_rl.compare.results import FrontierPoint
from tea_rl.compare.sampling import Completions, _Draw, answer_logits, sample, score_completions
from tea_rl.data.prompts import Prompt
from tea_rl.evaluation.evaluate import PromptSet
from tea_rl.recipe import RewardSpec, parse_recipe
from tea_rl.rewards import load_rewards

TEXTS = ["The sun", "A dog ran", "My new telephone is", "Now"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts(backbone):
    return PromptSet([Prompt(text, text) for text in TEXTS], [backbone.tokenizer(t).input_ids for t in TEXTS])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Paid for vowels, so that random bytes differ in reward."""
    file = tmp_path_factory.mktemp("rewards") / "vowels.py"
    file.write_text(
        "def vowels(prompts, completions):\n"
        "    return [sum(c in 'aeiouAEIOU' for c in text) / 10 for text in completions]\n"
    )
    return load_rewards([RewardSpec(name=f"{file}:vowels"), RewardSpec(name="repetition", weight=0.0)])


def settings(**changes):
    given = {
        "num_generations": 2,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "ending_token_ids": (1,),
        "pad_token_id": 0,
        "forgetting": False,
    }
    return MeasureSettings(**{**given, **changes})


def trained_head(backbone, spread=0.3):
    head = TeaHead.for_backbone(
        backbone, HeadConfig(num_members=3, hidden_sizes=[8], shortlist_size=32), seed=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(head.members.readout, std=spread)
    return head.eval()


def peft_model(folder, kind):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny("llama", folder))
    common = {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **common),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            **common,
        ),
        "prompt-tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **common),
        "prefix-tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **common),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **common),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, configs[kind]()).eval()
        if kind.endswith("tuning"):  # they begin too near to the base to tell anything
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.5)
        return model


def test_the_base_model_against_itself(backbone, prompts, rewards):
    found = measure(
        backbone.model, backbone.tokenizer, separate_base(backbone.model), prompts, rewards, settings()
    )
    metrics = found.metrics
    assert metrics.kl.value == 0 and metrics.kl.kind == "exact" and metrics.kl.monte_carlo == 0
    assert len(metrics.reward_sampled) == len(metrics.reward_greedy) == len(TEXTS)
    assert all(gain == 0 for row in found.samples for gain in row.gains)
    assert [row.prompt for row in found.samples] == TEXTS
    assert metrics.disagreement is None and metrics.forgetting is None
    assert found.generation_tokens_per_second > 0
    # Paid for by a term of the reward, so it is no independent witness.
    assert "self_repetition" not in metrics.independent and "surprise" in metrics.independent
    assert set(metrics.terms) == {"vowels", "repetition"}


def naive(policy, base, prompt, answer, temperature):
    """Row by row: exact KL, gain and surprise of each token."""
    ids = torch.tensor([[*prompt, *answer]])
    logits, other = policy(ids)[0].float(), base(ids)[0].float()
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    kl, gains, surprises = [], [], []
    for place, token in zip(places, answer, strict=True):
        p, q = ((row[place] / temperature).softmax(0) for row in (logits, other))
        kl.append(sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True)))
        gains.append(math.log(p[token] / q[token]))
        surprises.append(-math.log(other[place].softmax(0)[token]))
    return kl, gains, surprises


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_of_a_head_are_those_of_its_own_policy(backbone, prompts, temperature):
    head = trained_head(backbone)
    backbone.install(head)
    try:
        drawn = sample(
            backbone.model, prompts.token_ids, num_generations=2, max_new_tokens=9, temperature=temperature,
            ending_token_ids=(1,), pad_token_id=0, seed=3,
        )  # fmt: skip
        scores = score_completions(
            backbone.model, head_base(backbone, head), prompts.token_ids, drawn, temperature, head
        )
        assert backbone.installed  # the base was looked at and left
    finally:
        backbone.uninstall()

    def policy(ids):
        return head(backbone.forward(input_ids=ids))

    def base(ids):
        return backbone.reference(backbone.forward(input_ids=ids))

    for row, (index, answer) in enumerate(zip(drawn.prompt_index, drawn.token_ids, strict=True)):
        with torch.no_grad():
            expected = naive(policy, base, prompts.token_ids[index], answer, temperature)
        for got, wanted in zip((scores.kl, scores.gains, scores.surprises), expected, strict=True):
            assert got[row].tolist() == pytest.approx(wanted, abs=2e-4)
    assert scores.states.shape == (sum(map(len, drawn.token_ids)), backbone.hidden_size)
    assert torch.cat(scores.kl).mean() > 0.05


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt-tuning", "prefix-tuning", "p-tuning"])
def test_peft_models_are_measured_like_ours(tmp_path, prompts, rewards, kind):
    """The base reached through the adapter is the base itself; the policy's scores are those of one row at a time."""
    from transformers import AutoModelForCausalLM

    model = peft_model(tmp_path, kind)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    found = measure(model, tiny_tokenizer(), adapter_base(model), prompts, rewards, settings())
    assert found.metrics.kl.value > 2e-5 and found.metrics.kl.kind == "exact"
    greedy = sample(
        model, prompts.token_ids, num_generations=1, max_new_tokens=6, temperature=1.0,
        ending_token_ids=(1,), pad_token_id=0, seed=0, greedy=True,
    )  # fmt: skip
    for before, tokens in zip(prompts.token_ids, greedy.token_ids, strict=True):
        with torch.no_grad():
            assert answer_logits(model, [(before, tokens)])[0].argmax(-1).tolist() == tokens

    drawn = Completions([[40, 41, 42], [50, 51]], [0, 2], 1.0)
    scores = score_completions(model, adapter_base(model), prompts.token_ids, drawn, 1.0)
    for row, (index, answer) in enumerate(zip(drawn.prompt_index, drawn.token_ids, strict=True)):
        before = prompts.token_ids[index]
        with torch.no_grad():
            expected = naive(
                lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[
                    :, -ids.shape[1] :
                ],
                lambda ids: plain(ids).logits,
                before,
                answer,
                1.0,
            )
        assert scores.kl[row].tolist() == pytest.approx(expected[0], rel=0.02, abs=2e-6)
        assert scores.gains[row].tolist() == pytest.approx(expected[1], rel=0.02, abs=2e-5)
        assert scores.surprises[row].tolist() == pytest.approx(expected[2], abs=2e-5)


def test_monte_carlo_and_exact_kl_agree_on_many_samples(backbone, prompts, rewards):
    head = trained_head(backbone)
    backbone.install(head)
    try:
        many = settings(num_generations=48, max_new_tokens=16)
        kl = measure(
            backbone.model, backbone.tokenizer, head_base(backbone, head), prompts, rewards, many
        ).metrics.kl
    finally:
        backbone.uninstall()
    assert kl.monte_carlo == pytest.approx(kl.value, rel=0.25)


def test_sampling_repeats_and_leaves_the_global_generator_alone(backbone, prompts, rewards):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    arguments = (backbone.model, backbone.tokenizer, prompts, rewards)
    first = evaluate_reward(*arguments, settings(seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert evaluate_reward(*arguments, settings(seed=1)) == first
    assert len({evaluate_reward(*arguments, settings(seed=seed)) for seed in range(6)}) > 3


def test_completions_are_drawn_from_the_distribution(backbone, prompts):
    """Against ``multinomial``'s frequencies in the first state, and at a temperature."""
    with torch.no_grad():
        (row,) = answer_logits(backbone.model, [(prompts.token_ids[0], [5])])[0].float()
    drawn = sample(
        backbone.model, prompts.token_ids[:1], num_generations=4000, max_new_tokens=1, temperature=0.5,
        ending_token_ids=(1,), pad_token_id=0, seed=0,
    )  # fmt: skip
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn.token_ids]), minlength=len(row)) / 4000
    expected = (row / 0.5).softmax(0)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts - expected).abs() < 5 * error + 1e-3).all()
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(200, 1)
    assert set(_Draw(1.0)(torch.zeros(200, 1), never).argmax(-1).tolist()) == {1, 3}


def test_a_head_is_scored_in_one_pass_through_the_backbone(backbone, prompts):
    """Both distributions come from it, and are those of asking the base model apart."""
    head, passes = trained_head(backbone), []
    drawn = Completions([[40, 41, 42], [50, 51]], [0, 2], 1.0)
    backbone.install(head)
    handle = backbone.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        one = score_completions(backbone.model, None, prompts.token_ids, drawn, 0.8, head)
        assert len(passes) == 1
        two = score_completions(backbone.model, head_base(backbone, head), prompts.token_ids, drawn, 0.8)
        assert len(passes) == 3
    finally:
        handle.remove()
        backbone.uninstall()
    for got, wanted in ((one.kl, two.kl), (one.gains, two.gains), (one.surprises, two.surprises)):
        assert torch.allclose(torch.cat(got), torch.cat(wanted), atol=1e-5)
    assert torch.cat(one.kl).mean() > 0.01


def test_a_completion_ends_with_its_first_ending_token(backbone, prompts):
    ends = tuple(range(1, 120))
    drawn = sample(
        backbone.model, prompts.token_ids, num_generations=3, max_new_tokens=20, temperature=1.0,
        ending_token_ids=ends, pad_token_id=0, seed=0,
    )  # fmt: skip
    assert {len(ids) for ids in drawn.token_ids} != {20}
    for ids in drawn.token_ids:
        assert all(token not in ends for token in ids[:-1])
        assert len(ids) == 20 or ids[-1] in ends


def test_greedy_completions_are_those_of_transformers(backbone, prompts):
    drawn = sample(
        backbone.model, prompts.token_ids, num_generations=1, max_new_tokens=8, temperature=0.3,
        ending_token_ids=(1,), pad_token_id=0, seed=0, greedy=True,
    )  # fmt: skip
    for before, answer in zip(prompts.token_ids, drawn.token_ids, strict=True):
        with torch.no_grad():
            logits = answer_logits(backbone.model, [(before, answer)])[0]
        assert logits.argmax(-1).tolist() == answer


def test_the_best_of_several_samples_is_kept(backbone, prompts, rewards):
    base = separate_base(backbone.model)
    one, best = (
        measure(backbone.model, backbone.tokenizer, base, prompts, rewards, settings(best_of=n))
        for n in (1, 8)
    )
    assert sum(best.metrics.reward_sampled) > sum(one.metrics.reward_sampled)
    assert best.metrics.kl.kind == "bound"
    assert best.metrics.kl.value == pytest.approx((math.log(8) - 7 / 8) / best.metrics.length)
    assert len(best.samples) == len(TEXTS) and not best.samples[0].gains


def test_the_frontier_begins_at_the_base_model(backbone, prompts, rewards):
    head = trained_head(backbone)
    head.strength = 0.9
    arguments = (backbone.model, backbone.tokenizer, head_base(backbone, head), prompts, rewards, settings())
    backbone.install(head)
    try:
        known = [FrontierPoint(strength=0.9, reward=7.0, kl=0.01)]
        others = (*arguments[:2], *arguments[3:])
        points = measure_frontier(head, *others, [0.0, 0.5, 0.9, 1.5])
        assert head.strength == 0.9
        found = measure(*arguments, head=head)
        # What is known is taken as it is, and without time nothing else is measured.
        assert measure_frontier(head, *others, [0.0, 0.5, 0.9], known, lambda seconds: False) == known
        assert measure_frontier(head, *others, [0.5, 0.9], known)[1] is known[0]
    finally:
        backbone.uninstall()
    assert [point.strength for point in points] == [0.0, 0.5, 0.9, 1.5]
    assert points[0].kl == 0 < points[1].kl < points[2].kl < points[3].kl
    # The same samples: measuring a head tells its own point.
    assert points[2].reward == pytest.approx(np.mean(found.metrics.reward_sampled))
    assert points[2].kl == found.metrics.kl.value
    plain = evaluate_reward(backbone.model, backbone.tokenizer, prompts, rewards, settings())
    assert points[0].reward == pytest.approx(plain)
    # Independent members disagree by about the root of their number times the size of their mean.
    assert 0.5 < found.metrics.disagreement < 2 * math.sqrt(3)


def test_members_that_agree_do_not_disagree(backbone, prompts, rewards):
    head = trained_head(backbone)
    with torch.no_grad():
        for parameter in (*head.members.parameters(),):
            if parameter.shape[0] == 3:
                parameter.copy_(parameter[:1].expand_as(parameter))
        readout = head.members.readout
        readout.copy_(readout[:, : readout.shape[1] // 3].repeat(1, 3))
    backbone.install(head)
    try:
        found = measure(
            backbone.model,
            backbone.tokenizer,
            head_base(backbone, head),
            prompts,
            rewards,
            settings(),
            head=head,
        )
    finally:
        backbone.uninstall()
    assert found.metrics.disagreement == pytest.approx(0, abs=1e-3)


def test_tokens_spell_the_completion():
    tokenizer = tiny_tokenizer()
    text = "naïve 你好 🙂"
    ids = [*tokenizer(text).input_ids, tokenizer.convert_tokens_to_ids(EOS)]
    tokens = token_texts(tokenizer, ids)
    assert len(tokens) == len(ids) and "".join(tokens) == text
    assert "🙂" in tokens and "\ufffd" not in tokens


def test_forgetting_reads_what_was_not_trained_on(backbone):
    assert len(english_passages()) >= 10 and all(len(text) > 50 for text in english_passages())
    pairs = [split_passage(backbone.tokenizer, text) for text in english_passages()]
    ((before, rest),) = pairs[:1]
    with torch.no_grad():
        logits = backbone.model(torch.tensor([before + rest])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rest)).exp().item()
    assert perplexity(backbone.model, [(before, rest)]) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(perplexity(backbone.model, []))


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
def test_forgetting_of_tasks(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama", tmp_path, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = measure_forgetting(model, tiny_tokenizer(), ["count_primes"])
    assert list(found.tasks) == ["count_primes"]
    assert all(value > 1 for value in (found.english_perplexity, *found.tasks.values()))


def test_forgetting_without_reasoning_gym_says_so(backbone, monkeypatch):
    monkeypatch.setattr(forgetting.importlib.util, "find_spec", lambda name: None)
    heard = []
    found = measure_forgetting(backbone.model, backbone.tokenizer, notify=heard.append)
    assert found.tasks == {} and found.english_perplexity > 1
    assert "reasoning-gym" in heard[0]


def test_settings_follow_the_recipe(backbone):
    recipe = parse_recipe(
        {
            "data": {"prompts": "reasoning_gym/count_primes", "size": 4},
            "rewards": [{"name": "exact_match"}],
            "rollout": {"max_completion_length": 7, "temperature": 0.5, "stop": ["\n"]},
            "train": {"eval_generations": 3, "seed": 9},
        }
    )
    found = measure_settings(recipe, backbone, best_of=4)
    assert (found.num_generations, found.max_new_tokens, found.temperature, found.seed) == (3, 7, 0.5, 9)
    assert found.best_of == 4 and "count_primes" not in found.forgetting_tasks
    newline = backbone.tokenizer("\n").input_ids[-1]
    assert {1, newline} <= set(found.ending_token_ids)
