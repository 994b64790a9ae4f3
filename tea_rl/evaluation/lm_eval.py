"""A model with its TEA head in the hands of ``lm-eval``, the evaluation harness: its tasks, its scores, nothing of ours.

The head is installed as the model's output layer, and the harness reads the model's logits without knowing it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.model_source import one_line

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.head.layer import TeaHead


class Tasks:
    """Tasks of the harness, found before a model is loaded.

    Args:
        names: of its tasks, groups or tags, or paths of YAML files that describe one.

    Raises:
        TeaError: if lm-eval is not installed, a task is unknown, or a file is not there.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if find_spec("lm_eval") is None:
            raise TeaError(
                'lm-eval is not installed here, and --lm-eval needs it: `pip install "tea-rl[lm-eval]"`'
            )
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        files = [name for name in names if name.endswith((".yaml", ".yml"))]
        for name in files:
            if not Path(name).is_file():
                raise TeaError(f"expected a task's file, but {name} does not exist; check the path")
        # The harness's own tasks are thousands of files, read only where one of them is asked for.
        self._manager = TaskManager(include_defaults=len(files) < len(names))
        known = set(self._manager.all_tasks)
        for name in names:
            if name not in files and name not in known:
                raise TeaError(
                    f'lm-eval has no task "{name}".{did_you_mean(name, known)} Give one of its tasks (`lm-eval ls tasks`) or the '
                    "path of a .yaml file"
                )
        self.names = list(names)

    def evaluate(
        self,
        backbone: Backbone,
        head: TeaHead,
        strengths: Sequence[float],
        *,
        limit: int | None = None,
        batch_size: int = 16,
        notify: Callable[[str], None] = lambda message: None,
    ) -> list[dict[str, Any]]:
        """Evaluate the head at each strength; it is taken out again afterwards.

        Args:
            backbone: the model.
            head: belongs to it; its strength is restored.
            strengths: 0 is the original model.
            limit: questions of each task; None for all.
            batch_size: questions read together.
            notify: hears what is done.

        Returns:
            one row for each strength, task and metric: ``strength``, ``task``, ``metric``, ``value``, ``standard_error`` (None
            where the harness gives none).

        Raises:
            TeaError: if the harness cannot load a task's data or ask its questions.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        trained_at, rows = head.strength, []
        backbone.install(head)
        head.eval()
        try:
            for strength in strengths:
                head.strength = strength
                notify(f"evaluating strength {strength:g} on {', '.join(self.names)}")
                model = HFLM(
                    pretrained=backbone.model,
                    backend="causal",
                    tokenizer=backbone.tokenizer,
                    batch_size=batch_size,
                    max_length=min(backbone.max_length, 2048),
                )
                found = simple_evaluate(
                    model=model, tasks=self.names, task_manager=self._manager, limit=limit, log_samples=False
                )
                rows += _rows(strength, found)
        except Exception as error:
            raise TeaError(
                f"lm-eval could not evaluate {', '.join(self.names)} ({one_line(error)}); check the task's data, which it may "
                "have to download"
            ) from error
        finally:
            head.strength = trained_at
            backbone.uninstall()
        return rows


def _rows(strength: float, found: Any) -> list[dict[str, Any]]:
    """The harness's ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` of each task as rows."""
    rows = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{which}")
            rows.append(
                {
                    "strength": strength,
                    "task": task,
                    "metric": metric if which == "none" else f"{metric} ({which})",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                }
            )
    return rows
