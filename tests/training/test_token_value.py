"""Values of tokens: they are found, are silent where there is nothing to find, and the policy follows them."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import save_tiny, tiny_backbone

from tea_rl import load_recipe, train
from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.counterfactuals import Counterfactuals
from tea_rl.training.learner import Learner
from tea_rl.training.token_value import TokenValue

VOCABULARY, WIDTH, LENGTH = 60, 24, 10
GOOD = 5  # tokens 0..4 are good, and so is 5, which is like them but is never sampled


def vocabulary():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw)
    weight[: GOOD + 1] = 2 * torch.randn(1, WIDTH, generator=draw) + 0.7 * weight[: GOOD + 1]
    return weight + 3.0  # a mean that is not 0 must not matter


def rollout(step, groups=8, each=8):
    """Random tokens but 5; ``(tokens, group of each completion, good tokens in each)``."""
    draw = torch.Generator().manual_seed(100 + step)
    count = groups * each
    actions = torch.randint(0, VOCABULARY - 1, (count * LENGTH,), generator=draw)
    actions += actions >= GOOD
    rows = torch.arange(count).repeat_interleave(LENGTH)
    empty = torch.zeros(len(actions))
    states = torch.randn(len(actions), WIDTH, generator=draw)
    tokens = TokenBatch(states, None, actions, *(empty,) * 7, rows=rows, positions=empty)
    good = torch.zeros(count).index_add_(0, rows, (actions < GOOD).float())
    return tokens, torch.arange(count) // each, good


def test_good_tokens_are_found_and_those_like_them():
    critic, noise = TokenValue(vocabulary()), torch.Generator().manual_seed(1)
    for step in (1, 2, 3, 4):
        tokens, groups, good = rollout(step)
        # What a prompt is worth differs from prompt to prompt, and says nothing of its tokens.
        rewards = good + 5.0 * (groups % 3) + 0.5 * torch.randn(len(good), generator=noise)
        values = critic.learn(tokens, rewards, groups)
        assert (critic.correlation == 0) is (step == 1)
    assert critic.correlation > 0.5
    assert values[: GOOD + 1].min() > values[GOOD + 1 :].median()
    assert values[: GOOD + 1].mean() > values[GOOD + 1 :].mean() + 0.2
    assert values[tokens.actions].mean().abs() < 1e-5


def edits_of(step, tokens, count=400):
    """Random replacements by any token but 5, of which good ones add 1."""
    draw = torch.Generator().manual_seed(200 + step)
    at = torch.randint(0, len(tokens), (count,), generator=draw)
    actions = torch.randint(0, VOCABULARY - 1, (count,), generator=draw)
    actions += actions >= GOOD
    changes = (actions < GOOD).float() - (tokens.actions[at] < GOOD).float()
    return Counterfactuals(at, actions, changes)


def test_changed_completions_tell_more():
    """Rewards that are mostly luck: what a replaced token changes holds none of it."""
    found = {}
    for asked in (False, True):
        critic = TokenValue(vocabulary())
        for step in (1, 2, 3):
            tokens, groups, good = rollout(step)
            luck = 3.0 * torch.randn(len(good), generator=torch.Generator().manual_seed(step))
            edits = edits_of(step, tokens) if asked else None
            values = critic.learn(tokens, good + luck, groups, edits)
        worth = (torch.arange(VOCABULARY) <= GOOD).float()
        found[asked] = float(torch.corrcoef(torch.stack([values, worth]))[0, 1])
        if asked:  # in units of reward, shrunk a little
            assert 0.5 < values[:GOOD].mean() - values[GOOD + 1 :].mean() < 1.2
    assert found[True] > 0.8 > found[False] + 0.15


def test_the_fit_is_ridge_regression():
    tokens, groups, good = rollout(1)
    edits = edits_of(1, tokens)
    critic, weight = TokenValue(vocabulary()), vocabulary()
    values = critic.learn(tokens, good, groups, edits)
    # Of completions and of edits, written out.
    unit = torch.nn.functional.normalize(weight - weight.mean(dim=0), dim=1)
    share = torch.bincount(tokens.actions, minlength=VOCABULARY) / len(tokens)
    unit = unit * ((1e-3 / (1e-3 + share)) ** 0.3).unsqueeze(1)
    each = len(good) // len(groups.unique())
    x = unit[tokens.actions].view(len(good), LENGTH, WIDTH).sum(dim=1).view(-1, each, WIDTH)
    x = (x - x.mean(dim=1, keepdim=True)).flatten(0, 1)
    length = x.norm(dim=1).mean()
    y = (good.view(-1, each) - good.view(-1, each).mean(dim=1, keepdim=True)).flatten()
    moved = unit[edits.actions] - unit[tokens.actions[edits.at]]
    x = (torch.cat([x, moved]) / length).double()
    y = torch.cat([y, edits.changes]).double()
    u = torch.linalg.solve(x.T @ x + torch.eye(WIDTH, dtype=torch.float64), x.T @ y).float()
    expected = unit @ u / length
    torch.testing.assert_close(values, expected - expected[tokens.actions].mean(), rtol=1e-3, atol=1e-4)


def test_where_completions_lie_tells_what_tokens_are_worth():
    """Tokens that say nothing of the reward, in states that do: a token is worth what lies in its direction."""
    critic = TokenValue(vocabulary())
    weight = vocabulary() - vocabulary().mean(dim=0)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    for step in (1, 2, 3):
        tokens, groups, good = rollout(step)
        rewards = torch.randn(len(good), generator=torch.Generator().manual_seed(step))
        tokens.states += 0.5 * rewards[tokens.rows].unsqueeze(1) * direction
        # Wide states: what else the head reads is none of its business.
        tokens.states = torch.cat([tokens.states, 100 * tokens.states], dim=1)
        values = critic.learn(tokens, rewards, groups)
    expected = torch.nn.functional.cosine_similarity(weight, direction.unsqueeze(0))
    assert critic.correlation > 0.8
    assert torch.corrcoef(torch.stack([values, expected]))[0, 1] > 0.7


def test_what_cannot_be_told_is_worth_nothing():
    tokens, groups, good = rollout(1)
    for rewards in (torch.ones(len(good)), 5.0 * (groups % 3), torch.full((len(good),), torch.nan)):
        critic = TokenValue(vocabulary())
        values = critic.learn(tokens, rewards, groups)  # all of a group alike, or unknown
        assert values.abs().max() < 1e-4
        assert critic.correlation == 0


def test_a_dull_first_rollout_does_no_harm():
    """Completions that are all alike tell nothing of how long their features are: later ones do."""
    fresh, late = TokenValue(vocabulary()), TokenValue(vocabulary())
    tokens, groups, good = rollout(1)
    same = tokens.select(torch.arange(len(tokens)))
    same.actions, same.states = torch.full_like(tokens.actions, 3), torch.ones_like(tokens.states)
    lengths = torch.bincount(tokens.rows)
    # Sums over equal tokens are alike where completions are equally long.
    whole = lengths[tokens.rows] == lengths.max()
    late.learn(same.select(whole.nonzero().squeeze(1)), torch.zeros(len(good)), groups)
    values = [critic.learn(tokens, good, groups) for critic in (fresh, late)]
    assert torch.isfinite(values[1]).all()
    assert torch.corrcoef(torch.stack(values))[0, 1] > 0.9


def test_what_is_learnt_fades():
    """Good tokens become bad ones: what was said before does not outweigh it for long."""
    critic = TokenValue(vocabulary())
    for step in range(1, 31):
        tokens, groups, good = rollout(step)
        edits = edits_of(step, tokens)
        sign = 1.0 if step <= 10 else -1.0
        values = critic.learn(tokens, sign * good, groups, edits._replace(changes=sign * edits.changes))
    assert values[: GOOD + 1].mean() < values[GOOD + 1 :].mean() - 0.5


def test_what_is_learnt_comes_back(tmp_path):
    critic, again = TokenValue(vocabulary()), TokenValue(vocabulary())
    for step in range(1, 4):
        tokens, groups, good = rollout(step)
        critic.learn(tokens, good, groups, edits_of(step, tokens))
    critic.save(tmp_path)
    again.load(tmp_path)
    tokens, groups, good = rollout(24)
    assert torch.equal(critic.learn(tokens, good, groups), again.learn(tokens, good, groups))
    assert critic.correlation == again.correlation


def test_what_an_earlier_version_kept_is_refused_in_one_line(tmp_path):
    save_file(
        {"features": torch.zeros(1, WIDTH), "rewards": torch.zeros(1)}, tmp_path / "token_value.safetensors"
    )
    with pytest.raises(TeaError, match="an earlier version learnt them; start a new run"):
        TokenValue(vocabulary()).load(tmp_path)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


def head_and_tokens(backbone):
    head = TeaHead.for_backbone(backbone, HeadConfig(hidden_sizes=[16], shortlist_size=24))
    torch.nn.init.normal_(head.members.readout, std=0.05, generator=torch.Generator().manual_seed(0))
    head.eval()
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    return head, generate(backbone, head, prompts, DecodeSettings(8, 12)).tokens


def test_expected_value_is_that_of_the_policy(backbone):
    head, tokens = head_and_tokens(backbone)
    values = torch.randn(backbone.vocab_size, generator=torch.Generator().manual_seed(0))
    found = head.terms(tokens, token_values=values).value
    whole = head(tokens.states)
    kept = torch.zeros_like(whole).scatter_(1, tokens.shortlist.ids, values[tokens.shortlist.ids])
    torch.testing.assert_close(found, (whole.softmax(-1) * kept).sum(-1), rtol=1e-4, atol=1e-5)
    assert head.terms(tokens).value is None


def test_the_policy_follows_the_values_alone(backbone):
    head, tokens = head_and_tokens(backbone)
    values = torch.where(torch.arange(backbone.vocab_size) % 2 == 0, 1.0, -1.0)
    before = head.terms(tokens, token_values=values).value.mean()
    objective = ObjectiveConfig(
        name="grpo", expected_gradient=1.0, inner_epochs=10, minibatch_tokens=64, target_kl=None
    )
    learner = Learner(
        head, objective, AnchorConfig(), TrainConfig(learning_rate=3e-3, warmup_steps=0), 1.0, total_steps=1
    )
    learner.update(tokens, torch.zeros(len(tokens)), torch.Generator().manual_seed(0), values)
    assert head.terms(tokens, token_values=values).value.mean() > before + 0.1


REWARD = """
def even(prompts, completions, **columns):
    return [float(sum(ord(letter) % 2 == 0 for letter in text)) for text in completions]
