"""Whole runs on a tiny model: they learn, leave the backbone alone, write what they should and resume exactly."""

import hashlib
import json

import pytest
import torch
import torch._inductor.compile_fx
import yaml
from tiny import save_tiny

import tea_rl.training.generating as generating
from tea_rl import load_recipe, train
from tea_rl.backbone import load_backbone
from tea_rl.errors import TeaError
from tea_rl.head import compiled_terms, logits
from tea_rl.training.progress import Listener
from tea_rl.training.seeding import prompts_of_step

REWARD = '''
def even(prompts, completions, **columns):
    """Share of characters with an even code point."""
    return [sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text)) for text in completions]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe_file(tmp_path, model):
    """A recipe on disk, in the folder of its reward file and prompts."""
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {i}" for i in range(12)))
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [32, 16], "shortlist_size": 32, "dropout": 0.1, "member_dropout": 0.2},
        "data": {"prompts": "prompts.txt"},
        "rewards": [{"name": "rewards.py:even", "weight": 10}, {"name": "length", "weight": 0.001, "kwargs": {"max": 4}}],
        "rollout": {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 8},
        "objective": {"name": "grpo", "inner_epochs": 4, "minibatch_tokens": 64},
        "train": {
            "learning_rate": 3e-3, "warmup_steps": 1, "max_steps": 6, "save_steps": 2, "eval_steps": 3, "sample_prompts": 2,
        },
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rows(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def head_digest(path):
    return hashlib.sha256((path / "head" / "tea_head.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("objective", ["grpo", "rloo", "reinforce", "ppo"])
def test_every_objective_learns(recipe_file, tmp_path, objective):
    settings = ["train.max_steps=12", "rollout.num_generations=16", "head.dropout=0", "head.member_dropout=0"]
    train(load_recipe(str(recipe_file), [f"objective.name={objective}", *settings]), tmp_path / "run")
    rewards = [row["reward/even"] for row in rows(tmp_path / "run") if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    evaluations = [row for row in rows(tmp_path / "run") if "eval_reward" in row]
    assert evaluations[0]["eval_kl"] == 0 < evaluations[-1]["eval_kl"]


@pytest.mark.parametrize(
    "override",
    ["head.shortlist_size=all", "head.train_reference=true", "train.optim=ademamix", "train.optim=sgd"],
)
def test_backbone_stays_bit_identical_and_the_head_changes(
    recipe_file, tmp_path, model, override, monkeypatch
):
    """Invariant 2."""
    used = []
    monkeypatch.setattr(
        generating, "load_backbone", lambda *a, **k: used.append(load_backbone(*a, **k)) or used[-1]
    )
    train(
        load_recipe(str(recipe_file), [override, "anchor.conservativity=0", "train.max_steps=2"]),
        tmp_path / "run",
    )
    fresh = load_backbone(str(model), dtype="float32").model.state_dict()
    after = used[0].model.state_dict()
    assert after.keys() == fresh.keys()
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)
    assert not used[0].installed
    from tea_rl import TeaHead

    trained = TeaHead.from_pretrained(tmp_path / "run" / "head", used[0])
    blank = TeaHead.for_backbone(used[0], trained.config, seed=0)
    changed = [
        name
        for name, value in trained.head_state().items()
        if not torch.equal(value, blank.head_state()[name])
    ]
    assert "members.readout" in changed and "members.weights.0" in changed
    assert ("reference_delta" in changed) == trained.config.train_reference


@pytest.mark.rendered
def test_run_directory_is_complete(recipe_file, tmp_path):
    result = train(str(recipe_file), tmp_path / "run")
    path = tmp_path / "run"
    assert result.step == 6 and not result.stopped
    names = {
        "recipe.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "report.html",
        "manifest.json",
        "head",
    }
    assert names <= {item.name for item in path.iterdir()}
    assert sorted(item.name for item in (path / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
    steps = [row for row in rows(path) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    expected = {
        "reward", "reward/even", "reward/length", "kl", "entropy", "loss", "grad_norm", "inner_epochs",
        "tokens_per_second", "seconds", "skipped_steps",
    }  # fmt: skip
    assert expected <= steps[0].keys()
    evaluations = [row for row in rows(path) if "eval_reward" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert {"eval_reward_greedy", "eval_kl", "eval_distinct_2", "eval_base_nll"} <= evaluations[0].keys()
    samples = rows(path, "samples.jsonl")
    assert len(samples) == 6 and samples[0]["base"] == samples[0]["trained"]
    assert len({row["prompt"] for row in samples}) == 2
    manifest = json.loads((path / "manifest.json").read_text())
    assert {"seed", "base_model_digest", "data_digest", "packages"} <= manifest.keys()


def test_resolved_recipe_reproduces_the_run(recipe_file, tmp_path):
    train(str(recipe_file), tmp_path / "first")
    train(str(tmp_path / "first" / "recipe.yaml"), tmp_path / "second")
    assert head_digest(tmp_path / "first") == head_digest(tmp_path / "second")


def test_stopped_and_resumed_run_ends_with_the_same_bytes(recipe_file, tmp_path):
    """Invariant 7, for a clean stop; `test_kill_and_resume` does it with kill -9."""
    train(str(recipe_file), tmp_path / "whole")
    stops = iter(
        [False, False, False, True]
    )  # asked before the first step and after each: stops after an evaluation
    stopped = train(str(recipe_file), tmp_path / "parts", should_stop=lambda: next(stops))
    assert stopped.stopped and stopped.step == 3
    result = train(str(recipe_file), tmp_path / "parts", resume=True)
    assert result.step == 6
    assert head_digest(tmp_path / "whole") == head_digest(tmp_path / "parts")
    timing = ("seconds", "tokens_per_second")

    def comparable(path):
        return [{k: v for k, v in row.items() if k not in timing} for row in rows(path)]

    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")
    assert rows(tmp_path / "whole", "samples.jsonl") == rows(tmp_path / "parts", "samples.jsonl")
    again = train(str(recipe_file), tmp_path / "parts", resume=True)  # a finished run: nothing left to do
    assert again.step == 6 and head_digest(tmp_path / "whole") == head_digest(tmp_path / "parts")


def test_compiled_updates_learn_the_same_and_resume_exactly(recipe_file, tmp_path, monkeypatch):
    """With the real compiler: `test_compiled_terms` looks at every kind of head without it."""
    monkeypatch.setattr(compiled_terms, "_known", {})
    texts = []
    listener = Listener()
    listener.on_note = texts.append
    options = ["head.dropout=0", "head.member_dropout=0", "objective.inner_epochs=2"]
    plain, compiled = (
        load_recipe(str(recipe_file), [*options, f"train.compile={does}"]) for does in ("false", "true")
    )
    train(plain, tmp_path / "plain")
    train(compiled, tmp_path / "whole", listener=listener)
    assert any("train.compile: the first update" in text for text in texts)
    assert compiled_terms._known and None not in compiled_terms._known.values()
    stops = iter([False, False, False, True])
    train(compiled, tmp_path / "parts", should_stop=lambda: next(stops))
    assert train(compiled, tmp_path / "parts", resume=True).step == 6
    assert (
        head_digest(tmp_path / "whole") == head_digest(tmp_path / "parts") != head_digest(tmp_path / "plain")
    )
    found, expected = (rows(tmp_path / name)[1] for name in ("whole", "plain"))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("setting", ["model.compile", "train.compile"])
def test_without_a_compiler_nothing_is_begun(recipe_file, tmp_path, monkeypatch, setting):
    def fail(*given, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", fail)
    monkeypatch.setattr(logits, "compiled_product", logits.compiled_product.__wrapped__)
    recipe = load_recipe(str(recipe_file), [f"{setting}=true"])
    with pytest.raises(TeaError, match=rf"{setting} is true, but .*no compiler"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [(["train.learning_rate=0.5"], r"train\.learning_rate"), (["data.split_seed=3"], r"data\.split_seed")],
)
def test_resume_refuses_another_recipe(recipe_file, tmp_path, overrides, named):
    train(load_recipe(str(recipe_file), ["train.max_steps=2"]), tmp_path / "run")
    with pytest.raises(TeaError, match=named):
        train(load_recipe(str(recipe_file), ["train.max_steps=4", *overrides]), tmp_path / "run", resume=True)
    longer = train(load_recipe(str(recipe_file), ["train.max_steps=4"]), tmp_path / "run", resume=True)
    assert longer.step == 4


def test_resume_refuses_other_data(recipe_file, tmp_path):
    train(load_recipe(str(recipe_file), ["train.max_steps=2"]), tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("\n".join(f"another prompt {i}" for i in range(12)))
    with pytest.raises(TeaError, match="data_digest"):
        train(load_recipe(str(recipe_file), ["train.max_steps=2"]), tmp_path / "run", resume=True)


def test_a_bad_head_is_never_saved(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(str(recipe_file))
    train(load_recipe(str(recipe_file), ["train.max_steps=2"]), tmp_path / "run")
    monkeypatch.setattr(generating.TeaHead, "is_finite", lambda self: False)
    with pytest.raises(TeaError, match="not finite"):
        train(recipe, tmp_path / "run", resume=True)
    assert [item.name for item in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('boom')", "boom"),
        ("return [float('nan')] * len(completions)", "even"),
        ("return [1.0]", "even"),
        ("return ['high'] * len(completions)", "even"),
    ],
)
def test_bad_reward_functions_are_named(recipe_file, tmp_path, body, message):
    (tmp_path / "rewards.py").write_text(f"def even(prompts, completions, **columns):\n    {body}\n")
    with pytest.raises(TeaError, match=message) as caught:
        train(str(recipe_file), tmp_path / "run")
    assert "\n" not in str(caught.value) and "even" in str(caught.value)


def test_too_few_prompts_and_too_long_prompts(recipe_file, tmp_path):
    with pytest.raises(TeaError, match="prompts_per_step is 50"):
        train(load_recipe(str(recipe_file), ["rollout.prompts_per_step=50"]), tmp_path / "a")
    with pytest.raises(TeaError, match="tokens"):
        train(load_recipe(str(recipe_file), ["rollout.max_completion_length=126"]), tmp_path / "b")


def test_every_prompt_once_an_epoch():
    epoch = [i for step in range(1, 6) for i in prompts_of_step(0, step, 10, 4)]
    assert sorted(epoch[:10]) == list(range(10)) and sorted(epoch[10:20]) == list(range(10))
    assert epoch[:10] != epoch[10:20]
    assert prompts_of_step(0, 3, 10, 4) == epoch[8:12]
    assert prompts_of_step(1, 3, 10, 4) != epoch[8:12]
