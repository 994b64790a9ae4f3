"""From the results of jobs to ``results.json``: the best rate of each method, all that was tried, and the settings."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import tea_rl
from tea_rl.compare.jobs import Job
from tea_rl.compare.methods import ADAPTERS, Method
from tea_rl.compare.results import (
    RESULTS_NAME,
    JobResult,
    MethodResult,
    Results,
    SeedResult,
    Status,
    Tried,
    write_json,
)
from tea_rl.compare.summary import BASE, unsound_reasons
from tea_rl.evaluation.metrics import mean
from tea_rl.recipe import Recipe
from tea_rl.recipe_compare import Guards

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "reasoning-gym",
)
#: Shares of the way from the base model's reward to the best one, where a recipe names no levels.
_LEVELS = (0.5, 0.8)
_NOT_DONE = "not done yet: run the command again to go on"


@dataclass(frozen=True)
class Request:
    """What was asked for; the arguments of `tea_rl.compare.runner.run_comparison`."""

    recipe: Recipe
    output: Path
    command: str
    max_seconds: float
    max_memory_bytes: float


def best_rate(outcomes: Sequence[JobResult], base: JobResult | None, guards: Guards) -> float | None:
    """The learning rate whose finished seeds earn most, those that hack their reward or lost diversity behind all others.

    Args:
        outcomes: of one method.
        base: the original model, which they are judged against; where it is missing, the reward alone decides.
        guards: limits of the judgement, the same as in the ranking of methods.

    Returns:
        the rate; None if none finished.
    """
    rates = {outcome.learning_rate for outcome in outcomes if outcome.result is not None}
    return max(
        rates,
        key=lambda rate: (not _unsound(outcomes, rate, base, guards), _mean_reward(outcomes, rate)),
        default=None,
    )


def write_results(request: Request, jobs: Sequence[Job], page: bool = False) -> Results:
    """Write ``results.json``, and with ``page`` the report, from what the jobs have left so far."""
    outcomes = [(job, job.outcome()) for job in jobs]
    base = next((outcome for job, outcome in outcomes if job.method.name == BASE), None)
    methods = [
        _method_result(
            method, [(job, outcome) for job, outcome in outcomes if job.method == method], base, request
        )
        for method in {job.method: None for job in jobs}
    ]
    results = Results(
        recipe=request.recipe.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=request.command,
        settings=_settings(request, methods),
        versions=_versions(),
        machine=_machine(),
        levels=sorted(request.recipe.compare.levels) or _levels(methods),
        guards=request.recipe.compare.guards,
        methods=methods,
    )
    write_json(results, request.output / RESULTS_NAME)
    if page:
        from tea_rl.compare.report import write_comparison

        write_comparison(request.output)
    return results


def _method_result(
    method: Method, own: Sequence[tuple[Job, JobResult | None]], base: JobResult | None, request: Request
) -> MethodResult:
    outcomes = [outcome or JobResult(**job.key, status="skipped", reason=_NOT_DONE) for job, outcome in own]
    rates = list(dict.fromkeys(outcome.learning_rate for outcome in outcomes))
    guards = request.recipe.compare.guards
    rate = best_rate(outcomes, base, guards)
    # Where every rate is suspect, none was passed over for it.
    suspect = [] if _unsound(outcomes, rate, base, guards) else rates
    passed_over = {other: "; ".join(_unsound(outcomes, other, base, guards)) or None for other in suspect}
    seeds = [o.result for o in outcomes if o.learning_rate == rate and o.result is not None]
    unfinished = [o for o in outcomes if o.status != "done"]
    status: Status = "done" if seeds else unfinished[0].status
    told = unfinished if not seeds else [o for o in outcomes if o.learning_rate == rate and o.reason]
    return MethodResult(
        name=method.name,
        status=status,
        reason="; ".join(_reason(o, len(outcomes) > 1) for o in told) or None,
        adapter=method.adapter,
        uses_reward_at_inference=method.name == "best-of-n",
        learning_rate=request.recipe.train.learning_rate if method.name == "tea" else rate,
        tried=[_tried(other, outcomes, passed_over.get(other)) for other in rates] if method.is_peer else [],
        seeds=seeds,
    )


def _reason(outcome: JobResult, named: bool) -> str:
    """Why a job did not finish, behind what it was, where a method has several."""
    if not named:
        return outcome.reason or outcome.status
    rate = "" if outcome.learning_rate is None else f"learning rate {outcome.learning_rate:g}, "
    return f"{rate}seed {outcome.seed}: {outcome.reason or outcome.status}"


def _unsound(
    outcomes: Sequence[JobResult], rate: float | None, base: JobResult | None, guards: Guards
) -> list[str]:
    """What speaks against a learning rate."""
    seeds = [o.result for o in outcomes if o.learning_rate == rate and o.result is not None]
    return unsound_reasons(
        seeds, [base.result] if base is not None and base.result is not None else [], guards
    )


def _tried(rate: float | None, outcomes: Sequence[JobResult], passed_over: str | None) -> Tried:
    own = [outcome for outcome in outcomes if outcome.learning_rate == rate]
    done = [outcome.result for outcome in own if outcome.result is not None]
    first = next((outcome for outcome in own if outcome.result is not None), own[0])
    return Tried(
        learning_rate=rate,
        reward=_mean_reward(own, rate) if done else None,
        seconds=mean([result.train_seconds for result in done]) if done else None,
        status=first.status,
        reason=first.reason,
        passed_over=passed_over,
    )


def _mean_reward(outcomes: Sequence[JobResult], rate: float | None) -> float:
    return mean([_reward(o.result) for o in outcomes if o.learning_rate == rate and o.result is not None])


def _reward(result: SeedResult) -> float:
    return mean(result.metrics.reward_sampled)


def _levels(methods: Sequence[MethodResult]) -> list[float]:
    """Levels between the base model's reward and the best of a policy."""
    base = [_reward(seed) for method in methods if method.name == "base" for seed in method.seeds]
    others = [_reward(seed) for m in methods if not m.uses_reward_at_inference for seed in m.seeds]
    if not base or max(others) <= base[0]:
        return []
    return [round(base[0] + share * (max(others) - base[0]), 3) for share in _LEVELS]


def _settings(request: Request, methods: Sequence[MethodResult]) -> dict[str, Any]:
    used = {method.adapter for method in methods}
    return {
        "max_seconds": request.max_seconds,
        "max_memory_gb": round(request.max_memory_bytes / 1e9, 2),
        "adapters": {name: settings for name, settings in ADAPTERS.items() if name in used},
        "recipe": request.recipe.model_dump(mode="json"),
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"tea-rl": tea_rl.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": os.environ.get("OMP_NUM_THREADS") or "torch's choice",
    }


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
