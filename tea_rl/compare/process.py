"""One job as a process of its own, watched: its time, its memory and that of its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tea_rl.compare.jobs import LOG_NAME, MEASURING_NAME, Job
from tea_rl.compare.results import JobResult

#: Seconds between two looks at a process.
_INTERVAL = 0.25


class Stopped(Exception):
    """The user wants no more; what was running has been ended."""


def run_process(
    job: Job,
    arguments: list[str],
    train_until: float,
    kill_at: float,
    max_memory_bytes: float,
    should_stop: Callable[[], bool],
    look: Callable[[], None] = lambda: None,
) -> JobResult:
    """Run a job to its end, or end it with all its children.

    Args:
        job: begun already.
        arguments: of `tea_rl.compare.worker`, behind the folder.
        train_until: when it is ended if it still trains, in seconds of `time.time`.
        kill_at: when it is ended whatever it does: what is trained is worth measuring, also when that takes long.
        max_memory_bytes: resident size of process and children above which it is ended.
        should_stop: asked all the time; True ends it.
        look: called all the time, for whoever shows progress.

    Returns:
        what it left behind, or why it left nothing.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    command = [sys.executable, "-u", "-m", "tea_rl.compare.worker", str(job.folder), *arguments]
    command += ["--parent", str(os.getpid())]
    reason, status = None, "failed"
    with open(job.folder / LOG_NAME, "ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then decides.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                used = _resident_bytes(process.pid)
                if used > max_memory_bytes:
                    status = "memory"
                    reason = f"used {used / 1e9:.2f} GB, above the limit of {max_memory_bytes / 1e9:.2f} GB"
                    break
                is_trained = (job.folder / MEASURING_NAME).exists()
                if time.time() > (kill_at if is_trained else train_until):
                    status = "time"
                    reason = f"ended: its time was used up {'before it was measured' if is_trained else 'while it trained'}"
                    break
                if should_stop():
                    raise Stopped
                look()
                time.sleep(_INTERVAL)
        finally:
            _end(process)
    if reason is not None:
        return JobResult(**job.key, status=status, reason=reason)  # type: ignore[arg-type]
    outcome = job.outcome() if process.returncode == 0 or job.result_path.is_file() else None
    return outcome or JobResult(
        **job.key, status="failed", reason=_why(process.returncode, job.folder / LOG_NAME)
    )


def _resident_bytes(pid: int) -> int:
    """Resident size of a process and all below it; 0 when it is gone."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything below it, also what has gone into a session of its own; nothing if it has ended."""
    if process.poll() is not None:
        return
    below: list[psutil.Process] = []
    with suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with suppress(psutil.Error):
            child.kill()
    process.wait()


def _why(code: int, log: Path) -> str:
    """One line about a process that left no result."""
    if code == -signal.SIGKILL:
        return "ended by the system (signal 9), most often for want of memory"
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"{how}: {lines[-1][:300]}" if lines else how
