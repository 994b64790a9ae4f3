"""What a comparison tells while it works; the command line shows it, a library user may listen too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tea_rl.compare.jobs import Job
    from tea_rl.compare.results import JobResult


class Watcher:
    """Hears how a comparison goes. The methods do nothing here; override those of interest."""

    def on_jobs(self, total: int, kept: int, ends_at: float) -> None:
        """So many jobs there are; ``kept`` were done before. ``ends_at`` is in seconds of `time.time`."""

    def on_job(self, job: Job, seconds: float, continued: bool) -> None:
        """A job begins, and has so many seconds; ``continued``: it goes on training where it was."""

    def on_look(self, job: Job) -> None:
        """A job is running; called several times a second."""

    def on_outcome(self, job: Job, outcome: JobResult) -> None:
        """A job ended."""
