"""A comparison as a whole: what runs when and for how long, what fails, what is kept. Most processes are real."""

import json
import os
import time

import numpy as np
import pytest
from tiny_jobs import REWARD, job_of, tiny_recipe

import tea_rl.compare.runner as runner
from tea_rl.compare.course import Budget
from tea_rl.compare.jobs import plan
from tea_rl.compare.methods import parse_methods
from tea_rl.compare.process import Stopped, run_process
from tea_rl.compare.results import CurvePoint, FrontierPoint, JobResult, Metrics, SeedResult, read_results
from tea_rl.compare.watcher import Watcher
from tea_rl.compare.worker import run_job
from tea_rl.errors import TeaError
from tea_rl.recipe_compare import Guards

#: Wrong while it trains (groups of a whole step), right while it is measured.
FAILS_IN_TRAINING = REWARD.replace(
    "    return", "    if len(prompts) == 8:\n        raise KeyError('lost')\n    return"
)
STARTS_A_CHILD_AND_WAITS = """
import subprocess, time
from pathlib import Path

def even(prompts, completions, **columns):
    child = subprocess.Popen(["sleep", "3000"], start_new_session=True)
    Path(__file__).with_name("child.pid").write_text(str(child.pid))
    time.sleep(3000)
"""
TAKES_MEMORY = """
kept = []

def even(prompts, completions, **columns):
    while True:
        kept.append(bytearray(200_000_000))
"""


class Heard(Watcher):
    """Remembers what began and how it ended."""

    def __init__(self):
        self.began, self.ended, self.kept = [], [], None

    def on_jobs(self, total, kept, ends_at):
        self.kept = kept

    def on_job(self, job, seconds, continued):
        self.began.append((job.label, seconds, continued))

    def on_outcome(self, job, outcome):
        self.ended.append(outcome.status)


def compare(recipe, methods, output, heard=None, **options):
    given = {"max_seconds": 3000.0, "max_memory_bytes": 8e9, "command": "tea-rl compare", **options}
    return runner.run_comparison(recipe, parse_methods(methods), output, watcher=heard or Heard(), **given)


def test_a_method_that_fails_is_a_row_and_is_tried_again(tmp_path):
    heard = Heard()
    results, stopped = compare(tiny_recipe(tmp_path, FAILS_IN_TRAINING), "tea", tmp_path / "out", heard)
    assert not stopped and heard.ended == ["done", "failed"]
    base, ours = results.methods
    assert base.status == "done" and base.seeds[0].metrics.reward_sampled
    assert (ours.status, ours.seeds) == ("failed", [])
    assert 'reward "even" raised KeyError' in ours.reason and "\n" not in ours.reason
    assert read_results(tmp_path / "out").methods[1].status == "failed"
    assert (tmp_path / "out" / "report.html").is_file()
    # Once the reward is mended, what is done is kept and the rest is done.
    mended = Heard()
    results, _ = compare(tiny_recipe(tmp_path), "tea", tmp_path / "out", mended)
    assert mended.kept == 1 and [label for label, *_ in mended.began] == ["tea"]
    assert [method.status for method in results.methods] == ["done", "done"]
    third = Heard()
    again, _ = compare(tiny_recipe(tmp_path), "tea", tmp_path / "out", third)
    # As text: a figure that was not measured is NaN, which equals nothing.
    assert again.methods[1].model_dump_json() == results.methods[1].model_dump_json()
    assert third.kept == 2 and third.began == []


def ended(job, **options):
    """Run a job with limits; the outcome of its process."""
    later = time.time() + 2000
    given = {
        "train_until": later,
        "kill_at": later,
        "max_memory_bytes": 8e9,
        "should_stop": lambda: False,
        **options,
    }
    return run_process(job, [], **given)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_out_of_time_is_ended_with_its_children(tmp_path):
    job = job_of(tiny_recipe(tmp_path, STARTS_A_CHILD_AND_WAITS), "base", tmp_path / "out")
    pid_file = tmp_path / "child.pid"

    class Late:
        """A deadline that comes once the child is there."""

        def __lt__(self, now):
            return pid_file.exists()

    outcome = ended(job, train_until=Late())
    assert outcome.status == "time" and "while it trained" in outcome.reason
    assert not is_running(int(pid_file.read_text()))


