"""What a training run tells while it works; the command line shows it, a library user may listen too."""

from __future__ import annotations

from typing import Any


class Listener:
    """Hears of a run's progress. The methods do nothing here; override those of interest."""

    def on_note(self, text: str) -> None:
        """A line worth telling: what is being loaded, what was skipped."""

    def on_start(self, first_step: int, max_steps: int) -> None:
        """Training begins; ``first_step`` is above 1 on resume."""

    def on_step(self, row: dict[str, Any]) -> None:
        """A step ended; ``row`` is its line of ``metrics.jsonl``."""

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation ended; ``row`` is its line of ``metrics.jsonl``."""

    def on_progress(self, done: int, total: int, unit: str) -> None:
        """Work of known size goes on, such as embedding; the first call says what was done before (a continued store)."""
