"""``tea-rl train``: run a recipe."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
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
) -> None:
    """Train a TEA head: with rewards on what it generates, or offline from labelled rows or stored states.

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
        overrides = [
            "data.prompts=null",
            "data.dataset=null",
            f"data.store={json.dumps(str(store), ensure_ascii=False)}",
            *overrides,
        ]
    loaded = load_recipe(recipe, overrides)
    output = output or Path("runs") / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    quiet_transformers()
    from tea_rl.training.online import train as run_training

    with StopOnSignal() as stop, TrainingDisplay(stop) as display:
        result = run_training(loaded, output, resume=resume, listener=display, should_stop=stop)
    if result.stopped:
        note(
            # the resolved recipe, so that no --set has to be typed again
            f"stopped after step {result.step}; continue with: "
            f"tea-rl train {result.path / 'recipe.yaml'} --output {result.path} --resume"
        )
        raise typer.Exit(130)
    _print_outcome(result)


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
        if "eval_loss" in row:
            shown = [f"{label} {_figure(row[key])}" for label, key, _ in _OFFLINE_FIGURES if key in row]
            self.on_note(f"held-out, {who}: {', '.join(shown)}")
            return
        self.on_note(
            f"held-out, {who}: reward {row['eval_reward']:+.3f} sampled, {row['eval_reward_greedy']:+.3f} greedy, "
            f"KL {row['eval_kl']:.3f}, distinct bigrams {row['eval_distinct_2']:.2f}, surprise {row['eval_base_nll']:.2f}"
        )


def _step_figures(row: dict[str, Any]) -> str:
    """What a line about a step shows: online, offline or of a sweep."""
    if "heads" in row:
        return f"{row['heads']} heads  mean loss {row['loss']:.3f}"
    what = f"reward {row['reward']:+.3f}" if "reward" in row else f"loss {row['loss']:.3f}"
    return f"{what}  KL {row['kl']:.3f}  {row['tokens_per_second']:.0f} tokens/s"


def _print_outcome(result: TrainResult) -> None:
    """Base and trained completions (offline: held-out figures) side by side, then where to look."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if result.evaluation is not None and result.base_metrics:
        _print_figures(result.base_metrics, result.evaluation.metrics)
    if result.evaluation is not None and result.base_samples:
        table = Table(title="Held-out prompts", show_lines=True, box=box.SIMPLE)
        for title in ("prompt", "base model", "trained"):
            table.add_column(title, overflow="fold")
        for base, trained in zip(result.base_samples, result.evaluation.samples, strict=False):
            # The newest lines of a long prompt (worked examples) say what was asked.
            prompt = base.prompt if len(base.prompt) <= 80 else "... " + base.prompt[-76:]
            table.add_row(*(_plain(text) for text in (prompt, base.completion, trained.completion)))
        Console().print(table)
    typer.echo(f"curves:  {result.path / 'curves.png'}")
    typer.echo(f"report:  {result.path / 'report.html'}")
    typer.echo(f"head:    {result.path / 'head'}")
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