def test_a_job_out_of_memory_is_ended(tmp_path):
    job = job_of(tiny_recipe(tmp_path, TAKES_MEMORY), "base", tmp_path / "out")
    outcome = ended(job, max_memory_bytes=1.5e9)
    assert outcome.status == "memory" and "above the limit of 1.50 GB" in outcome.reason


def test_a_process_that_dies_says_so(tmp_path):
    dies = "import os, signal\ndef even(prompts, completions, **columns):\n    os.kill(os.getpid(), signal.SIG{})\n"
    killed = ended(job_of(tiny_recipe(tmp_path, dies.format("KILL")), "base", tmp_path / "out"))
    assert killed.status == "failed" and "signal 9" in killed.reason


def test_a_stop_ends_the_job_under_way_and_keeps_nothing_of_it(tmp_path):
    recipe = tiny_recipe(tmp_path, STARTS_A_CHILD_AND_WAITS)
    pid_file = tmp_path / "child.pid"
    results, stopped = compare(recipe, "base", tmp_path / "out", should_stop=pid_file.exists)
    assert stopped and results.methods[0].status == "skipped"
    assert not is_running(int(pid_file.read_text()))
    job = job_of(recipe, "base", tmp_path / "out")
    with pytest.raises(Stopped):
        ended(job, should_stop=lambda: True)


def test_a_comparison_that_gets_stuck_keeps_its_time(tmp_path):
    results, _ = compare(
        tiny_recipe(tmp_path, STARTS_A_CHILD_AND_WAITS), "base,tea", tmp_path / "out", max_seconds=30
    )
    assert [method.status for method in results.methods] == ["time", "skipped"]
    assert "run the command again" in results.methods[1].reason


def done(job, reward, checkpoint=False):
    """What a job leaves behind, without having been done."""
    metrics = Metrics(
        reward_sampled=[reward], reward_greedy=[reward], surprise=1.0, distinct_1=1.0, distinct_2=1.0, self_repetition=0.0,
        length=4.0,
    )  # fmt: skip
    if checkpoint:
        (job.folder / "checkpoint" / "checkpoint-3").mkdir(parents=True)
    curve = [CurvePoint(seconds=0, step=0, reward_calls=0, reward=reward)]
    result = SeedResult(seed=job.seed, train_seconds=1.0, metrics=metrics, curve=curve)
    return JobResult(**job.key, status="done", result=result)


def test_time_is_shared_out_and_what_is_left_goes_to_the_best_rate(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, compare={"learning_rates": {"lora": [1e-4, 1e-3]}, "seeds": [0, 1]})
    rewards = {1e-4: 0.2, 1e-3: 0.6}
    heard = Heard()

    def instead(job, arguments, *limits):
        if job.method.name == "base":
            times = {"total": 20.0, "measuring": 10.0, "point": 2.0}
            (job.folder / "times.json").write_text(json.dumps(times))
        else:
            assert "--point=2.0" in arguments
            assert f"--measuring={12.5 if job.method.is_peer else 10.0}" in arguments
        return done(
            job,
            rewards.get(job.learning_rate, 0.1),
            job.method.name == "grpo-lora" and "--resume" not in arguments,
        )

    monkeypatch.setattr(runner, "run_process", instead)
    results, _ = compare(recipe, "grpo-lora,sft-lora,tea", tmp_path / "out", heard, max_seconds=1000.0)
    labels = [(label, continued) for label, _, continued in heard.began]
    assert labels == [
        ("base", False), ("tea", False), ("tea seed 1", False), ("sft-lora 0.0001", False), ("sft-lora 0.001", False),
        ("grpo-lora 0.0001", False), ("grpo-lora 0.001", False), ("grpo-lora 0.001", True),
    ]  # fmt: skip
    seconds = {label: share for label, share, continued in heard.began if not continued}
    assert all(share > 20 for share in seconds.values())
    assert seconds["grpo-lora 0.001"] > seconds["sft-lora 0.001"]
    grpo = next(method for method in results.methods if method.name == "grpo-lora")
    assert grpo.learning_rate == 1e-3
    assert [(tried.learning_rate, tried.reward) for tried in grpo.tried] == [(1e-4, 0.2), (1e-3, 0.6)]
    assert not list((tmp_path / "out").glob("jobs/*/*/checkpoint"))


