"""Rewards in worker processes: what they compute, and what becomes of workers that hang, die or are left behind."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

import tea_rl.rewards.workers as workers_module
from tea_rl.errors import TeaError
from tea_rl.recipe import RewardSpec
from tea_rl.rewards import RewardWorkers, load_rewards

#: Seconds after which a test gives up waiting for something that takes a moment.
PATIENCE = 120.0

REWARDS = """
import os, random, subprocess, sys, time
from pathlib import Path

def distinct(prompts, completions, answer, bonus=0):
    'How many different completions a prompt has in this call; None without an answer.'
    texts = {p: {c for q, c in zip(prompts, completions) if q == p} for p in prompts}
    return [None if a is None else len(texts[p]) + bonus for p, a in zip(prompts, answer)]

def process(prompts, completions):
    return [os.getpid()] * len(prompts)

def modules(prompts, completions):
    return [float("torch" in sys.modules)] * len(prompts)

def draw(prompts, completions):
    import numpy
    return [random.random() + numpy.random.random() for _ in prompts]

def act(prompts, completions, folder="."):
    for text in completions:
        if text == "hang":
            child = subprocess.Popen(["sleep", "100000"])
            Path(folder, "child.part").write_text(str(child.pid))
            Path(folder, "child.part").rename(Path(folder, "child"))
            child.wait()
        if text == "exit":
            os._exit(3)
        if text == "orphan":  # its child keeps everything open that it had open itself
            if os.fork():
                os._exit(4)
            time.sleep(100000)
        if text == "raise":
            raise ValueError("no such word")
    return [len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards")
    (path / "mine.py").write_text(REWARDS)
    return path


def mine(*functions, **kwargs):
    return [RewardSpec(name=f"mine.py:{function}", kwargs=kwargs) for function in functions]


def values(batch, name):
    return batch.terms[name]


def alive(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition):
    """Wait for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def three(folder):
    """Three workers with rewards that behave; what they have notified must stay empty."""
    notes = []
    specs = [RewardSpec(name="length", weight=0.5, kwargs={"target": 3}), *mine("distinct", bonus=2)]
    specs += mine("process", "modules", "draw", "act")
    specs[2:] = [spec.model_copy(update={"weight": 0.0}) for spec in specs[2:]]
    with RewardWorkers(specs, folder, 3, None, notes.append) as workers:
        yield workers
    assert notes == []


PROMPTS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4
TEXTS = [" ".join(["word", "more"][i % 2] for _ in range(i % 5)) for i in range(16)]
ANSWERS = {"answer": ["x"] * 15 + [None], "unused": [{"any": i} for i in range(16)]}


def test_workers_score_as_one_process_does(three, folder):
    specs = [
        RewardSpec(name="length", weight=0.5, kwargs={"target": 3}),
        *mine("distinct", bonus=2),
        *mine("act"),
    ]
    here = load_rewards([*specs[:2], specs[2].model_copy(update={"weight": 0.0})], folder)(
        PROMPTS, TEXTS, ANSWERS
    )
    there = three(PROMPTS, TEXTS, ANSWERS)
    assert three.names == ["length", "distinct", "process", "modules", "draw", "act"]
    assert there.total == here.total
    assert {name: there.terms[name] for name in here.terms} == here.terms
    assert values(there, "distinct")[-1] is None


def test_completions_of_a_prompt_stay_together(three):
    batch = three(PROMPTS, TEXTS, ANSWERS)
    processes = values(batch, "process")
    assert len(set(processes)) == 3 and os.getpid() not in processes
    assert all(len(set(processes[start : start + 4])) == 1 for start in range(0, 16, 4))
    one_prompt = three(["a"] * 16, TEXTS, ANSWERS)
    assert len(set(values(one_prompt, "process"))) == 1
    assert three([], []).total == []


def test_a_worker_does_without_torch(three):
    assert set(values(three(PROMPTS, TEXTS, ANSWERS), "modules")) == {0.0}


def test_what_a_reward_draws_depends_on_seed_and_row_alone(three, folder):
    def draws(workers, *seed):
        return values(workers.submit(PROMPTS, TEXTS, ANSWERS, seed=seed).result(), "draw")

    first = draws(three, 7, 1)
    assert draws(three, 7, 2) != first and draws(three, 7, 1) == first
    assert first[:4] != first[4:8]  # each slice has its own
    with RewardWorkers(mine("draw"), folder, 1, None, pytest.fail) as one:
        alone = draws(one, 7, 1)
        assert draws(one, 7, 2) != alone and draws(one, 7, 1) == alone
    assert alone[:4] == first[:4]  # both begin with row 0


def test_one_batch_at_a_time(three):
    pending = three.submit(PROMPTS, TEXTS, ANSWERS)
    with pytest.raises(RuntimeError, match="one batch at a time"):
        three.submit(PROMPTS, TEXTS, ANSWERS)
    first = pending.result()
    assert pending.result() == first
    assert three(PROMPTS, TEXTS, ANSWERS).terms["act"] == first.terms["act"]


def test_mistakes_are_told_in_the_same_words(three, folder):
    texts = ["raise", *TEXTS[1:]]
    with pytest.raises(TeaError) as here:
        load_rewards(mine("act"), folder)(PROMPTS[:4], texts[:4])
    with pytest.raises(TeaError) as there:
        three(PROMPTS, texts, ANSWERS)
    assert str(there.value) == str(here.value) and "ValueError: no such word (mine.py line" in str(here.value)
    with pytest.raises(TeaError, match='its parameter "answer" is neither'):
        three(PROMPTS, TEXTS)
    with pytest.raises(TeaError, match='Did you mean "sentiment"'):
        RewardWorkers([RewardSpec(name="sentimnt")], folder, 1, None, pytest.fail)
    assert len(three(PROMPTS, TEXTS, ANSWERS).total) == 16


class Unreadable:
    """A value that is packed here and cannot be unpacked elsewhere."""

    def __reduce__(self):
        return int, ("not a number",)


def test_columns_that_cannot_be_sent_are_named(three, folder):
    # Only the last worker's rows hold one: the others must not have begun.
    answers = {**ANSWERS, "lock": [None] * 15 + [threading.Lock()]}
    with pytest.raises(TeaError, match='data column "lock" to hold plain values .* TypeError') as caught:
        three(PROMPTS, TEXTS, answers)
    assert "\n" not in str(caught.value)
    with pytest.raises(TeaError, match="can read, got ValueError: invalid literal"):
        three(PROMPTS, TEXTS, {**ANSWERS, "odd": [None] * 15 + [Unreadable()]})
    with pytest.raises(TeaError, match='settings of "mine.py:act" to hold plain values'):
        RewardWorkers(mine("act", folder=threading.Lock()), folder, 1, None, pytest.fail)
    assert len(three(PROMPTS, TEXTS, ANSWERS).total) == 16


def test_ctrl_c_is_the_parents_business(three):
    before = values(three(PROMPTS, TEXTS, ANSWERS), "process")
    for pid in set(before):
        os.kill(int(pid), signal.SIGINT)
    assert values(three(PROMPTS, TEXTS, ANSWERS), "process") == before


def test_workers_that_hang_or_die_cost_their_rows_only(folder, tmp_path):
    notes, prompts, fine = [], ["a", "a", "b", "b"], ["x", "yy", "x", "yy"]
    specs = [*mine("act", folder=str(tmp_path)), *mine("process")]
    with RewardWorkers(specs, folder, 2, 2.0, notes.append) as workers:
        before = values(workers(prompts, fine), "process")

        batch = workers(prompts, ["x", "yy", "x", "hang"])
        assert values(batch, "act") == [1.0, 2.0, None, None] and values(batch, "process")[3] is None
        assert batch.total[:2] == [1.0 + before[0], 2.0 + before[0]] and all(map(math.isnan, batch.total[2:]))
        assert notes == [
            "no rewards for rows 2 to 3 of a batch: their worker took longer than 2 s; a new one takes its place."
        ]
        until(lambda: not alive(before[2]) and not alive((tmp_path / "child").read_text()))

        again = workers(prompts, fine)
        assert values(again, "act") == [1.0, 2.0, 1.0, 2.0]
        assert values(again, "process")[0] == before[0] and values(again, "process")[2] != before[2]

        batch = workers(prompts, ["exit", "yy", "x", "yy"])
        assert values(batch, "act") == [None, None, 1.0, 2.0]
        assert len(notes) == 2 and "rows 0 to 1" in notes[1] and "ended with code 3" in notes[1]

        batch = workers(prompts, ["x", "yy", "x", "orphan"])
        assert values(batch, "act") == [1.0, 2.0, None, None]
        assert len(notes) == 3 and "ended with code 4" in notes[2]
        again = workers(prompts, fine)

        # A worker that dies between batches is replaced before it is given rows. A process looks dead before all of its
        # threads are, so the kernel is asked to wait; macOS cannot.
        if hasattr(os, "waitid"):
            pid = int(values(again, "process")[2])
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert values(workers(prompts, fine), "act") == [1.0, 2.0, 1.0, 2.0]


def test_batches_without_any_reward_end_in_an_error_and_close_ends_all(folder, tmp_path, monkeypatch):
    notes = []
    workers = RewardWorkers(
        [*mine("act", folder=str(tmp_path)), *mine("process")], folder, 2, 2.0, notes.append
    )
    monkeypatch.setattr(workers_module, "_PATIENCE", 2)
    assert all(map(math.isnan, workers(["a", "b"], ["exit", "hang"]).total))
    assert workers(["a", "b"], ["x", "x"]).total  # a batch that is scored begins the count anew
    assert all(map(math.isnan, workers(["a", "b"], ["exit", "hang"]).total))
    with pytest.raises(TeaError) as caught:
        workers(["a", "b"], ["exit", "hang"])
    assert str(caught.value) == (
        "expected rewards for 2 completions, got none, 2 times in a row: every worker ended with code 3 or took longer than 2 s; mend the "
        "reward, or see that the memory is enough; raise rollout.reward_timeout, now 2 s, or mend the reward."
    )
    assert len(notes) == 6
    processes = values(workers(["a", "b"], ["x", "x"]), "process")

    (tmp_path / "child").unlink()
    pending = workers.submit(["a", "b"], ["x", "hang"])
    until((tmp_path / "child").exists)
    workers.close()
    workers.close()
    assert not any(map(alive, processes))
    until(lambda: not alive((tmp_path / "child").read_text()))
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(["a"], ["x"])


def test_workers_do_not_outlive_a_killed_parent(folder, tmp_path):
    # No main guard, which starting workers must not need; one is busy and one idle when the parent is killed.
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from tea_rl.recipe import RewardSpec
            from tea_rl.rewards import RewardWorkers
            specs = [RewardSpec(name="mine.py:act", kwargs={{"folder": {str(tmp_path)!r}}})]
            specs += [RewardSpec(name="mine.py:process")]
            workers = RewardWorkers(specs, {str(folder)!r}, 2, None, print)
            print(*workers(["a", "b"], ["x", "y"]).terms["process"], flush=True)
            workers.submit(["a", "b"], ["x", "hang"]).result()
            """
        )
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        processes = [float(pid) for pid in parent.stdout.readline().split()]
        until((tmp_path / "child").exists)
        assert len(processes) == 2 and all(map(alive, processes))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    until(lambda: not any(map(alive, [*processes, (tmp_path / "child").read_text()])))
