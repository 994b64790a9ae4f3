"""What the two kinds of online runs share: the learner, and samples of the original model beside those of the trained head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tea_rl.backbone import Backbone, load_backbone
from tea_rl.evaluation.evaluate import Evaluation, Sample
from tea_rl.head.layer import TeaHead
from tea_rl.training.guard import reason_to_stop
from tea_rl.training.learner import Learner
from tea_rl.training.loop import TrainingLoop, TrainResult
from tea_rl.training.manifest import BaseModelFacts

#: Samples are kept up to so many characters; episodes of many turns can be long.
_SHOWN = 4000


class GeneratingLoop(TrainingLoop):
    """An online run: it generates with the backbone, and shows what is generated.

    Attributes:
        learner_class: what makes an update of a rollout.
        backbone: the frozen model, after `_load_backbone`.
        base_samples: completions of the original model.
    """

    learner: Learner
    learner_class: type[Learner] = Learner
    backbone: Backbone

    def _load_backbone(self) -> None:
        self.listener.on_note(f"loading {self.recipe.model.name_or_path}")
        self.backbone = load_backbone(**self.recipe.model.model_dump(), notify=self.listener.on_note)
        if self.recipe.model.compile:
            self.listener.on_note(
                "the first rollout waits for the compiler (model.compile): some ten seconds"
            )
        if self.backbone.device.type in ("cuda", "mps"):  # untested: no such machine has run this yet
            self.clock.wait = getattr(torch, self.backbone.device.type).synchronize
        self.base_samples: list[Sample] = []
        self.base_figures: dict[str, float] = {}

    def _begin_learning(self, data_digest: str) -> None:
        """Make head and learner; the last thing a constructor does."""
        recipe = self.recipe
        head = TeaHead.for_backbone(self.backbone, recipe.head, seed=recipe.train.seed)
        if recipe.model.compile:
            head.use_compiler()  # before anything is written, whether there is one
        learner = self.learner_class(
            head,
            recipe.objective,
            recipe.anchor,
            recipe.train,
            recipe.rollout.temperature,
            recipe.train.max_steps,
        )
        self._prepare(head, learner, BaseModelFacts.of_backbone(self.backbone), data_digest)

    def _record(self, step: int, row: dict[str, Any], result: Evaluation) -> None:
        """Log an evaluation with its samples, draw the curves anew, and end the run where a guard says so."""
        if step == 0:
            self.base_figures = row
        reason = reason_to_stop(self.recipe.train.stop_when, row, self.base_figures) if step else None
        if reason is not None:
            self.ended, row["stopped"] = True, 1.0
            self.listener.on_note(f"stopped after step {step}: {reason}")
        self._log(step, row)
        self.run.append_samples(
            [
                {
                    "step": step,
                    "prompt": base.prompt,
                    "base": base.completion[:_SHOWN],
                    "trained": trained.completion[:_SHOWN],
                    "base_reward": base.reward,
                    "trained_reward": trained.reward,
                    **self._more_of_samples(base, trained),
                }
                for base, trained in zip(self.base_samples, result.samples, strict=False)
            ]
        )
        self._flush()
        self._draw_curves()

    def _write_state(self, folder: Path) -> dict[str, Any]:
        return {**super()._write_state(folder), "ended": self.ended}

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        super()._load_state(state, folder)
        self.ended = state.get("ended", False)
        rows = self.run.read_metrics()
        self.base_figures = next((row for row in rows if row["step"] == 0 and "eval_reward" in row), {})
        rows = [row for row in self.run.read_samples() if row["step"] == 0]
        rows = rows[: self.recipe.train.sample_prompts]  # a second set is that of an imitating head
        self.base_samples = [self._stored_base_sample(row) for row in rows]

    def _more_of_samples(self, base: Sample, trained: Sample) -> dict[str, Any]:
        """What else a line of the samples holds."""
        return {}

    def _stored_base_sample(self, row: dict[str, Any]) -> Sample:
        """The original model's side of a line of the samples."""
        return Sample(row["prompt"], row["base"], row["base_reward"])

    def _result(self, step: int, stopped: bool) -> TrainResult:
        return TrainResult(self.run.path, step, stopped, self.last_evaluation, self.base_samples)
