"""The loop that online and offline runs share: steps, evaluations, checkpoints, logs, resuming, the final head."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tea_rl.evaluation.evaluate import Evaluation, Sample
from tea_rl.evaluation.report import write_report
from tea_rl.head.checkpoint import WEIGHTS_NAME, load_weights
from tea_rl.head.compiled_terms import why_not_compiled
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import Recipe
from tea_rl.stage_clock import StageClock
from tea_rl.training.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    replace_directory,
    save_checkpoint,
    save_optimizer,
)
from tea_rl.training.manifest import BaseModelFacts, build_manifest, check_same_recipe, check_same_run
from tea_rl.training.optimization import HeadOptimizer
from tea_rl.training.plots import write_curves
from tea_rl.training.progress import Listener
from tea_rl.training.run_directory import RunDirectory
from tea_rl.training.trackers import make_tracker

#: Short steps are logged together: a sync for each would cost more than the steps.
_LOG_SECONDS = 1.0
#: A picture of the curves takes about a second.
_DRAWING_SECONDS = 20.0
_STATE_NAME = "trainer_state.json"


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        path: its folder.
        step: the last step done.
        stopped: whether a stop was asked for before the end.
        evaluation: the held-out figures of the head that was kept; None without held-out data.
        base_samples: completions of the original model (online).
        base_metrics: the original model's held-out figures (offline).
    """

    path: Path
    step: int
    stopped: bool
    evaluation: Evaluation | None
    base_samples: list[Sample] = field(default_factory=list)
    base_metrics: dict[str, float] = field(default_factory=dict)


