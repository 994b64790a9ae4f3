"""The course of a training run: its clock, which stands still while something is evaluated, and its curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tea_rl.compare.results import CurvePoint
from tea_rl.training.files import append_jsonl

#: What measuring takes beyond the estimate: a share, and seconds for saving.
_MARGIN, _SAVING_SECONDS = 1.15, 3.0
#: Seconds of training between two points of the curve, at least, for every second that a point takes.
_POINT_SPACING = 2.5
#: Where nothing is known yet, measuring takes so many times the time of a point of the curve.
_POINTS = 10.0


@dataclass(frozen=True)
class Budget:
    """The time of a job.

    Attributes:
        ends_at: when it must have been measured, in seconds of `time.time`; infinite where there is no limit.
        measuring: seconds that measuring will take this job, by what it took the base model; None before that is known.
        point: seconds that a point of the curve took it.
    """

    ends_at: float = float("inf")
    measuring: float | None = None
    point: float | None = None


class Course:
    """Counts seconds of training, evaluates at regular ones of them, and says when to stop.

    Args:
        evaluate: held-out reward of the policy as it is now.
        every: least seconds of training between two evaluations; more where these are slow, so that they take a third of the
            time at most.
        budget: of the whole job.
        path: file that gets a line for every point, for whoever watches.
        earlier: the curve so far, of a run that is continued.
    """

    def __init__(
        self,
        evaluate: Callable[[], float],
        every: float,
        budget: Budget,
        path: Path,
        earlier: Sequence[CurvePoint] = (),
    ) -> None:
        self._evaluate, self._every, self._budget, self._path = evaluate, every, budget, path
        self.curve = list(earlier)
        self.steps = self.curve[-1].step if self.curve else 0
        self.reward_calls = self.curve[-1].reward_calls if self.curve else 0
        self.out_of_time = False
        self.point_seconds = 0.0
        self._spent = self.curve[-1].seconds if self.curve else 0.0
        self._since: float | None = None
        self._trained = self._spent
        self._longest = 0.0

    @property
    def seconds(self) -> float:
        """Training so far, up to the newest step."""
        return self._trained

    def begin(self) -> None:
        """Evaluate the untrained policy, unless this continues a run; then start the clock."""
        if not self.curve:
            self._add_point()
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still."""
        running = self._since is not None
        if self._since is not None:
            self._spent += time.perf_counter() - self._since
        self._since = None
        try:
            yield
        finally:
            self._since = time.perf_counter() if running else None

    def add_seconds(self, seconds: float) -> None:
        """Count time that was spent elsewhere: on rollouts that several jobs share."""
        self._spent += seconds
        self._trained += seconds

    def after_step(self, step: int, reward_calls: int) -> bool:
        """Take note of a step; evaluate where it is time for it. Returns whether training should stop."""
        with self.paused():
            self._longest = max(self._spent - self._trained, 0.8 * self._longest)
            self._trained, self.steps, self.reward_calls = self._spent, step, reward_calls
            if self._no_time_for(self._longest):
                self.out_of_time = True
            elif self._trained - self.curve[-1].seconds >= max(
                self._every, _POINT_SPACING * self.point_seconds
            ):
                self._add_point()
                self.out_of_time = self._no_time_for(self._longest)
        return self.out_of_time

    def finish(self, reward: float) -> list[CurvePoint]:
        """The whole curve; its last point is what the finished policy was measured at."""
        if self.curve[-1].step < self.steps:
            self._note(
                CurvePoint(
                    seconds=self._trained, step=self.steps, reward_calls=self.reward_calls, reward=reward
                )
            )
        return self.curve

    def _no_time_for(self, seconds: float) -> bool:
        """Whether what is left does not suffice for so much training and the measuring."""
        budget = self._budget
        if budget.measuring is None or not budget.point:
            measuring = _POINTS * self.point_seconds
        else:  # an adapter makes the model slower than the base model
            measuring = budget.measuring * max(1.0, self.point_seconds / budget.point)
        return time.time() + seconds + _MARGIN * measuring + _SAVING_SECONDS > budget.ends_at

    def _add_point(self) -> None:
        started = time.perf_counter()
        reward = self._evaluate()
        self.point_seconds = time.perf_counter() - started
        self._note(
            CurvePoint(seconds=self._trained, step=self.steps, reward_calls=self.reward_calls, reward=reward)
        )

    def _note(self, point: CurvePoint) -> None:
        self.curve.append(point)
        append_jsonl(self._path, [json.loads(point.model_dump_json())])
