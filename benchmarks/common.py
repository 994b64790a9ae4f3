"""What the benchmarks share: alternating measurements, medians and the JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def alternate(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each run in turn, ``repeats`` times, after one warm-up each, and collect what they return.

    Alternating spreads the noise of a shared machine over all of them alike.
    """
    for run in runs.values():
        run()
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(name: str, figures: dict[str, Any]) -> None:
    """Print figures as one JSON object with the machine they come from."""
    import torch

    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": name, **figures, "machine": machine}, indent=2))


def median(values: list[float]) -> float:
    """Median, rounded to what the noise leaves."""
    return float(f"{statistics.median(values):.4g}")
