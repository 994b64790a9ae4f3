"""A whole comparison: which jobs, in which order, for how long; what is done already is kept."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tea_rl.compare.assemble import Request, best_rate, write_results
from tea_rl.compare.jobs import CHECKPOINT_NAME, TIMES_NAME, Job, plan, read_jobs
from tea_rl.compare.methods import Method, check_recipe
from tea_rl.compare.process import Stopped, run_process
from tea_rl.compare.results import Results, write_json
from tea_rl.compare.watcher import Watcher
from tea_rl.errors import TeaError
from tea_rl.recipe import Recipe
from tea_rl.training.files import disk_errors, take_lock

LOCK_NAME = "compare.lock"
#: What loading and measuring takes, in seconds, where the base model's job does not tell.
_FIXED_SECONDS = 30.0
#: What measuring takes beside what it takes of the base model: a peer's samples go through two models, not one, and a point of
#: the frontier is sampling and one pass.
_PEER_MEASURING, _SWEEP_POINT = 1.25, 0.65
#: Of a head that was just trained; measuring it is a point of the frontier.
_TRAINED_STRENGTH = 1.0
#: Loading the peers' trainers, in seconds beyond loading the model.
_PEER_LOADING_SECONDS = 8.0
#: Ours ends by itself, so it may take this share of all training if it needs it; what it leaves goes to the peers.
_OUR_SHARE = 0.5
#: What a seed of ours may take beyond what the one before it took.
_NEED = 1.3
#: How far beyond the whole time a job may run: the command keeps its limit within 10 %.
_OVERTIME = 1.06
#: What a job may train beyond one and a half times its share, in seconds: it stops by itself, but only between two steps.
_SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class _Fixed:
    """What the base model's job took, in seconds: all of it, measuring, a point of the curve."""

    total: float = _FIXED_SECONDS
    measuring: float | None = None
    point: float | None = None


def run_comparison(
    recipe: Recipe,
    methods: Sequence[Method],
    output: Path,
    *,
    max_seconds: float,
    max_memory_bytes: float,
    command: str,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Results, bool]:
    """Run what is not done yet, and write ``results.json`` after every job and the page in the end.

    Args:
        recipe: of all methods; its group ``compare`` says at which rates and with which seeds.
        methods: what to compare; the base model is always among it.
        output: the comparison's folder; what it holds of the same comparison is kept.
        max_seconds: for the whole of it, kept within 10 %.
        max_memory_bytes: resident size at which a job is ended.
        command: how it was asked for.
        watcher: hears of progress.
        should_stop: asked all the time; True ends the job under way.

    Returns:
        the results, and whether it was stopped.

    Raises:
        TeaError: a recipe that does not fit, or a folder that holds something else.
    """
    check_recipe(recipe, methods)
    jobs = plan(recipe, methods, output)
    _check_output(output, jobs)
    with disk_errors(f"make the folder {output}", "choose another one with --output"):
        output.mkdir(parents=True, exist_ok=True)
        lock = take_lock(output / LOCK_NAME)
    request = Request(recipe, output, command, max_seconds, max_memory_bytes)
    try:
        run = _Run(request, jobs, watcher or Watcher(), should_stop)
        stopped = run.run()
        return write_results(request, run.jobs, page=True), stopped
    finally:
        os.close(lock)


