"""What the benchmarks share: alternating measurements, medians, figures, and the settings of a run of the suite."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limits import Limits

    from tea_rl import Backbone

os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: Name of our own side in every figure.
OURS = "tea_rl"
#: What `load_backbone` is told for faster rollouts on a CPU, by what figures with it are called.
VARIANTS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "w8a8, compiled": {"quantization": "w8a8", "compile": True},
}


def alternate(
    runs: dict[str, Callable[[], float]],
    repeats: int,
    warm_ups: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Call each run in turn, ``repeats`` times, after one warm-up each, and collect what they return.

    Alternating spreads the noise of a shared machine over all of them alike.

    Args:
        runs: what is measured.
        repeats: rounds.
        warm_ups: what goes before (a shorter run, say); None: the runs themselves, once.
    """
    for run in (runs if warm_ups is None else warm_ups).values():
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
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss on from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def machine() -> dict[str, Any]:
    """The machine that figures come from."""
    import torch

    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def report(name: str, figures: dict[str, Any]) -> None:
    """Print figures as one JSON object with the machine they come from."""
    print(json.dumps({"benchmark": name, **figures, "machine": machine()}, indent=2))


def median(values: list[float]) -> float:
    """Median, rounded to what the noise leaves."""
    return float(f"{statistics.median(values):.4g}")


def run_child(script: str, *arguments: str) -> dict[str, Any]:
    """What a script beside this file prints, as JSON, from a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Figure:
    """One measured quantity of ours, beside the peers and the machine's limit.

    Attributes:
        name: what was measured, unique in its stage.
        unit: a rate (``.../s``: more is better) or a cost (less is better).
        values: of every repeat, ours under `OURS` and the peers under their names.
        limit: what the machine allows ours, in the same unit; None: not computed.
        facts: numbers that go with it.
    """

    name: str
    unit: str
    values: dict[str, list[float]]
    limit: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def variant(self, name: str, values: list[float]) -> Figure:
        """The same of ours with one of `VARIANTS`, beside the same peers; no limit is stated for it."""
        return Figure(f"{self.name}, {name}", self.unit, {**self.values, OURS: values})

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit.endswith("/s")

    def times_better(self, ours: float, other: float) -> float:
        """Above 1 where ours is the better one."""
        return ours / other if self.is_rate else other / ours

    def as_dict(self) -> dict[str, Any]:
        """For JSON: medians, ratios (above 1: ours is faster) and the share of the limit."""
        medians = {name: median(values) for name, values in self.values.items()}
        ours = medians.pop(OURS)
        found: dict[str, Any] = {
            "unit": self.unit,
            OURS: ours,
            "peers": medians,
            "ratios": {name: _rounded(self.times_better(ours, value)) for name, value in medians.items()},
        }
        if self.limit is not None:
            found |= {
                "limit": _rounded(self.limit),
                "limit_share": _rounded(self.times_better(ours, self.limit)),
            }
        every = {name: [_rounded(value) for value in values] for name, values in self.values.items()}
        return {**found, **self.facts, "all": every}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass
class Setting:
    """How the suite was asked to run.

    Attributes:
        quick: fewer repeats and smaller sizes.
        model, dtype: of the backbone, as `load_backbone` takes them.
        limits: what the machine allows, measured before the first stage.
        folder: scratch space, removed afterwards.
        huge: also sizes that take many minutes and gigabytes.
    """

    quick: bool
    model: str
    dtype: str
    limits: Limits
    folder: Path
    huge: bool = False

    def pick(self, quick: Any, full: Any) -> Any:
        """One of two values."""
        return quick if self.quick else full

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone that stages share; whoever changes its modules loads one of its own."""
        from tea_rl import load_backbone

        return load_backbone(self.model, dtype=self.dtype)

    @cached_property
    def plain_backbone(self) -> Backbone:
        """The same as transformers makes it, for peers."""
        from tea_rl import load_backbone

        return load_backbone(self.model, dtype=self.dtype, plain=True)

    @cached_property
    def variant_backbones(self) -> dict[str, Backbone]:
        """The same as each of `VARIANTS` loads it."""
        from tea_rl import load_backbone

        return {
            name: load_backbone(self.model, dtype=self.dtype, **options)
            for name, options in self.variants.items()
        }

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Those of `VARIANTS` that stages also measure: in a full run on a CPU."""
        return {} if self.quick or self.backbone.device.type != "cpu" else VARIANTS

    def short_prompts(self, count: int) -> list[list[int]]:
        """Token ids of prompts of the quickstart, from the first again once they run out."""
        from tea_rl import load_recipe
        from tea_rl.training.online import prepare_prompts

        ids = prepare_prompts(load_recipe("quickstart"), self.backbone)[0].token_ids
        return [list(ids[place % len(ids)]) for place in range(count)]

    def long_prompts(self, count: int, length: int) -> list[list[int]]:
        """Prompts of ``length`` tokens of the Python language reference, no two alike."""
        ids = self.backbone.tokenizer(
            "\n".join(passages())[: 16 * count * length], add_special_tokens=False
        ).input_ids
        return [ids[start : start + length] for start in range(0, count * length, length)]


def passages() -> Sequence[str]:
    """English that every machine has: the Python language reference, which ships with Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
