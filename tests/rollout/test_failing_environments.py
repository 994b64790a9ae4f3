"""An environment that raises, hangs or answers nonsense loses its own episode and no other."""

import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from episode_envs import Ragged, play, starts, trained_head

from tea_rl.errors import TeaError
from tea_rl.rollout import environments

NAN = float("nan")


class Broken(Ragged):
    """Start 2 goes wrong in its second step."""

    answer = None

    def step(self, action):
        if self.index == 2 and self.turn == 1:
            return self.go_wrong(super().step(action))
        return super().step(action)

    def go_wrong(self, answer):
        raise ValueError("lost\nits way")


def replacing(place, value):
    class Replacing(Broken):
        def go_wrong(self, answer):
            return (*answer[:place], value, *answer[place + 1 :])

    return Replacing


class Leaving(Broken):
    def go_wrong(self, answer):
        sys.exit(3)


class Short(Broken):
    def go_wrong(self, answer):
        return answer[:4]


class NoTuple(Broken):
    def go_wrong(self, answer):
        return answer[0]


class BadReset(Ragged):
    def reset(self, **kwargs):
        text, info = super().reset(**kwargs)
        if self.index == 2:
            raise RuntimeError("no start 2")
        return text, info


class ResetWithoutInfo(Ragged):
    def reset(self, **kwargs):
        text, info = super().reset(**kwargs)
        return text if self.index == 2 else (text, info)


class Silent(Ragged):
    def reset(self, **kwargs):
        text, info = super().reset(**kwargs)
        return b"bytes" if self.index == 2 else text, info


FAULTS = {
    "raises": (Broken, "ValueError: lost its way"),
    "exits": (Leaving, "SystemExit: 3"),
    "nan": (replacing(1, NAN), "the reward must be finite, got nan"),
    "infinite": (replacing(1, -math.inf), "the reward must be finite, got -inf"),
    "no number": (replacing(1, None), "the reward must be a number, got NoneType"),
    "no text": (replacing(0, 7), "the observation must be text, got int"),
    "no tokens": (replacing(0, "\ud800"), "what it says cannot be tokenised"),
    "no dictionary": (replacing(4, []), "info must be a dictionary, got list"),
    "no flag": (replacing(2, np.zeros(2)), 'terminated, truncated and info["invalid"] must be true or false'),
    "short": (Short, "step() must return (text, reward, terminated, truncated, info), got 4 values"),
    "no tuple": (NoTuple, "step() must return (text, reward, terminated, truncated, info), got str"),
    "reset raises": (BadReset, "RuntimeError: no start 2"),
    "reset without info": (ResetWithoutInfo, "reset() must return (text, info), got str"),
    "reset without text": (Silent, "the observation must be text, got bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_episode(backbones, fault):
    backbone = backbones("llama")
    head = trained_head(backbone)
    broken, reason = FAULTS[fault]
    batch = play(backbone, head, broken, which=starts(4, 2), num_parallel=3)
    whole = play(backbone, head, Ragged, which=starts(4, 2), num_parallel=3)
    assert batch.num_failed == 2
    for number, (episode, right) in enumerate(zip(batch.episodes, whole.episodes, strict=True)):
        turns = [n for n, turn in enumerate(batch.turns) if turn.episode == number]
        if episode.start.index == 2:
            assert episode.failed.startswith(reason)
            assert "\n" not in episode.failed
            assert math.isnan(episode.total_reward)
            assert not episode.terminated
            assert not episode.truncated
            assert len(turns) == episode.length == (0 if "reset" in fault else 2)
            assert not any(turn in turns for turn in batch.tokens.rows.tolist())
        else:
            assert episode.failed is None
            assert (episode.token_ids, episode.total_reward) == (right.token_ids, right.total_reward)
            assert set(turns) <= set(batch.tokens.rows.tolist())


def test_an_environment_that_hangs(backbones):
    release = threading.Event()

    class Hanging(Broken):
        def go_wrong(self, answer):
            release.wait(60)
            return answer

    backbone = backbones("llama")
    started = time.monotonic()
    batch = play(
        backbone,
        trained_head(backbone),
        Hanging,
        which=starts(4, 1),
        num_parallel=2,
        step_timeout=0.3,
    )
    release.set()
    assert [episode.failed for episode in batch.episodes] == [
        None,
        None,
        "no answer within 0.3 seconds",
        None,
    ]
    assert time.monotonic() - started < 30


def test_a_hanging_environment_does_not_keep_the_interpreter(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
        from tea_rl.rollout.environments import Seat, close, collect
        from episode_envs import Ragged

        class Hanging(Ragged):
            def step(self, action):
                time.sleep(600)

        seat = Seat(Hanging)
        seat.reset(0)
        assert collect([seat], 10.0)[0].failed is None
        seat.step("x")
        print(collect([seat], 0.2)[0].failed)
        close([seat], 0.1)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "no answer within 0.2 seconds\n"), done.stderr


def test_environments_that_wait_for_one_another_are_not_late(backbones):
    """Six resets one after another take longer than the patience with a single one."""
    one_at_a_time = threading.Lock()

    class Queueing(Ragged):
        def reset(self, **kwargs):
            with one_at_a_time:
                time.sleep(0.3)
            return super().reset(**kwargs)

    backbone = backbones("llama")
    batch = play(
        backbone, trained_head(backbone), Queueing, which=starts(6, 1), num_parallel=6, step_timeout=1.2
    )
    assert [episode.failed for episode in batch.episodes] == [None] * 6


def test_slow_environments_overlap(backbones):
    """All of them are in their step at the same time, or none would ever answer."""
    together = threading.Barrier(4)

    class Waiting(Ragged):
        def step(self, action):
            together.wait(20)
            return super().step(action)[0], 1.0, True, False, {}

    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone), Waiting, which=starts(4, 1), num_parallel=4)
    assert batch.num_failed == 0