"""


def recipe(tmp_path, **changes):
    settings = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path / "model")), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 24, "dropout": 0.1},
        "data": {"prompts": [f"prompt number {i}" for i in range(12)]},
        "rewards": [{"name": "rewards.py:even"}],
        "rollout": {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 6},
        "objective": {"name": "grpo", "expected_gradient": 0.8},
        "train": {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "num_threads": 1, "warmup_steps": 0},
    }  # fmt: skip
    (tmp_path / "rewards.py").write_text(REWARD)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)


def test_a_resumed_run_values_tokens_as_if_it_had_not_stopped(tmp_path):
    path = recipe(tmp_path)
    train(load_recipe(path), tmp_path / "whole")
    asked = iter([False, False, False, True])
    train(load_recipe(path), tmp_path / "cut", should_stop=lambda: next(asked))
    train(load_recipe(path), tmp_path / "cut", resume=True)
    whole, cut = (
        hashlib.sha256((tmp_path / name / "head" / "tea_head.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "cut")
    )
    assert whole == cut
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert min(row["value_correlation"] for row in rows if row["step"] > 4 and "loss" in row) > 0


def test_the_length_of_a_run_belongs_to_it(tmp_path):
    path = recipe(tmp_path)
    train(load_recipe(path, ["train.max_steps=2"]), tmp_path / "run")
    with pytest.raises(TeaError, match="max_steps"):  # the gradients fall over all steps
        train(load_recipe(path, ["train.max_steps=4"]), tmp_path / "run", resume=True)
    free = ["train.max_steps=2", "objective.expected_gradient=0"]
    train(load_recipe(path, free), tmp_path / "other")
    longer = train(load_recipe(path, ["train.max_steps=3", free[1]]), tmp_path / "other", resume=True)
    assert longer.step == 3


def test_sampled_credit_alone_has_the_last_word(tmp_path):
    path, steps = recipe(tmp_path), "objective.expected_gradient_steps=2"
    short = train(load_recipe(path, [steps, "train.max_steps=3"]), tmp_path / "run")
    rows = [json.loads(line) for line in (short.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "value_correlation" in row] == [1, 2]
    # How it falls does not depend on where the run ends: the run may be continued, and is the one of that length.
    train(load_recipe(path, [steps, "train.max_steps=4"]), tmp_path / "run", resume=True)
    train(load_recipe(path, [steps, "train.max_steps=4"]), tmp_path / "whole")
    heads = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("run", "whole")]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(("steps", "same"), [(4, True), (8, False)])
def test_it_falls_over_all_steps_unless_told_otherwise(steps, same, tmp_path):
    path = recipe(tmp_path)
    told = [f"objective.expected_gradient_steps={steps}"]
    for name, more in (("default", []), ("told", told)):
        train(load_recipe(path, ["train.max_steps=4", *more]), tmp_path / name)
    heads = [(tmp_path / name / "head" / "tea_head.safetensors").read_bytes() for name in ("default", "told")]
    assert (heads[0] == heads[1]) is same


@pytest.mark.parametrize("size", ["all", "auto"])
def test_a_shortlist_is_needed(tmp_path, size):
    with pytest.raises(TeaError, match=f"expected_gradient needs data.prompts and a number.* and {size};"):
        load_recipe(recipe(tmp_path), [f"head.shortlist_size={size}"])
    with pytest.raises(TeaError, match="expected_gradient needs data.prompts"):
        load_recipe("guess-number", ["objective.expected_gradient=1"])


def test_one_completion_a_prompt_says_nothing(tmp_path):
    with pytest.raises(TeaError, match="num_generations of at least 2, got 1"):
        load_recipe(recipe(tmp_path), ["objective.name=reinforce", "rollout.num_generations=1"])
