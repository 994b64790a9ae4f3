"""Rewards in worker processes: slow ones are computed while the next batch decodes, and one that hangs can be ended.

Workers are fresh interpreters that load the reward functions and nothing else. `multiprocessing.Process` would run the
user's main script in every one of them again, with torch and all, and fail where that script has no main guard.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from tea_rl.errors import TeaError
from tea_rl.rewards.loader import RewardBatch, load_rewards
from tea_rl.rewards.serving import GRACE, Task

if TYPE_CHECKING:
    from tea_rl.recipe import RewardSpec

#: Seconds between two looks at processes whose pipe is silent: one that died may have left its pipe to a child.
_INTERVAL = 1.0
#: Batches in a row without a single reward that are put up with.
_PATIENCE = 3
#: What a worker runs. It finds modules where this process finds them.
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from tea_rl.rewards.serving import serve; serve(int(sys.argv[1]))"


class RewardWorkers:
    """Reward functions in worker processes; a context manager that ends them.

    A batch is cut into at most ``workers`` slices, and each worker calls the rewards with one slice. Completions of a prompt
    that stand together stay together, so that a reward may compare them; one that compares all texts of a call, as
    ``echo`` does, sees those of its slice.

    Args:
        specs: name, weight and kwargs of each term.
        base_dir: folder against which relative files are resolved.
        workers: number of processes, at least 1.
        timeout: seconds a worker may take for its slice, from when it begins; ``None`` for no limit. Starting up is not
            counted.
        notify: hears one line whenever a worker was lost.

    Raises:
        TeaError: as `load_rewards`, which runs here first; also for settings that cannot be sent to another process.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        base_dir: Path | str,
        workers: int,
        timeout: float | None,
        notify: Callable[[str], None],
    ) -> None:
        if workers < 1:
            raise ValueError(f"expected at least 1 worker, got {workers}")
        #: Labels of the terms, as they appear in ``reward/<name>``.
        self.names = load_rewards(specs, base_dir).names
        self._timeout, self._notify = timeout, notify
        # Plain copies of the specs: to open a recipe's own, a worker would import pydantic, half its start-up time. An
        # absolute folder: a worker that takes another's place must find the files if this process has moved.
        plain = [SimpleNamespace(name=spec.name, weight=spec.weight, kwargs=spec.kwargs) for spec in specs]
        setup = (plain, Path(base_dir).absolute())
        self._setup = _packed(setup, {f'the settings of "{spec.name}"': spec.kwargs for spec in specs})
        #: Batches in a row of which no row was scored.
        self.silent = 0
        self._pending: PendingRewards | None = None
        self._workers = [_Worker(self._setup) for _ in range(workers)]

    def submit(
        self,
        prompts: list[str],
        completions: list[str],
        columns: Mapping[str, list[Any]] | None = None,
        seed: Sequence[int] = (0,),
    ) -> PendingRewards:
        """Have the workers score completions; returns at once.

        Args:
            prompts, completions: texts, one a row; the completions of a prompt next to each other.
            columns: further data columns, one value a row each.
            seed: whole numbers from 0. With a slice's first row they seed `random`, `numpy.random` and torch (if a reward's
                file imports it), so that what rewards draw depends on the number of workers, but not on timing.

        Raises:
            TeaError: if a column cannot be sent to another process.
            RuntimeError: if the result of the batch before was not asked for, or after `close`.
        """
        if self._pending is not None or not self._workers:
            raise RuntimeError("one batch at a time: call result() first" if self._workers else "closed")
        columns = columns or {}
        for name, values in (("completions", completions), *columns.items()):
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(values)} values of {name}")
        slices = _slices(prompts, len(self._workers))
        tasks = []
        for rows in slices:
            part = {name: values[rows.start : rows.stop] for name, values in columns.items()}
            task = Task(
                prompts[rows.start : rows.stop],
                completions[rows.start : rows.stop],
                part,
                (*seed, rows.start),
            )
            # All are packed before the first is sent: a batch goes out whole or not at all.
            tasks.append(
                _packed(task, {f'the data column "{name}"': values for name, values in part.items()})
            )
        for index, packed in enumerate(tasks):
            if self._workers[index].process.poll() is not None:  # died idle: no row need be lost
                self._replace(index, 0.0)
            self._workers[index].send(packed)
        calls = [_Call(index, rows) for index, rows in enumerate(slices)]
        self._pending = PendingRewards(self, calls)
        return self._pending

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        columns: Mapping[str, list[Any]] | None = None,
        seed: Sequence[int] = (0,),
    ) -> RewardBatch:
        """Score completions and wait for it: ``submit(...).result()``."""
        return self.submit(prompts, completions, columns, seed=seed).result()

    def close(self) -> None:
        """End all workers, and what they have started; a batch they are busy with is dropped."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.pipe.close()  # all of them hear of it before the first is waited for
        for worker in workers:
            worker.end(0.0 if self._pending else GRACE)
        self._pending = None

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, pending: PendingRewards) -> None:
        """Wait until every call has come to its end."""
        while running := [call for call in pending.calls if call.outcome is None]:
            if self._pending is not pending:
                raise RuntimeError("the workers were closed before they had scored this batch")
            self._hear(running)
        if self._pending is pending:
            self._pending = None

    def _hear(self, running: Sequence[_Call]) -> None:
        """Wait for a message of a worker, its death or the end of its time, whichever is first."""
        left = [
            call.begun + self._timeout - time.monotonic() for call in running if call.begun and self._timeout
        ]
        ready = wait([self._workers[call.worker].pipe for call in running], max(0.0, min([_INTERVAL, *left])))
        for call in running:
            worker = self._workers[call.worker]
            if worker.pipe in ready:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    self._lose(call, None)
                    continue
                if kind == "begun":
                    call.begun = value
                else:
                    call.outcome = TeaError(value) if kind == "failed" else value
            elif call.begun and self._timeout and time.monotonic() > call.begun + self._timeout:
                self._lose(call, self._timeout)
            elif worker.process.poll() is not None and not worker.pipe.poll():
                self._lose(call, None)

    def _lose(self, call: _Call, timeout: float | None) -> None:
        """Give up a call whose worker died or, with ``timeout``, took too long."""
        code = self._replace(call.worker, GRACE if timeout is None else 0.0)
        if timeout is not None:
            why = f"took longer than {timeout:g} s"
            call.outcome = _Lost(why, f"raise rollout.reward_timeout, now {timeout:g} s, or mend the reward")
        else:
            killed = " (most often for want of memory)" if code == -signal.SIGKILL else ""
            why = f"died by signal {-code}{killed}" if code < 0 else f"ended with code {code}"
            call.outcome = _Lost(why, "mend the reward, or see that the memory is enough")
        rows = f"rows {call.rows.start} to {call.rows.stop - 1}"
        self._notify(f"no rewards for {rows} of a batch: their worker {why}; a new one takes its place.")

    def _replace(self, index: int, grace: float) -> int:
        code = self._workers[index].end(grace)
        self._workers[index] = _Worker(self._setup)
        return code


class PendingRewards:
    """A batch that the workers score; made by `RewardWorkers.submit`."""

    def __init__(self, workers: RewardWorkers, calls: Sequence[_Call]) -> None:
        self.workers, self.calls = workers, calls
        self._counted = False

    def result(self) -> RewardBatch:
        """Wait for the rewards; a second call returns them again.

        Rows whose worker took too long or died are not scored: their total is NaN and their terms are ``None``. A slow answer
        that has arrived when this is called counts all the same.

        Raises:
            TeaError: what a reward function did wrong, as `RewardSum` words it (rows counted from the slice's first); or if
                this is one of several batches in a row of which no row was scored.
            RuntimeError: if the workers were closed before.
        """
        self.workers._collect(self)
        size = self.calls[-1].rows.stop if self.calls else 0
        total: list[float] = [math.nan] * size
        terms: dict[str, list[float | None]] = {name: [None] * size for name in self.workers.names}
        lost: list[_Lost] = []
        for call in self.calls:
            if isinstance(call.outcome, TeaError):
                raise call.outcome
            if isinstance(call.outcome, RewardBatch):
                place = slice(call.rows.start, call.rows.stop)
                total[place] = call.outcome.total
                for name, values in call.outcome.terms.items():
                    terms[name][place] = values
            elif call.outcome is not None:
                lost.append(call.outcome)
        silent = bool(lost) and len(lost) == len(self.calls)
        if not self._counted:  # a second call returns the same again
            self._counted = True
            self.workers.silent = self.workers.silent + 1 if silent else 0
        if silent and self.workers.silent >= _PATIENCE:
            why, advice = (dict.fromkeys(words) for words in zip(*lost, strict=True))
            raise TeaError(
                f"expected rewards for {size} completions, got none, {_PATIENCE} times in a row: every worker {' or '.join(why)}; "
                f"{'; '.join(advice)}."
            )
        return RewardBatch(total, terms)


class _Lost(NamedTuple):
    """Why a call came to nothing, and what to do about it."""

    why: str
    advice: str


@dataclass
class _Call:
    """A slice of a batch on its way; ``begun`` is the worker's `time.monotonic`, which is the same in all processes."""

    worker: int
    rows: range
    begun: float | None = None
    outcome: RewardBatch | TeaError | _Lost | None = None


class _Worker:
    """A process and this end of the pipe to it."""

    def __init__(self, setup: bytes) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            # A session of its own: Ctrl-C reaches the parent alone, and what rewards start can be ended with the worker.
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(descriptor), *map(str, sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                    start_new_session=True,
                )
            except OSError as error:
                raise TeaError(
                    f"a process for rewards could not be started ({error.strerror}); lower rollout.reward_workers"
                ) from error
        self.send(setup)

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # it is dead, which whoever waits for its answer finds out
            self.pipe.send_bytes(message)

    def end(self, grace: float) -> int:
        """End the process and its children, killing them after ``grace`` seconds; returns its exit code."""
        self.pipe.close()
        if grace:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        with suppress(
            ProcessLookupError, PermissionError
        ):  # nobody left; macOS says so of those that have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _slices(prompts: Sequence[str], most: int) -> list[range]:
    """Cut rows into at most ``most`` parts of about one size, only where the prompt changes.

    >>> _slices(["a", "a", "b", "b", "c"], 2)
    [range(0, 2), range(2, 5)]
    """
    size = len(prompts)
    changes = [row for row in range(size + 1) if row in (0, size) or prompts[row] != prompts[row - 1]]
    cuts = {min(changes, key=lambda row: abs(row - size * part / most)) for part in range(most + 1)}
    ordered = sorted(cuts)
    return [range(*ends) for ends in zip(ordered[:-1], ordered[1:], strict=True)]


def _packed(message: Any, parts: Mapping[str, Any]) -> bytes:
    """A message as the pipe carries it; refuses one that cannot be, naming the part at fault."""
    try:
        return bytes(ForkingPickler.dumps(message))
    except Exception:  # whatever a value's own way of being packed raises
        for name, part in parts.items():
            try:
                ForkingPickler.dumps(part)
            except Exception as error:
                raise TeaError(
                    f"expected {name} to hold plain values that can be sent to a reward worker, got "
                    f"{type(error).__name__}: {' '.join(str(error).split())}; use numbers and texts."
                ) from error
        raise