def test_environments_are_used_again_and_closed(backbones):
    made, closed = [], []

    class Counted(Broken):
        def __init__(self):
            made.append(self)
            self.thread = threading.get_ident()

        def reset(self, **kwargs):
            assert threading.get_ident() == self.thread
            return super().reset(**kwargs)

        def close(self):
            closed.append(self)

    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone), Counted, which=starts(6, 2), num_parallel=3)
    assert batch.num_failed == 2
    assert len(made) == 3 + 2
    deadline = time.monotonic() + 10
    while len(closed) < len(made) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {id(env) for env in closed} == {id(env) for env in made}


def test_an_environment_that_cannot_be_made(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    count = []

    def sometimes():
        count.append(1)
        if len(count) == 2:
            raise OSError("no server")
        return Ragged()

    batch = play(backbone, head, sometimes, which=starts(3, 1))
    assert [episode.failed for episode in batch.episodes] == [
        None,
        "the environment cannot be made: OSError: no server",
        None,
    ]

    def mistaken():
        raise TeaError("no environment of that name")

    with pytest.raises(TeaError, match="no environment of that name"):
        play(backbone, head, mistaken)


def test_making_an_environment_has_an_end():
    release = threading.Event()

    def never():
        release.wait(60)

    with pytest.raises(TimeoutError, match="not there after 0.2 seconds"):
        environments.Seat(never, patience=0.2)
    release.set()


def test_what_the_environment_understood_is_recorded(backbones):
    class Parsing(Ragged):
        def step(self, action):
            answer = super().step(action)
            return (*answer[:4], {**answer[4], "parsed": None if self.turn == 1 else self.turn})

    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone), Parsing, which=starts(2, 1))
    assert [turn.parsed for turn in batch.turns if turn.turn < 2] == [None, "2"] * 2


def test_a_suspended_process_does_not_lose_its_environments(monkeypatch):
    """Patience is counted in waits and not by the clock, which runs on while a process is stopped."""
    real = environments.wait

    def suspended(futures, timeout):
        time.sleep(0.3)  # as if stopped during the wait
        return real(futures, timeout=0)

    class Slow(Ragged):
        def step(self, action):
            time.sleep(0.5)
            return super().step(action)

    monkeypatch.setattr(environments, "wait", suspended)
    seat = environments.Seat(Slow)
    seat.reset(0)
    assert environments.collect([seat], 0.3)[0].failed is None
    seat.step("x")
    assert environments.collect([seat], 0.3)[0].failed is None