class TrainingLoop:
    """A run from its first step to its report; what a step and an evaluation are is said by the subclass.

    A subclass calls `_prepare` at the end of its constructor, implements `_step` and `_evaluate`, and may extend the others.

    Attributes:
        total_steps: steps of the whole run.
        ended: set by a subclass when the run is over before ``total_steps``.
        last_evaluation: the newest held-out figures.
    """

    head: TeaHead
    learner: HeadOptimizer
    base: BaseModelFacts
    data_digest: str

    def __init__(self, recipe: Recipe, run: RunDirectory, listener: Listener, resume: bool) -> None:
        self.recipe, self.run, self.listener, self.resume = recipe, run, listener, resume
        if resume:
            check_same_recipe(
                run.path, recipe
            )  # once more later, with model and data; this one costs nothing
        if recipe.train.num_threads is not None:
            torch.set_num_threads(recipe.train.num_threads)
        self.checkpoint = newest_checkpoint(run.path) if resume else None
        self.total_steps = recipe.train.max_steps
        self.ended = False
        self.clock = StageClock()
        self.last_evaluation: Evaluation | None = None
        self._unwritten: list[dict[str, Any]] = []
        self._written_at = 0.0
        self._drawn = -math.inf

    def _prepare(self, head: TeaHead, learner: HeadOptimizer, base: BaseModelFacts, data_digest: str) -> None:
        self.head, self.learner, self.base, self.data_digest = head, learner, base, data_digest
        if self.recipe.train.compile:
            reason = why_not_compiled(head)
            self.listener.on_note(
                "train.compile: the first update takes some ten seconds more, two where the same was compiled before"
                if reason is None
                else f"train.compile compiles at most the products with shortlists here: {reason}"
            )
        resume_step = self.checkpoint[1] if self.checkpoint else None
        self.tracker = make_tracker(
            self.recipe.train.report_to, self.run.path, self.recipe.model_dump(), resume_step
        )

    def close(self) -> None:
        """Let go of what the run holds beside memory."""

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run_to_end(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Steps, evaluations and checkpoints until the end or a stop, then the final head, plots and page."""
        try:
            return self._run_to_end(should_stop)
        finally:
            self._flush()
            self.tracker.close()
            self.close()

    def _run_to_end(self, should_stop: Callable[[], bool]) -> TrainResult:
        train = self.recipe.train
        step = self._resume() if self.resume else self._begin()
        self.listener.on_start(step + 1, self.total_steps)
        saved = step
        if step == 0:
            with self.clock.stage("evaluation"):
                self._evaluate(0)
        stopped = should_stop()
        while step < self.total_steps and not stopped and not self.ended:
            step += 1
            with self.clock.step():
                self._step(step)
            if self._is_last(step) or step % train.eval_steps == 0:
                with self.clock.stage("evaluation"):
                    self._evaluate(step)
            stopped = should_stop()
            if self._is_last(step) or stopped or step % train.save_steps == 0:
                with self.clock.stage("save"):
                    self._save(step)
                saved = step
        if self.last_evaluation is None and not stopped:
            self._evaluate(saved, record=False)
        self._finish()
        return self._result(step, stopped and not self._is_last(step))

    def _is_last(self, step: int) -> bool:
        return self.ended or step >= self.total_steps

    def _step(self, step: int) -> None:
        """One step, logged."""
        raise NotImplementedError

    def _evaluate(self, step: int, record: bool = True) -> None:
        """Held-out evaluation after ``step``; at 0 of the original model. ``record`` off: nothing is logged."""
        raise NotImplementedError

    def _result(self, step: int, stopped: bool) -> TrainResult:
        return TrainResult(self.run.path, step, stopped, self.last_evaluation)

    def _log(self, step: int, row: dict[str, Any]) -> None:
        self._unwritten.append(row)
        if time.monotonic() - self._written_at >= _LOG_SECONDS:
            self._flush()
        self.tracker.log({name: value for name, value in row.items() if name != "step"}, step)

    def _flush(self) -> None:
        if self._unwritten:
            rows, self._unwritten = self._unwritten, []
            self.run.append_metrics(*rows)
            self._written_at = time.monotonic()

    # -- beginning, saving, resuming ----------------------------------------------------------------------------------

    def _begin(self) -> int:
        self.run.write_recipe(self.recipe.to_yaml())
        self.run.write_manifest(build_manifest(self.recipe, self.base, self.head, self.data_digest))
        return 0

    def _resume(self) -> int:
        """Restore the newest complete checkpoint and cut the logs back to it. Returns its step, 0 if there is none."""
        check_same_run(self.run.path, self.recipe, self.base, self.data_digest)
        if self.checkpoint is None:
            self.listener.on_note("no complete checkpoint yet; starting from step 0")
            self.run.truncate_after(-1)
            return self._begin()
        path, step, warnings = self.checkpoint
        for warning in warnings:
            self.listener.on_note(f"warning: {warning}")
        load_weights(self.head, path / "head" / WEIGHTS_NAME)
        load_optimizer(path, self.learner.optimizer)
        self.run.truncate_after(step)
        self._load_state(json.loads((path / _STATE_NAME).read_text(encoding="utf-8")), path)
        self.listener.on_note(f"resuming from {path}")
        return step

    def _save(self, step: int) -> None:
        self._flush()

        def write(folder: Path) -> None:
            self.head.save_pretrained(folder / "head")
            save_optimizer(folder, self.learner.optimizer)
            state = self._write_state(folder)
            (folder / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")

        save_checkpoint(self.run.path, step, write, self.recipe.train.save_total_limit)

    def _write_state(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint holds beside head and optimizer: JSON values to return, files to put into ``folder``."""
        return self.learner.state()

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `_write_state` left; the logs have been cut back already."""
        self.learner.load_state(state)

    def _draw_curves(self) -> None:
        """``curves.png`` as of now, unless it was drawn a moment ago: drawing takes longer than a small step."""
        if time.monotonic() - self._drawn > _DRAWING_SECONDS:
            write_curves(self.run.read_metrics(), self.run.path / "curves.png")
            self._drawn = time.monotonic()

    def _finish(self) -> None:
        self._flush()
        replace_directory(self.run.path / "head", self.head.save_pretrained)
        self.run.write_profile(self.clock.profile())
        write_report(self.run.path)  # draws the curves
