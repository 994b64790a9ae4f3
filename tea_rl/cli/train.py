"""``tea-rl train``: run a recipe."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import SetOption, note, quiet_transformers
from tea_rl.cli.progress import WorkDisplay, duration

if TYPE_CHECKING:
    from tea_rl.training.online import TrainResult


#: Settings that say themselves what a run learns from.
_SOURCES = ("data.prompts", "data.dataset", "data.store")
#: Held-out figures of an offline run: name, key, key of the original model's where it is measured apart.
_OFFLINE_FIGURES = (
    ("cross-entropy", "eval_loss", "eval_base_loss"),
    ("perplexity", "eval_perplexity", None),
    ("accuracy", "eval_accuracy", "eval_base_accuracy"),
    ("reward and gain, rank correlation", "eval_reward_correlation", None),
    ("pairs, chosen gained more", "eval_pair_accuracy", None),
    ("pairs, chosen likelier", "eval_pair_accuracy_logp", "eval_base_pair_accuracy"),
    ("KL", "eval_kl", None),
)
#: Figures of a line and how they read: of a step in an environment, of held-out prompts and starts, of no skill.
_ENV_STEP_FIGURES = (("reward", "return {:+.3f}"), ("turns", "{:.1f} turns"), ("invalid", "invalid {:.0%}"))
_PROMPT_FIGURES = (
    ("eval_reward", "reward {:+.3f} sampled"),
    ("eval_reward_greedy", "{:+.3f} greedy"),
    ("eval_kl", "KL {:.3f}"),
    ("eval_distinct_2", "distinct bigrams {:.2f}"),
    ("eval_base_nll", "surprise {:.2f}"),
)
_ENV_FIGURES = (
    ("eval_reward", "return {:+.3f} sampled"),
    ("eval_reward_greedy", "{:+.3f} greedy"),
    ("eval_turns", "{:.1f} turns"),
    ("eval_invalid", "invalid {:.0%}"),
    ("eval_kl", "KL {:.3f}"),
)
_WITHOUT_SKILL = (
    ("eval_constant_reward", "best constant answer {:+.3f}"),
    ("eval_random_reward", "random {:+.3f}"),
    ("eval_expert_reward", "expert {:+.3f}"),
)


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see tea-rl recipes) or a YAML file.")],
    overrides: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Run directory; by default runs/<recipe>-<time>.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="Learn from this state store instead of the recipe's data (tea-rl embed)."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output from its newest complete checkpoint."),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Measure where the time goes, and show it in the report; slows a GPU down."
        ),
    ] = False,
) -> None:
    """Train a TEA head: with rewards on what it generates, in a text environment, or offline from labelled rows or stored states.

    Example: [bold]tea-rl train quickstart --set train.max_steps=10[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe import load_recipe

    if resume and output is None:
        raise TeaError("--resume needs --output DIR, the run directory to continue")
    overrides = overrides or []
    if resume and store is None and not any(text.strip().startswith(_SOURCES) for text in overrides):
        store = _store_of_run(output)
    if store is not None:
        overrides = [*from_store(store), *overrides]
    loaded = load_recipe(recipe, overrides)
    output = output or Path("runs") / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    quiet_transformers()
    from tea_rl.training.online import train as run_training

    with StopOnSignal() as stop, TrainingDisplay(stop) as display:
        result = run_training(
            loaded, output, resume=resume, listener=display, should_stop=stop, profile=profile
        )
    if result.stopped:
        note(
            # the resolved recipe, so that no --set has to be typed again
            f"stopped after step {result.step}; continue with: "
            f"tea-rl train {result.path / 'recipe.yaml'} --output {result.path} --resume"
        )
        raise typer.Exit(130)
    _print_outcome(result, loaded.env.id is not None)


def from_store(store: Path) -> list[str]:
    """What makes any recipe one that learns from a store."""
    from tea_rl.recipe_groups import GENERATING

    return [
        "data.prompts=null",
        "data.dataset=null",
        "env.id=null",
        *(f"{group}.{name}={json.dumps(value)}" for (group, name), value in GENERATING.items()),
        f"data.store={json.dumps(str(store), ensure_ascii=False)}",
    ]


def _store_of_run(output: Path | None) -> Path | None:
    """The store a run began with: ``--resume`` need not name it again."""
    from tea_rl.training.manifest import run_recipe

    before = run_recipe(output) if output is not None else None
    data = before.get("data") if before is not None else None
    found = data.get("store") if isinstance(data, dict) else None
    return Path(found) if isinstance(found, str) else None


class StopOnSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a clean stop after the step under way; the second one interrupts."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopOnSignal:
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        note("stopping: this step is finished and saved first (again to quit at once)")


class TrainingDisplay(WorkDisplay):
    """Embedding, then steps and evaluations with their figures.

    Args:
        stop: asked between two batches of an embedding, which it interrupts.
    """

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__("embedding")
        self.stop = stop

    def on_progress(self, done: int, total: int, unit: str) -> None:
        if self.stop():  # what is embedded is kept: --resume goes on after it
            raise KeyboardInterrupt
        super().on_progress(done, total, unit)

    def on_start(self, first_step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        self.steps_told, self.seconds, self.step_at = 0, 0.0, time.monotonic()
        self.steps = self.bar.add_task("training", total=max_steps, completed=first_step - 1, figures="")

    def on_step(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        self.seconds += row.get("seconds", now - self.step_at)
        self.steps_told, self.step_at = self.steps_told + 1, now
        left = self.seconds / self.steps_told * (self.max_steps - row["step"])
        line = f"step {row['step']}/{self.max_steps}  {_step_figures(row)}  {duration(left)} left"
        self.bar.update(self.steps, completed=row["step"], figures=line)
        # Offline steps are short: not each is worth a line.
        self.tell(line, now="reward" in row or row["step"] == self.max_steps)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        who = "base model" if row["step"] == 0 else f"step {row['step']}"
        if row.get("imitated"):
            who = "after imitation"
        if "eval_loss" in row:
            shown = [f"{label} {_figure(row[key])}" for label, key, _ in _OFFLINE_FIGURES if key in row]
        else:
            figures = _ENV_FIGURES if "eval_turns" in row else _PROMPT_FIGURES
            shown = _known((*figures, *_failures(row, "eval_failed")), row)
        beside = _known(_WITHOUT_SKILL, row)
        self.on_note(
            f"held-out, {who}: {', '.join(shown) or 'nothing measured'}"
            + (f" (beside it: {', '.join(beside)})" if beside else "")
        )


def _step_figures(row: dict[str, Any]) -> str:
    """What a line about a step shows: online with prompts or in an environment, offline, or of a sweep."""
    if "heads" in row:
        return f"{row['heads']} heads  mean loss {row['loss']:.3f}"
    if "turns" in row:
        figures = (*_ENV_STEP_FIGURES, *_failures(row, "failed"))
    else:
        figures = (("reward", "reward {:+.3f}") if "reward" in row else ("loss", "loss {:.3f}"),)
    return "  ".join(_known((*figures, ("kl", "KL {:.3f}"), ("tokens_per_second", "{:.0f} tokens/s")), row))


def _failures(row: dict[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    return ((key, "episodes failed {:.0%}"),) if row.get(key) else ()


def _known(figures: Iterable[tuple[str, str]], row: dict[str, Any]) -> list[str]:
    """The figures that were measured: NaN stands for one that was not."""
    return [
        text.format(row[key])
        for key, text in figures
        if isinstance(row.get(key), int | float) and not math.isnan(row[key])
    ]


def _print_outcome(result: TrainResult, in_environment: bool) -> None:
    """Base and trained completions or episodes (offline: held-out figures) side by side, then where to look."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if result.evaluation is not None and result.base_metrics:
        _print_figures(result.base_metrics, result.evaluation.metrics)
    if result.evaluation is not None and result.base_samples:
        what, prompt = ("episodes", "start") if in_environment else ("prompts", "prompt")
        table = Table(title=f"Held-out {what}", show_lines=True, box=box.SIMPLE)
        for title in (prompt, "base model", "trained"):
            table.add_column(title, overflow="fold")
        for base, trained in zip(result.base_samples, result.evaluation.samples, strict=False):
            # The newest lines of a long prompt (worked examples) say what was asked.
            prompt = base.prompt if len(base.prompt) <= 80 else "... " + base.prompt[-76:]
            table.add_row(*(_plain(text) for text in (prompt, base.completion, trained.completion)))
        Console().print(table)
    typer.echo(f"curves:  {result.path / 'curves.png'}")
    typer.echo(f"report:  {result.path / 'report.html'}")
    typer.echo(f"head:    {result.path / 'head'}")
    if in_environment:
        typer.echo(f"try it:  tea-rl evaluate {result.path / 'recipe.yaml'} --head {result.path / 'head'}")
    else:
        typer.echo(f'try it:  tea-rl generate --head {result.path / "head"} --prompt "..." --compare')


def _print_figures(base: dict[str, float], best: dict[str, float]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out rows", box=box.SIMPLE)
    table.add_column("")
    for title in ("base model", "trained"):
        table.add_column(title, justify="right")
    for label, key, base_key in _OFFLINE_FIGURES:
        if key in best:
            before = best[base_key] if base_key else base.get(key, float("nan"))
            table.add_row(label, _figure(before), _figure(best[key]))
    Console().print(table)


def _figure(value: float) -> str:
    """A held-out figure; the perplexity of a head that went wrong has hundreds of digits."""
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _plain(text: str):  # noqa: ANN202
    from rich.text import Text

    return Text(text.strip())
