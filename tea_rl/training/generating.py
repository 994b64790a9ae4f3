"""What the two kinds of online runs share: the learner, and samples of the original model beside those of the trained head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tea_rl.backbone import Backbone, load_backbone
from tea_rl.evaluation.evaluate import Evaluation, Sample
from tea_rl.head.layer import TeaHead
from tea_rl.training.learner import Learner
from tea_rl.training.loop import TrainingLoop, TrainResult
from tea_rl.training.manifest import BaseModelFacts
from tea_rl.training.plots import write_curves

#: Samples are kept up to so many characters; episodes of many turns can be long.
_SHOWN = 4000


class GeneratingLoop(TrainingLoop):
    """An online run: it generates with the backbone, and shows what is generated.

    Attributes:
        backbone: the frozen model, after `_load_backbone`.
        base_samples: completions of the original model.
    """

    learner: Learner
    backbone: Backbone

    def _load_backbone(self) -> None:
        self.listener.on_note(f"loading {self.recipe.model.name_or_path}")
        self.backbone = load_backbone(**self.recipe.model.model_dump(), notify=self.listener.on_note)
        self.base_samples: list[Sample] = []

    def _begin_learning(self, data_digest: str) -> None:
        """Make head and learner; the last thing a constructor does."""
        recipe = self.recipe
        head = TeaHead.for_backbone(self.backbone, recipe.head, seed=recipe.train.seed)
        learner = Learner(
            head,
            recipe.objective,
            recipe.anchor,
            recipe.train,
            recipe.rollout.temperature,
            recipe.train.max_steps,
        )
        self._prepare(head, learner, BaseModelFacts.of_backbone(self.backbone), data_digest)

    def _record(self, step: int, row: dict[str, Any], result: Evaluation) -> None:
        """Log an evaluation with its samples, and draw the curves anew."""
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
                }
                for base, trained in zip(self.base_samples, result.samples, strict=False)
            ]
        )
        self._flush()
        write_curves(self.run.read_metrics(), self.run.path / "curves.png")

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        super()._load_state(state, folder)
        rows = [row for row in self.run.read_samples() if row["step"] == 0]
        rows = rows[: self.recipe.train.sample_prompts]  # a second set is that of an imitating head
        self.base_samples = [Sample(row["prompt"], row["base"], row["base_reward"]) for row in rows]

    def _result(self, step: int, stopped: bool) -> TrainResult:
        return TrainResult(self.run.path, step, stopped, self.last_evaluation, self.base_samples)
