"""Our method's job: the online trainer of ``tea-rl train``, with the held-out curve of a comparison."""

from __future__ import annotations

from collections.abc import Callable

from tea_rl.compare.course import Course
from tea_rl.compare.trained import Start, Trained, folder_bytes
from tea_rl.recipe import Recipe
from tea_rl.training.online import OnlineTrainer
from tea_rl.training.progress import Listener
from tea_rl.training.run_directory import RunDirectory


class _TimedTrainer(OnlineTrainer):
    """An online run whose evaluations are the points of a course."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        listener: Listener,
        course_of: Callable[[_TimedTrainer], Course],
    ) -> None:
        super().__init__(recipe, run, listener, resume=False)
        self.backbone.install(self.head)
        self.course = course_of(self)

    def _evaluate(self, step: int, record: bool = True) -> None:
        if not record:
            return
        training = self.head.training
        if step == 0:
            self.course.begin()
        else:
            self.course.after_step(step, self.rewards_asked)
        point = self.course.curve[-1]
        if point.step == step:
            self._log(step, {"step": step, "eval_reward": point.reward})
        self.head.train(training)

    def _save(self, step: int) -> None:
        with self.course.paused():
            super()._save(step)


def train_tea(
    recipe: Recipe, seed: int, start_of: Callable[[OnlineTrainer], Start], run_path: str
) -> Trained:
    """Train a head as the recipe says, with another seed and the evaluations of a comparison.

    Args:
        recipe: the comparison's.
        seed: of this run.
        start_of: what the course needs to know, from the trainer that has loaded it.
        run_path: new run directory.
    """
    train = {"seed": seed, "eval_steps": 1, "save_steps": recipe.train.max_steps, "report_to": "none"}
    timed = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    with RunDirectory.create(run_path) as run:
        trainer = _TimedTrainer(
            timed, run, Listener(), lambda trainer: start_of(trainer).course(trainer.backbone.model)
        )
        course, head, backbone = trainer.course, trainer.head, trainer.backbone
        trainer.run_to_end(lambda: course.out_of_time)
        # The last step is the end, whatever the time.
        course.out_of_time &= course.steps < recipe.train.max_steps
        head.eval()
        return Trained(
            model=backbone.model,
            base=lambda: None,  # the head knows the original model
            course=course,
            trainable_parameters=sum(parameter.numel() for parameter in head.trainable_parameters()),
            size_on_disk_bytes=folder_bytes(run.path / "head"),
            head=head,
        )