def test_a_rate_that_hacks_its_reward_is_not_the_best_one(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, compare={"learning_rates": {"lora": [1e-4, 1e-3, 1e-2]}})
    rewards = {1e-4: 0.4, 1e-3: 0.6, 1e-2: 0.9}
    collapsed = [1e-2]

    def instead(job, arguments, *limits):
        outcome = done(
            job, rewards.get(job.learning_rate, 0.1), job.method.is_peer and "--resume" not in arguments
        )
        if job.learning_rate in collapsed:
            outcome.result.metrics.distinct_2 = 0.2
        return outcome

    def tried(output, recipe):
        heard = Heard()
        results, _ = compare(recipe, "grpo-lora", output, heard)
        grpo = next(method for method in results.methods if method.name == "grpo-lora")
        continued = [label for label, _, again in heard.began if again]
        return results, grpo.learning_rate, [one.passed_over for one in grpo.tried], continued

    monkeypatch.setattr(runner, "run_process", instead)
    results, rate, why, continued = tried(tmp_path / "out", recipe)
    assert rate == 1e-3 and continued == ["grpo-lora 0.001"]
    assert why[:2] == [None, None] and why[2].startswith(
        "diversity collapsed, distinct bigrams fell from 1.00 to"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "; passed over: diversity collapsed" in page.split('<table id="tried">')[1].split("</table>")[0]

    # Other guards judge what is there otherwise, and nothing is done again.
    guards = {"diversity_floor": 0.1, "kl_budget": 0.5}
    loose = tiny_recipe(tmp_path, compare={**recipe.compare.model_dump(), "guards": guards})
    heard = Heard()
    results, _ = compare(loose, "grpo-lora", tmp_path / "out", heard)
    assert heard.began == [] and heard.kept == 4
    assert results.guards.diversity_floor == 0.1 and results.guards.kl_budget == 0.5
    assert read_results(tmp_path / "out").guards == results.guards
    assert results.methods[1].learning_rate == 1e-2

    collapsed += [1e-4, 1e-3]
    _, rate, why, _ = tried(tmp_path / "all", recipe)
    assert rate == 1e-2 and why == [None] * 3


def test_the_frontier_of_ours_is_measured_though_its_training_was_cut(tmp_path):
    """Without time for another strength there are still the base model's point and its own."""
    groups = {"train": {"max_steps": 500}, "compare": {"seeds": [0, 1], "strengths": [0.0, 0.5, 1.0, 1.5]}}
    recipe = tiny_recipe(tmp_path, **groups)
    compare(recipe, "base", tmp_path / "out")
    cut = Budget(ends_at=time.time() - 1.0, measuring=1.0, point=1.0)
    job = job_of(recipe, "tea", tmp_path / "out")
    outcome = run_job(job, cut)
    assert outcome.reason.startswith("trained until its time was used up: 1 steps")
    original = np.mean(job.base_outcome().result.metrics.reward_sampled)
    metrics = outcome.result.metrics
    assert outcome.result.frontier == [
        FrontierPoint(strength=0.0, reward=original, kl=0.0),
        FrontierPoint(strength=1.0, reward=np.mean(metrics.reward_sampled), kl=metrics.kl.value),
    ]
    ours = [job for job in plan(recipe, parse_methods("tea"), tmp_path / "out") if job.method.name == "tea"]
    assert [job.is_swept for job in ours] == [True, False]


def test_guards_of_a_recipe_are_checked_in_one_line(tmp_path):
    assert tiny_recipe(tmp_path).compare.guards == Guards()
    for guards, expected in (
        ({"diversity_floor": 2}, r"compare.guards.diversity_floor: expected a number"),
        ({"kl": 1}, r'unknown key "compare.guards.kl"'),
    ):
        with pytest.raises(TeaError, match=expected) as refused:
            tiny_recipe(tmp_path, compare={"guards": guards})
        assert "\n" not in str(refused.value)


#: Seconds of the base model's job with a 135M model on two small cores: all of it, measuring it, a point of the curve.
SMALL_MACHINE = {"total": 45.0, "measuring": 30.0, "point": 6.0}
METHODS = "base,tea,grpo-lora,dpo-lora,sft-lora"


def test_in_forty_minutes_ours_takes_all_its_steps_and_peers_the_rest(tmp_path, monkeypatch):
    """A clock that is turned on by what each job would take; ours needs 18 steps of 10 s, and a point every 24 s or more."""
    rates = {"learning_rates": {"lora": [1e-4, 3e-4, 1e-3]}, "seeds": [0, 1, 2]}
    recipe = tiny_recipe(tmp_path, compare={**rates, "strengths": [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]})
    clock, granted, trained = [1_000_000.0], {}, {}

    def instead(job, arguments, *limits):
        seconds = next(float(a.partition("=")[2]) for a in arguments if a.startswith("--ends-at")) - clock[0]
        name, total, measuring, point = job.method.name, *SMALL_MACHINE.values()
        if name == "base":
            (job.folder / "times.json").write_text(json.dumps(SMALL_MACHINE))
            clock[0] += total
            return done(job, 0.1)
        kept = total - measuring + (10.0 if job.method.is_peer else 0.0)
        kept += measuring * (1.0 + 0.25 * job.method.is_peer + 5 * 0.65 * job.is_swept)
        granted[job.label] = seconds
        room = seconds - kept
        if name == "tea":
            room = min(room, 180.0 + 7 * point)
        trained[job.label] = trained.get(job.label, 0.0) + room * 24.0 / 30.0
        clock[0] += kept + room
        outcome = done(job, 0.5, name == "grpo-lora" and "--resume" not in arguments)
        outcome.result.train_seconds = 180.0
        outcome.result.curve *= 8
        return outcome

    monkeypatch.setattr(runner, "run_process", instead)
    monkeypatch.setattr(runner.time, "time", lambda: clock[0])
    compare(recipe, METHODS, tmp_path / "out", max_seconds=2400.0)
    measuring, sweep, loading = 30.0, 5 * 0.65 * 30.0, 15.0
    needed = 180.0 + 7 * 6.0 + measuring + loading
    assert granted["tea"] >= needed + sweep
    assert all(needed <= granted[f"tea seed {seed}"] <= 1.4 * needed for seed in (1, 2))
    assert sum(trained.values()) >= 0.48 * 2400.0
    assert clock[0] - 1_000_000.0 <= 1.02 * 2400.0


def test_a_folder_with_something_else_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_process", lambda job, *_: done(job, 0.5))
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(TeaError, match="holds thesis.tex"):
        compare(recipe, "base", tmp_path / "mine")
    compare(recipe, "base", tmp_path / "out")
    with pytest.raises(TeaError, match=r"recipe.train.max_steps \(2 then, 7 now\)"):
        compare(tiny_recipe(tmp_path, train={"max_steps": 7}), "base", tmp_path / "out")
    # Other methods may be added, and what is there stays on the page.
    compare(recipe, "tea", tmp_path / "out")
    results, _ = compare(recipe, "best-of-n", tmp_path / "out")
    assert {method.name for method in results.methods} == {"base", "best-of-n", "tea"}
    assert next(m for m in results.methods if m.name == "best-of-n").uses_reward_at_inference


def test_labels_name_what_tells_jobs_apart(tmp_path):
    recipe = tiny_recipe(tmp_path, compare={"seeds": [4, 5]})
    labels = [job.label for job in plan(recipe, parse_methods("tea,dpo-lora"), tmp_path)]
    assert labels == ["base", "tea", "tea seed 5", "dpo-lora 0.01"]
    assert os.sep not in "".join(labels)
