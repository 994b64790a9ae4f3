"""Progress on stderr: a bar with live figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tea_rl.cli.common import is_terminal
from tea_rl.training.progress import Listener

#: Seconds between two lines about work under way where no bar can be shown.
LINE_SECONDS = 5.0


class WorkDisplay(Listener):
    """Shows notes, and work of known size with its rate and the time left.

    Args:
        what: name of the work that `on_progress` tells of.
    """

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.what = what
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not is_terminal(),
        )
        self.work: Any = None
        self.told = 0.0

    def __enter__(self) -> WorkDisplay:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def on_note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_progress(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if self.work is None:
            # What an earlier, killed command did says nothing about this one's speed.
            self.done_before, self.work_started, self.told = done, now, now
            self.work = self.bar.add_task(self.what, total=total, completed=done, figures="")
            return
        rate = (done - self.done_before) / max(now - self.work_started, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        figures = f"{done}/{total} {unit}  {rate:.0f} {unit}/s  {duration(left)} left"
        self.bar.update(self.work, completed=done, figures=figures)
        self.tell(f"{self.what}  {figures}", now=done >= total)

    def tell(self, line: str, now: bool = False) -> None:
        """Print a line where no bar can be shown; unless ``now``, not soon after another."""
        if self.bar.disable and (now or time.monotonic() - self.told >= LINE_SECONDS):
            self.told = time.monotonic()
            self.on_note(line)


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3:05 min"``; ``"? s"`` for infinity."""
    if seconds == float("inf"):
        return "? s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
