"""``tea-rl compare``: our method and the peers' own trainers on the same model, prompts, rewards and budget."""

from __future__ import annotations

import json
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import JsonOption, SetOption, note
from tea_rl.cli.progress import WorkDisplay, duration
from tea_rl.cli.train import StopOnSignal
from tea_rl.compare.watcher import Watcher
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.compare.jobs import Job
    from tea_rl.compare.methods import Method
    from tea_rl.compare.results import JobResult, MethodResult, Results

#: Share of the machine's free memory that a job may take where no limit is given.
_MEMORY_SHARE = 0.9
#: Seconds between two looks at the curve of the job under way.
_LOOK_SECONDS = 2.0


MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        help="base, best-of-n, tea, full-dpo, and grpo, rloo, dpo, kto or sft with -lora, -ia3, -prompt-tuning, "
        "-prefix-tuning or -p-tuning.",
    ),
]
SecondsOption = Annotated[
    float, typer.Option("--max-seconds", min=1, help="Time for the whole comparison, kept within 10 %.")
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--max-memory-gb",
        min=0,
        help="A method that needs more is ended; by default 90 % of what the machine has free.",
    ),
]
SeedsOption = Annotated[
    str | None,
    typer.Option("--seeds", help="Seeds of our method, such as 0,1,2; the recipe's by default."),
]
RatesOption = Annotated[
    str | None,
    typer.Option(
        "--learning-rates",
        help="Learning rates that every peer tries, such as 1e-4,1e-3; the recipe's by default.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Folder; what it holds of the same comparison is kept. By default runs/compare-<recipe>.",
    ),
]


