"""One job of a comparison in a process of its own: ``python -m tea_rl.compare.worker JOB_DIR [--ends-at T] [...]``.

It trains, measures, and leaves ``result.json``. Exit code 0: done. 1: failed, and the reason is in ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tea_rl.compare.course import Budget
from tea_rl.compare.jobs import MEASURING_NAME, RUN_NAME, TIMES_NAME, Job, read_job
from tea_rl.compare.results import FrontierPoint, JobResult, SeedResult, write_json
from tea_rl.errors import TeaError
from tea_rl.evaluation.metrics import mean
from tea_rl.training.files import atomic_write_text

if TYPE_CHECKING:
    from tea_rl.compare.measure import Measured, MeasureSettings
    from tea_rl.compare.trained import Start, Trained


def run_job(job: Job, budget: Budget, resume: bool = False) -> JobResult:
    """Train and measure.

    Args:
        job: what to do.
        budget: its time.
        resume: go on training from the job's checkpoint and curve, and measure again.

    Raises:
        TeaError: for what a user can mend; any other exception means that the method does not work here.
    """
    import psutil
    import torch

    from tea_rl.compare.measure import measure, measure_settings

    if job.recipe.train.num_threads is not None:
        torch.set_num_threads(job.recipe.train.num_threads)
    (job.folder / MEASURING_NAME).unlink(missing_ok=True)
    trained, start = _trained(job, budget, resume)
    (job.folder / MEASURING_NAME).touch()
    # Measuring needs the same memory whatever was trained, so training's share is read before it.
    peak = peak_memory_bytes()
    base = trained.base()
    best_of = job.recipe.rollout.num_generations if job.method.name == "best-of-n" else 1
    settings = measure_settings(job.recipe, start.backbone, best_of=best_of)
    given = (start.held_out, start.rewards, settings)
    began = time.perf_counter()
    measured = measure(trained.model, start.backbone.tokenizer, base, *given, head=trained.head, notify=print)
    seconds = time.perf_counter() - began
    frontier = _frontier(job, budget, trained, start, measured, settings) if job.is_swept else []
    if job.method.name == "base":
        total = time.time() - psutil.Process().create_time()
        times = {"total": total, "measuring": seconds, "point": trained.course.point_seconds}
        atomic_write_text(job.folder / TIMES_NAME, json.dumps(times) + "\n")
    course = trained.course
    result = SeedResult(
        seed=job.seed,
        train_seconds=course.seconds,
        peak_memory_bytes=peak if job.method.adapter is not None else peak_memory_bytes(),
        trainable_parameters=trained.trainable_parameters,
        size_on_disk_bytes=trained.size_on_disk_bytes,
        reward_calls=course.reward_calls,
        generation_tokens_per_second=measured.generation_tokens_per_second,
        curve=course.finish(mean(measured.metrics.reward_sampled)),
        metrics=measured.metrics,
        samples=measured.samples,
        frontier=frontier,
    )
    reason = None
    if course.out_of_time:
        reason = f"trained until its time was used up: {course.steps} steps in {course.seconds:.0f} s"
    return JobResult(**job.key, status="done", reason=reason, result=result)


def _trained(job: Job, budget: Budget, resume: bool) -> tuple[Trained, Start]:
    """Load and train."""
    from tea_rl.backbone import load_backbone
    from tea_rl.compare.trained import Start, Trained
    from tea_rl.rewards import load_rewards
    from tea_rl.training.online import OnlineTrainer, prepare_prompts

    if job.method.name == "tea":
        from tea_rl.compare.tea import train_tea

        made: list[Start] = []

        def start_of(trainer: OnlineTrainer) -> Start:
            prompts = (trainer.training_prompts, trainer.held_out)
            made.append(Start(job.recipe, trainer.backbone, *prompts, trainer.rewards, job.folder, budget))
            return made[0]

        return train_tea(job.recipe, job.seed, start_of, str(job.folder / RUN_NAME)), made[0]
    rewards = load_rewards(job.recipe.rewards, job.recipe.base_dir)
    # What TRL and PEFT change must be plain.
    backbone = load_backbone(**job.recipe.model.model_dump(), plain=job.method.is_peer, notify=print)
    start = Start(job.recipe, backbone, *prepare_prompts(job.recipe, backbone), rewards, job.folder, budget)
    if job.method.is_peer:
        from tea_rl.compare.peers import train_peer

        outcome = job.outcome() if resume else None
        earlier = outcome.result.curve if outcome is not None and outcome.result is not None else []
        return train_peer(job, start, earlier), start
    course = start.course(backbone.model)
    course.begin()
    return Trained(backbone.model, lambda: None, course, 0, 0), start


def _frontier(
    job: Job, budget: Budget, trained: Trained, start: Start, measured: Measured, settings: MeasureSettings
) -> list[FrontierPoint]:
    """Reward and KL along the strengths.

    What was just measured is the point at the head's own strength, and the base model's job has measured strength 0, so that
    even without time for more there is a line to read.
    """
    from tea_rl.compare.measure import measure_frontier

    head, kl = trained.head, measured.metrics.kl
    if head is None or kl is None:
        return []
    known = [FrontierPoint(strength=head.strength, reward=mean(measured.metrics.reward_sampled), kl=kl.value)]
    original = job.base_outcome()
    if original is not None and original.result is not None:
        reward = mean(original.result.metrics.reward_sampled)
        known.append(FrontierPoint(strength=0.0, reward=reward, kl=0.0))
    return measure_frontier(
        head,
        trained.model,
        start.backbone.tokenizer,
        start.held_out,
        start.rewards,
        settings,
        job.recipe.compare.strengths,
        known,
        lambda seconds: time.time() + seconds < budget.ends_at,
    )


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def last_error_line(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())
    if isinstance(error, TeaError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(arguments: list[str] | None = None, run: Callable[..., JobResult] = run_job) -> int:
    """Do the job in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ends-at", type=float, default=float("inf"))
    parser.add_argument("--measuring", type=float)
    parser.add_argument("--point", type=float)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--parent", type=int)
    args = parser.parse_args(arguments)
    if args.parent is not None:
        _end_with(args.parent)
    job = read_job(args.folder)
    try:
        outcome = run(job, Budget(args.ends_at, args.measuring, args.point), args.resume)
    except Exception as error:
        traceback.print_exc()
        if not args.resume:  # what was measured before is still true
            write_json(JobResult(**job.key, status="failed", reason=last_error_line(error)), job.result_path)
        return 1
    write_json(outcome, job.result_path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
