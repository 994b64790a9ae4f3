"""The folder of a run: who may write there, and its recipe, manifest, metrics and samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from tea_rl.errors import TeaError
from tea_rl.training.files import (
    append_jsonl,
    atomic_write_bytes,
    atomic_write_text,
    disk_errors,
    iterate_jsonl,
    read_jsonl,
    remove_stale_temporaries,
    take_lock,
)

RECIPE_NAME = "recipe.yaml"
MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"
CURVES_NAME = "curves.png"
REPORT_NAME = "report.html"
PROFILE_NAME = "profile.json"
LOCK_NAME = "run.lock"


class RunDirectory:
    """A run's folder, held by one process until :meth:`close` (or the end of the process).

    Make one with :meth:`create`. Every write is durable when the method returns; a write the disk refuses is a
    :class:`TeaError` and leaves the file as it was.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(cls, path: str | Path, resume: bool = False) -> RunDirectory:
        """Make or re-open a run's folder and lock it.

        Args:
            path: the folder; its parents are made.
            resume: continue the run in there, instead of starting one.

        Raises:
            TeaError: if another process writes there, a run is there and ``resume`` is off, none is there and
                ``resume`` is on, or the folder cannot be made.
        """
        path = Path(path)
        advice = "choose another folder with --output"
        if path.exists() and not path.is_dir():
            raise TeaError(f"expected a folder for the run, but {path} is a file; {advice}")
        # A run killed before its recipe was written has only the lock; resuming it begins at the beginning.
        if resume and not (has_run(path) or (path / LOCK_NAME).is_file()):
            raise TeaError(
                f"nothing to resume: {path} holds no run; give the folder of one, or leave out --resume"
            )
        was_begun = (path / LOCK_NAME).is_file()
        with disk_errors(f"make the run folder {path}", "try again, or " + advice):
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path / LOCK_NAME)
        others = sorted(item.name for item in path.iterdir() if item.name != LOCK_NAME)
        if not resume and others:
            os.close(lock)
            if has_run(path):
                raise TeaError(f"{path} already holds a run; continue it with --resume, or {advice}")
            if was_begun:  # killed while it was embedding: what is there is worth keeping
                raise TeaError(
                    f"{path} holds a run that ended before its first step; continue it with --resume, or {advice}"
                )
            (path / LOCK_NAME).unlink()
            raise TeaError(
                f"expected a new or empty folder for the run, but {path} holds {others[0]}; {advice}"
            )
        remove_stale_temporaries(path)
        return cls(path, lock)

    @property
    def recipe_path(self) -> Path:
        """``recipe.yaml``, the resolved recipe."""
        return self.path / RECIPE_NAME

    @property
    def manifest_path(self) -> Path:
        """``manifest.json``: versions, seeds, digests."""
        return self.path / MANIFEST_NAME

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``, one line a step or evaluation."""
        return self.path / METRICS_NAME

    @property
    def samples_path(self) -> Path:
        """``samples.jsonl``, base and trained completions of fixed prompts."""
        return self.path / SAMPLES_NAME

    def write_recipe(self, yaml_text: str) -> None:
        """Write ``recipe.yaml``; from then on the folder holds a run."""
        with disk_errors(f"write {self.recipe_path}"):
            atomic_write_text(self.recipe_path, yaml_text)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write ``manifest.json``."""
        with disk_errors(f"write {self.manifest_path}"):
            atomic_write_text(self.manifest_path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def write_profile(self, profile: dict[str, Any] | None) -> None:
        """Write ``profile.json``: where the time went since the run was last started; None: that is not known (any more)."""
        path = self.path / PROFILE_NAME
        with disk_errors(f"write {path}"):
            if profile is None:
                path.unlink(missing_ok=True)
                return
            atomic_write_text(path, json.dumps(profile, indent=2) + "\n")

    def append_metrics(self, *rows: dict[str, Any]) -> None:
        """Append lines to ``metrics.jsonl``; NaN is written as NaN."""
        with disk_errors(f"write {self.metrics_path}"):
            append_jsonl(self.metrics_path, rows)

    def append_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append lines to ``samples.jsonl``."""
        with disk_errors(f"write {self.samples_path}"):
            append_jsonl(self.samples_path, rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a torn line is passed over."""
        return read_jsonl(self.metrics_path)

    def read_samples(self) -> list[dict[str, Any]]:
        """Rows of ``samples.jsonl``; a torn line is passed over."""
        return read_jsonl(self.samples_path)

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after ``step``, and a line a crash has torn; other lines keep their bytes.

        A run that resumes from a checkpoint logs those steps again.
        """
        for path in (self.metrics_path, self.samples_path):
            if not path.is_file():
                continue
            with disk_errors(f"shorten {path}"):
                old = path.read_bytes()
                new = b"".join(line for line, row in iterate_jsonl(old) if row.get("step", 0) <= step)
                if new != old:
                    atomic_write_bytes(path, new)

    def close(self) -> None:
        """Let other processes use the folder. Can be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unused = error is not None and [item.name for item in self.path.iterdir()] == [LOCK_NAME]
        if unused:  # failed before anything was written: leave no empty run behind
            (self.path / LOCK_NAME).unlink()
            self.path.rmdir()
        self.close()


def has_run(path: str | Path) -> bool:
    """Whether a run was started in the folder."""
    return (Path(path) / RECIPE_NAME).is_file()
