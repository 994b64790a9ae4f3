"""Every job kind on a tiny model: trained by TRL and PEFT themselves, measured like ours."""

import json
import math
import time

import pytest
import torch
from tiny_jobs import job_of, tiny_recipe

from tea_rl.backbone import load_backbone
from tea_rl.compare import course
from tea_rl.compare.course import Budget
from tea_rl.compare.jobs import CURVE_NAME
from tea_rl.compare.results import write_json
from tea_rl.compare.rollouts import Rollouts
from tea_rl.compare.worker import run_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


def reward_of(result):
    return sum(result.metrics.reward_sampled) / len(result.metrics.reward_sampled)


@pytest.fixture(autouse=True)
def dense_curves(monkeypatch):
    """Training a tiny model takes no longer than evaluating it: a point after each step all the same."""
    monkeypatch.setattr(course, "_POINT_SPACING", 0.0)


def test_slow_points_are_rarer(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "_POINT_SPACING", 4.0)
    slow = course.Course(lambda: 0.5, 1e-9, Budget(), tmp_path / "curve.jsonl")
    slow.begin()
    slow.point_seconds = 1000.0
    slow.add_seconds(3000.0)
    slow.after_step(1, 8)
    assert [point.step for point in slow.curve] == [0]
    slow.add_seconds(1500.0)
    slow.after_step(2, 16)
    assert [point.step for point in slow.curve] == [0, 2]


def test_the_base_model_is_measured_and_times_the_others(folder):
    job = job_of(tiny_recipe(folder), "base", folder / "out")
    result = run_job(job, Budget()).result
    assert result.metrics.kl.value == 0 and result.trainable_parameters == 0 and result.reward_calls == 0
    assert [point.step for point in result.curve] == [0]
    times = json.loads((job.folder / "times.json").read_text())
    assert times["total"] > times["measuring"] > times["point"] > 0


def test_best_of_n_earns_more_than_the_base_model(folder):
    base, best = (
        run_job(job_of(tiny_recipe(folder), name, folder / "out"), Budget()).result
        for name in ("base", "best-of-n")
    )
    assert reward_of(best) > reward_of(base)
    assert best.metrics.kl.kind == "bound"


def test_our_own_job_counts_training_and_nothing_else(folder):
    job = job_of(tiny_recipe(folder), "tea", folder / "out")
    started = time.perf_counter()
    outcome = run_job(job, Budget())
    result = outcome.result
    assert outcome.status == "done" and outcome.reason is None
    assert [point.step for point in result.curve] == [0, 1, 2]
    assert result.reward_calls == result.curve[-1].reward_calls == 2 * 2 * 4
    assert 0 < result.train_seconds < time.perf_counter() - started
    assert result.metrics.kl.value > 0 and result.metrics.kl.kind == "exact"
    assert [point.strength for point in result.frontier] == [0.0, 1.0]
    assert result.frontier[0].kl == pytest.approx(0, abs=1e-6)
    assert len((job.folder / CURVE_NAME).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "method, calls",
    [
        ("grpo-lora", None), ("rloo-ia3", None), ("grpo-prefix-tuning", None), ("rloo-p-tuning", None),
        ("dpo-lora", 24), ("kto-prompt-tuning", 24), ("sft-lora", 24), ("sft-p-tuning", 24), ("full-dpo", 24),
    ],
)  # fmt: skip
def test_a_peer_trains_and_is_measured(folder, method, calls):
    recipe = tiny_recipe(folder)
    endless = method.startswith(("grpo", "rloo"))
    before = load_backbone(str(folder / "llama"), dtype="float32", device="cpu")
    job = job_of(recipe, method, folder / "out")
    # Those that generate go on until their time is up: two seconds of training, about.
    budget = Budget(ends_at=time.time() + 4, measuring=0.1, point=1.0) if endless else Budget()
    outcome = run_job(job, budget)
    result = outcome.result
    assert outcome.status == "done"
    assert (outcome.reason is not None) == endless
    assert result.curve[0].step == 0 and result.curve[-1].step >= 1
    assert result.reward_calls == (calls or result.curve[-1].step * 8)
    assert result.metrics.kl.value > 0 and math.isfinite(result.metrics.kl.value)
    assert result.trainable_parameters > 0 and result.size_on_disk_bytes > 0
    every = sum(parameter.numel() for parameter in before.model.parameters())
    assert (result.trainable_parameters == every) == (method == "full-dpo")
    assert (job.checkpoint() is not None) == endless


def test_a_job_whose_time_was_used_up_goes_on_where_it_was(folder):
    job = job_of(tiny_recipe(folder), "grpo-lora", folder / "goes-on")
    first = run_job(job, Budget(time.time() + 3, 0.1, 1.0))
    write_json(first, job.result_path)
    second = run_job(job, Budget(time.time() + 6, 0.1, 1.0), resume=True)
    before, after = first.result.curve, second.result.curve
    assert after[: len(before)] == before
    assert after[-1].step > before[-1].step and after[-1].seconds > before[-1].seconds
    assert second.result.reward_calls == after[-1].step * 8


def test_trainers_that_share_rollouts_learn_from_the_same_ones(folder):
    recipe = tiny_recipe(folder)
    first = run_job(job_of(recipe, "sft-lora", folder / "shared"), Budget()).result
    path = folder / "shared" / "rollouts" / "seed0.json"
    stored = path.read_text()
    second = run_job(job_of(recipe, "dpo-lora", folder / "shared"), Budget()).result
    assert path.read_text() == stored
    rollouts = Rollouts.model_validate_json(stored)
    for result in (first, second):
        assert result.train_seconds >= rollouts.seconds > 0


def test_rows_are_what_was_sampled():
    rollouts = Rollouts(
        prompt_ids=[[5, 6], [7]],
        completion_ids=[[[10], [11, 12], [13]], [[20], [21], [22]]],
        rewards=[[0.0, 1.0, 0.2], [0.5, 0.5, 0.5]],
        seconds=1.0,
    )
    assert rollouts.pairs() == [{"prompt_ids": [5, 6], "chosen_ids": [11, 12], "rejected_ids": [10]}]
    assert [(row["completion_ids"], row["label"]) for row in rollouts.labelled()] == [
        ([10], False), ([11, 12], True), ([13], False),
    ]  # fmt: skip
    assert rollouts.best()[0] == {"input_ids": [5, 6, 11, 12], "labels": [-100, -100, 11, 12]}
    assert rollouts.reward_calls == 6


def test_an_adapter_leaves_the_base_model_as_it_was(folder):
    from tea_rl.compare.peers import train_peer
    from tea_rl.compare.trained import Start
    from tea_rl.rewards import load_rewards
    from tea_rl.training.online import prepare_prompts

    recipe = tiny_recipe(folder)
    job = job_of(recipe, "sft-lora", folder / "same")
    backbone = load_backbone(**recipe.model.model_dump())
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    rewards = load_rewards(recipe.rewards, folder)
    trained = train_peer(
        job, Start(recipe, backbone, *prepare_prompts(recipe, backbone), rewards, job.folder, Budget()), []
    )
    after = {
        name.replace("base_layer.", ""): value
        for name, value in trained.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    changed = [value for name, value in after.items() if "lora_B" in name]
    assert changed and any(value.abs().max() > 0 for value in changed)