def compare(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe with prompts (quickstart) or a YAML file.")],
    methods: MethodsOption = "base,tea,grpo-lora,dpo-lora,sft-lora",
    max_seconds: SecondsOption = 2400,
    max_memory_gb: MemoryOption = None,
    seeds: SeedsOption = None,
    learning_rates: RatesOption = None,
    output: OutputOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare training methods on equal terms: same model, prompts, rewards and sampling, each in a process of its own.

    Run it again to go on: finished jobs are kept.

    Example: [bold]tea-rl compare quickstart --methods base,tea,grpo-lora --max-seconds 1200[/bold]
    """
    from tea_rl.compare.methods import check_recipe, parse_methods
    from tea_rl.recipe import load_recipe

    chosen = parse_methods(methods)
    loaded = load_recipe(recipe, overrides or [])
    if seeds is not None:
        loaded.compare.seeds = _seeds(seeds)
    if learning_rates is not None:
        rates = _rates(learning_rates)
        loaded.compare.learning_rates = {
            method.adapter: rates for method in chosen if method.is_peer and method.adapter is not None
        }
    check_recipe(loaded, chosen)
    _check_installed(chosen)
    from tea_rl.rewards import load_rewards

    load_rewards(loaded.rewards, loaded.base_dir)  # a mistake in them shows before anything is started
    output = output or Path("runs") / f"compare-{loaded.name}"
    options = {
        "--methods": methods,
        "--output": output,
        "--max-seconds": f"{max_seconds:g}",
        "--max-memory-gb": max_memory_gb,
        "--seeds": seeds,
        "--learning-rates": learning_rates,
    }
    again = _command(recipe, options, overrides or [])
    from tea_rl.compare.runner import run_comparison

    display = _Display()
    with _StopAtOnce() as stop, display:
        results, stopped = run_comparison(
            loaded,
            chosen,
            output,
            max_seconds=max_seconds,
            max_memory_bytes=_memory_limit(max_memory_gb),
            command=again,
            watcher=display,
            should_stop=stop,
        )
    if as_json:
        typer.echo(results.model_dump_json(indent=2))
    else:
        _print_results(results)
        typer.echo(f"report:   {output / 'report.html'}")
        typer.echo(f"results:  {output / 'results.json'}")
    if stopped:
        note(f"stopped; finished jobs are kept; go on with: {again}")
        raise typer.Exit(130)


def _command(recipe: str, options: dict[str, Any], overrides: list[str]) -> str:
    """The command line, to be typed again."""
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    more = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["tea-rl", "compare", recipe, *given, *more])


def _seeds(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0 or len(set(values)) < len(values):
        raise TeaError(
            f'--seeds takes different whole numbers from 0 up, separated by commas, such as 0,1,2; got "{text}"'
        )
    return values


def _rates(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < 100 for value in values):
        raise TeaError(
            f'--learning-rates takes numbers above 0 separated by commas, such as 1e-4,1e-3; got "{text}"'
        )
    return values


def _check_installed(methods: list[Method]) -> None:
    """Refuse peers whose own code is missing, before anything is loaded."""
    missing = [name for name in ("trl", "peft") if find_spec(name) is None]
    peers = [method.name for method in methods if method.is_peer]
    if missing and peers:
        raise TeaError(
            f'{peers[0]} needs {" and ".join(missing)}, not installed here: `pip install "tea-rl[compare]"`, or leave it out '
            "of --methods"
        )


def _memory_limit(gigabytes: float | None) -> float:
    import psutil

    return _MEMORY_SHARE * psutil.virtual_memory().available if gigabytes is None else gigabytes * 1e9


class _StopAtOnce(StopOnSignal):
    """Ctrl-C ends the job under way: it could take minutes, and none of it is lost but this job's own work."""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        note("stopping: the job under way is ended")


class _Display(WorkDisplay, Watcher):
    """A bar over the jobs with the time left, and a line for every job."""

    def __init__(self) -> None:
        super().__init__("jobs")
        self.looked = 0.0
        self.ends_at = 0.0

    def on_jobs(self, total: int, kept: int, ends_at: float) -> None:
        self.ends_at, self.total, self.done = ends_at, total, kept
        self.task = self.bar.add_task("jobs", total=total, completed=kept, figures="")
        if kept:
            self.on_note(f"{kept} of {total} jobs are done already")

    def on_job(self, job: Job, seconds: float, continued: bool) -> None:
        how = "goes on for" if continued else "has"
        self.on_note(f"{job.label}: {how} {duration(seconds)}")
        self._show(job, "")

    def on_look(self, job: Job) -> None:
        if time.monotonic() - self.looked < _LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        self._show(job, _newest_point(job))

    def on_outcome(self, job: Job, outcome: JobResult) -> None:
        self.done = min(self.total, self.done + 1)
        self.bar.update(self.task, completed=self.done)
        if outcome.result is None:
            self.on_note(f"{job.label}: {outcome.status} ({outcome.reason})")
            return
        rewards = outcome.result.metrics.reward_sampled
        self.on_note(
            f"{job.label}: reward {sum(rewards) / len(rewards):+.3f} after {duration(outcome.result.train_seconds)} of training"
            + (f" ({outcome.reason})" if outcome.reason else "")
        )

    def _show(self, job: Job, point: str) -> None:
        left = duration(max(0.0, self.ends_at - time.time()))
        line = f"{self.done + 1}/{self.total} {job.label}  {point}  {left} left"
        self.bar.update(self.task, figures=line)


def _newest_point(job: Job) -> str:
    """What the job's curve says last."""
    from tea_rl.compare.jobs import CURVE_NAME

    try:
        lines = (job.folder / CURVE_NAME).read_text(encoding="utf-8").splitlines()
        point: dict[str, Any] = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return "loading"
    return f"step {point['step']}  reward {point['reward']:+.3f}"


def _print_results(results: Results) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out prompts of {results.recipe}", box=box.SIMPLE)
    for title in ("method", "rate", "reward", "KL", "surprise", "training", "memory", "parameters"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for method in results.methods:
        table.add_row(*_row(method))
    Console().print(table)
    for method in results.methods:
        if method.reason:
            typer.echo(f"{method.name}: {method.reason}")


def _row(method: MethodResult) -> list[str]:
    if not method.seeds:
        return [method.name, "", method.status, "", "", "", "", ""]
    count = len(method.seeds)
    rewards = [value for seed in method.seeds for value in seed.metrics.reward_sampled]
    kl = [seed.metrics.kl.value for seed in method.seeds if seed.metrics.kl is not None]
    peaks = [seed.peak_memory_bytes for seed in method.seeds if seed.peak_memory_bytes is not None]
    return [
        method.name + (f" ({count} seeds)" if count > 1 else ""),
        "" if method.learning_rate is None else f"{method.learning_rate:g}",
        f"{sum(rewards) / len(rewards):+.3f}",
        f"{sum(kl) / len(kl):.3f}" if kl else "",
        f"{sum(seed.metrics.surprise for seed in method.seeds) / count:.2f}",
        duration(sum(seed.train_seconds for seed in method.seeds) / count),
        f"{max(peaks) / 1e9:.2f} GB" if peaks else "",
        f"{method.seeds[0].trainable_parameters:,}",
    ]
