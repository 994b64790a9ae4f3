"""Metrics to TensorBoard, Trackio or Weights & Biases, through the trackers of ``accelerate``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tea_rl.errors import TeaError, did_you_mean

NAMES = ("none", "tensorboard", "trackio", "wandb")
_PROJECT = "tea-rl"


class Tracker(Protocol):
    """Where metrics go beside ``metrics.jsonl``."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record the numbers in ``values`` for a step."""

    def close(self) -> None:
        """Flush and end. Can be called twice."""


class _NoTracker:
    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _AccelerateTracker:
    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, values: dict[str, Any], step: int) -> None:
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._tracker.log(numbers, step=step)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.finish()


def make_tracker(
    report_to: str, run_path: str | Path, config: Mapping[str, Any], resume_step: int | None = None
) -> Tracker:
    """Start the tracker a recipe asks for.

    Args:
        report_to: ``none``, ``tensorboard`` (files in ``<run>/tensorboard``), ``trackio`` or ``wandb``.
        run_path: the run's folder; its name is the name of the run.
        config: the resolved recipe, shown beside the curves.
        resume_step: step the run resumes from; TensorBoard drops what was logged after it.

    Raises:
        TeaError: for an unknown name, a package that is not installed, a tracker that does not start.
    """
    if report_to not in NAMES:
        names = ", ".join(NAMES)
        raise TeaError(
            f'expected train.report_to: {names}; got "{report_to}".{did_you_mean(report_to, NAMES)}'
        )
    if report_to == "none":
        return _NoTracker()
    if importlib.util.find_spec(report_to) is None:
        raise TeaError(
            f'train.report_to is "{report_to}", whose package is not installed; '
            f'pip install "tea-rl[{report_to}]", or set train.report_to=none'
        )
    from accelerate import PartialState

    PartialState()  # accelerate's trackers log through it
    try:
        return _AccelerateTracker(_start(report_to, Path(run_path), config, resume_step))
    except Exception as error:  # each service has its own errors: no network, no login, no folder
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TeaError(
            f"{report_to} did not start ({first}); mend that, or set train.report_to=none"
        ) from error


def _start(report_to: str, run_path: Path, config: Mapping[str, Any], resume_step: int | None) -> Any:
    from accelerate import tracking

    if report_to == "tensorboard":
        purge = {} if resume_step is None else {"purge_step": resume_step + 1}
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=str(run_path), **purge)
        tracker.start()
        # Accelerate's own way to keep the settings adds a folder named by the clock at every start.
        tracker.tracker.add_text("recipe", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", 0)
        return tracker
    if report_to == "trackio":
        tracker = tracking.TrackioTracker(_PROJECT, name=run_path.name)
    else:
        tracker = tracking.WandBTracker(_PROJECT, name=run_path.name, dir=str(run_path))
    tracker.start()
    tracker.store_init_configuration(json.loads(json.dumps(config, default=str)))
    return tracker
