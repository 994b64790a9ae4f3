"""What the jobs of all methods have in common: what training starts from, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tea_rl.compare.course import Budget, Course
from tea_rl.compare.jobs import CURVE_NAME
from tea_rl.compare.measure import BaseModel, evaluate_reward, measure_settings
from tea_rl.compare.results import CurvePoint
from tea_rl.evaluation.evaluate import PromptSet
from tea_rl.recipe import Recipe
from tea_rl.rewards import RewardSum

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.head.layer import TeaHead


@dataclass(frozen=True)
class Start:
    """What training starts from, the same for every method.

    Attributes:
        recipe: the comparison's.
        backbone: the loaded model.
        training, held_out: prompts.
        rewards: scores completions.
        folder: of the job.
        budget: of the job.
    """

    recipe: Recipe
    backbone: Backbone
    training: PromptSet
    held_out: PromptSet
    rewards: RewardSum
    folder: Path
    budget: Budget

    def course(self, model: Any, earlier: list[CurvePoint] | None = None) -> Course:
        """A course that evaluates ``model`` on the first held-out prompts, one completion each."""
        compare = self.recipe.compare
        prompts = self.held_out.take(range(min(compare.curve_prompts, len(self.held_out))))
        settings = measure_settings(self.recipe, self.backbone, num_generations=1)
        evaluate = partial(evaluate_reward, model, self.backbone.tokenizer, prompts, self.rewards, settings)
        return Course(evaluate, compare.curve_seconds, self.budget, self.folder / CURVE_NAME, earlier or [])


@dataclass(frozen=True)
class Trained:
    """What training leaves behind.

    Attributes:
        model: the policy, for ``generate``.
        base: the base model to compare it with, made when it is first needed; None where the model or its head knows it.
        course: of the training.
        trainable_parameters: how many.
        size_on_disk_bytes: of what is saved, without the base model.
        head: the TEA head installed in ``model``.
    """

    model: Any
    base: Callable[[], BaseModel | None]
    course: Course
    trainable_parameters: int
    size_on_disk_bytes: int
    head: TeaHead | None = None


def folder_bytes(folder: Path) -> int:
    """Size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