class _Run:
    """One call of `run_comparison`."""

    def __init__(
        self, request: Request, jobs: list[Job], watcher: Watcher, should_stop: Callable[[], bool]
    ) -> None:
        self.request, self.watcher, self.should_stop = request, watcher, should_stop
        self.planned = jobs
        folders = {job.folder for job in jobs}
        #: Those of this command, and what an earlier one did in the same folder.
        others = [job for job in read_jobs(request.output) if job.folder not in folders and job.outcome()]
        self.jobs = [*jobs, *others]
        self.started = time.time()
        self.ends_at = self.started + request.max_seconds

    def run(self) -> bool:
        """Do the jobs; returns whether it was stopped."""
        waiting = [job for job in self.planned if not _is_done(job)]
        self.watcher.on_jobs(len(self.planned), len(self.planned) - len(waiting), self.ends_at)
        try:
            while waiting:
                job = waiting.pop(0)
                seconds = self._share(job, [job, *waiting])
                if seconds is None:
                    break
                job.begin()
                self._do(job, seconds)
            else:
                self._continue_best()
        except Stopped:
            return True
        return False

    def _share(self, job: Job, waiting: Sequence[Job]) -> float | None:
        """Seconds for a job; None if there are too few left to begin it.

        What loading and measuring takes is set aside for all; the rest is divided by the methods' costs. Trainers that go on
        for as long as there is time try their rates on one half of it, and the best one gets the other half. Ours comes
        first and has a number of steps: it gets what it needs for them.
        """
        left, fixed = self.ends_at - time.time(), self._fixed().total
        if left < 0.7 * fixed:
            return None
        grids = {
            other.method: sum(rival.method == other.method for rival in self.planned)
            for other in self.planned
            if other.method.is_endless
        }
        reserve = sum(method.cost * count for method, count in grids.items() if count > 1)
        aside = sum(map(self._aside, waiting))
        aside += sum(self._aside(rival) for rival in self._firsts() if grids.get(rival.method, 0) > 1)
        costs = sum(other.method.cost for other in waiting) + reserve
        if job.method.name == "base":
            return left
        pool = max(0.0, left - aside)
        training = pool * job.method.cost / costs
        if job.method.name == "tea":
            ours = sum(other.method == job.method for other in waiting)
            training = min(max(training, _OUR_SHARE * pool / ours), self._need(job.method))
        return min(left, self._aside(job) + training)

    def _aside(self, job: Job) -> float:
        """Seconds of a job that are not training: loading, and measuring what was trained."""
        fixed = self._fixed()
        loading = _PEER_LOADING_SECONDS if job.method.is_peer else 0.0
        return fixed.total + loading + self._measuring(job) - (fixed.measuring or 0.0)

    def _measuring(self, job: Job) -> float:
        """Seconds that measuring a job will take; 0 before the base model's is known."""
        measuring = self._fixed().measuring or 0.0
        swept = {*job.recipe.compare.strengths} - {0.0, _TRAINED_STRENGTH} if job.is_swept else ()
        return measuring * ((_PEER_MEASURING if job.method.is_peer else 1.0) + _SWEEP_POINT * len(swept))

    def _need(self, method: Method) -> float:
        """Seconds of training and of points on the way that a seed needs, by one that was not cut; infinite before that."""
        found = [outcome for job in self.planned if job.method == method and (outcome := job.outcome())]
        whole = [outcome.result for outcome in found if outcome.result is not None and outcome.reason is None]
        point = self._fixed().point or 0.0
        return max(
            (_NEED * (seed.train_seconds + point * len(seed.curve)) for seed in whole), default=math.inf
        )

    def _firsts(self) -> list[Job]:
        """The first job of each method."""
        return list({job.method: job for job in reversed(self.planned)}.values())

    def _continue_best(self) -> None:
        """Give the time that is left to the best rate of each method that could use more."""
        best = [
            job for method in {job.method: None for job in self.planned} for job in self._to_continue(method)
        ]
        while best:
            left, aside = self.ends_at - time.time(), sum(map(self._aside, best))
            training = (left - aside) * best[0].method.cost / sum(job.method.cost for job in best)
            job = best.pop(0)
            if training > 0.5 * self._aside(job):
                self._do(job, self._aside(job) + training, continued=True)
        for job in self.planned:
            _remove_checkpoint(job)

    def _to_continue(self, method: Method) -> list[Job]:
        """Jobs of a method's best rate whose time was used up."""
        own = [(job, outcome) for job in self.planned if job.method == method and (outcome := job.outcome())]
        rate = best_rate(
            [outcome for _, outcome in own], self.planned[0].outcome(), self.request.recipe.compare.guards
        )
        return [
            job for job, _ in own if job.learning_rate == rate and (job.folder / CHECKPOINT_NAME).is_dir()
        ]

    def _do(self, job: Job, seconds: float, continued: bool = False) -> None:
        now, fixed = time.time(), self._fixed()
        self.watcher.on_job(job, seconds, continued)
        arguments = [f"--ends-at={now + seconds}"] + (["--resume"] if continued else [])
        for name, value in (("measuring", self._measuring(job) or None), ("point", fixed.point)):
            arguments += [] if value is None else [f"--{name}={value}"]
        kill_at = self.started + _OVERTIME * self.request.max_seconds
        before = job.outcome()
        outcome = run_process(
            job,
            arguments,
            min(kill_at, now + 1.5 * seconds + _SLACK_SECONDS),
            kill_at,
            self.request.max_memory_bytes,
            self.should_stop,
            lambda: self.watcher.on_look(job),
        )
        if outcome.status != "done" and continued and before is not None:
            outcome = before  # what was measured before is still true
        write_json(outcome, job.result_path)
        self.watcher.on_outcome(job, outcome)
        write_results(self.request, self.jobs)

    def _fixed(self) -> _Fixed:
        path = self.planned[0].folder / TIMES_NAME
        try:
            return _Fixed(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _Fixed()


def _is_done(job: Job) -> bool:
    outcome = job.outcome()
    return outcome is not None and outcome.status == "done"


def _remove_checkpoint(job: Job) -> None:
    import shutil

    shutil.rmtree(job.folder / CHECKPOINT_NAME, ignore_errors=True)


def _check_output(output: Path, jobs: Sequence[Job]) -> None:
    """Refuse a folder that holds something else than this comparison.

    Raises:
        TeaError: naming what is there, or which setting differs.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise TeaError(
            f"expected a folder for the comparison, but {output} is a file; choose another one with --output"
        )
    others = sorted(item.name for item in output.iterdir() if item.name != LOCK_NAME)
    if others and not (output / "jobs").is_dir():
        raise TeaError(
            f"expected a new folder or that of a comparison, but {output} holds {others[0]}; choose another one with --output"
        )
    for job in jobs:
        job.check_same()
