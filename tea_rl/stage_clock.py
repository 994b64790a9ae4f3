"""Where the time of a run goes: ``tea-rl train --profile``."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

#: What is left of a run when all stages are taken off it.
OTHER = "other"


class StageClock:
    """Seconds by stage. While it is off, a stage costs nothing and no device is waited for.

    Stages may be nested: the inner one's time is taken off the outer one's, so that all stages together take no longer than the
    run.

    Args:
        now: reads a clock in seconds.

    Attributes:
        on: whether it runs.
        wait: called at every border, so that what a GPU still does is not charged to the next stage.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.on, self.wait = False, lambda: None
        self._now = now
        self._open: list[str] = []
        self._mark = 0.0
        self._began: float | None = None
        self._total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)
        self._laps: list[dict[str, float]] = []

    def start(self) -> None:
        """Run from now on."""
        self.on, self._began = True, self._now()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Charge what happens inside to a stage."""
        return self._stage(name) if self.on else nullcontext()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Give the time since the last border to the stage that is open."""
        self.wait()
        now = self._now()
        if self._open:
            self._total[self._open[-1]] += now - self._mark
            self._lap[self._open[-1]] += now - self._mark
        self._mark = now

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of training; what happens between two of them counts for the whole run only."""
        self._lap.clear()
        yield
        if self.on:
            self._laps.append(dict(self._lap))

    def profile(self) -> dict[str, Any] | None:
        """What was measured; None if it never ran.

        Returns:
            ``seconds`` since `start`, ``steps``, and ``stages``: name, total ``seconds``, and ``seconds_a_step``, the median over
            the steps but the first, which warms up, and None for what happens between steps. The last stage is what is left.
        """
        if self._began is None:
            return None
        whole = self._now() - self._began
        laps = self._laps[1:] or self._laps
        stages: list[dict[str, Any]] = []
        for name, seconds in self._total.items():
            inside = any(name in lap for lap in self._laps)
            each = statistics.median([lap.get(name, 0.0) for lap in laps]) if inside else None
            stages.append({"name": name, "seconds": seconds, "seconds_a_step": each})
        left = whole - sum(self._total.values())
        stages.append({"name": OTHER, "seconds": max(0.0, left), "seconds_a_step": None})
        return {"seconds": whole, "steps": len(self._laps), "stages": stages}


#: For callers that measure nothing.
OFF = StageClock()
