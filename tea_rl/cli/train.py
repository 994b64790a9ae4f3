"""``tea-rl train``: run a recipe."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.cli.common import SetOption, is_terminal, note, quiet_transformers
from tea_rl.training.progress import Listener

if TYPE_CHECKING:
    from tea_rl.training.online import TrainResult


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see tea-rl recipes) or a YAML file.")],
    overrides: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Run directory; by default runs/<recipe>-<time>.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output from its newest complete checkpoint."),
    ] = False,
) -> None:
    """Train a TEA head with rewards.

    Example: [bold]tea-rl train quickstart --set train.max_steps=10[/bold]
    """
    from tea_rl.errors import TeaError
    from tea_rl.recipe import load_recipe

    if resume and output is None:
        raise TeaError("--resume needs --output DIR, the run directory to continue")
    loaded = load_recipe(recipe, overrides or [])
    output = output or Path("runs") / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    quiet_transformers()
    from tea_rl.training.online import train as run_training

    with _StopOnSignal() as stop, _TrainingDisplay() as display:
        result = run_training(loaded, output, resume=resume, listener=display, should_stop=stop)
    if result.stopped:
        note(
            # the resolved recipe, so that no --set has to be typed again
            f"stopped after step {result.step}; continue with: "
            f"tea-rl train {result.path / 'recipe.yaml'} --output {result.path} --resume"
        )
        raise typer.Exit(130)
    _print_outcome(result)


class _StopOnSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a clean stop after the step under way; the second one interrupts."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> _StopOnSignal:
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


class _TrainingDisplay(Listener):
    """A progress bar with live figures on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not is_terminal(),
        )

    def __enter__(self) -> _TrainingDisplay:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def on_note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_start(self, first_step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        self.seconds: list[float] = []
        self.task = self.bar.add_task("training", total=max_steps, completed=first_step - 1, figures="")

    def on_step(self, row: dict[str, Any]) -> None:
        figures = f"reward {row['reward']:+.3f}  KL {row['kl']:.3f}  {row['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.task, completed=row["step"], figures=figures)
        if self.bar.disable:
            self.seconds.append(row["seconds"])
            left = sum(self.seconds) / len(self.seconds) * (self.max_steps - row["step"])
            self.on_note(f"step {row['step']}/{self.max_steps}  {figures}  {left:.0f} s left")

    def on_evaluation(self, row: dict[str, Any]) -> None:
        who = "base model" if row["step"] == 0 else f"step {row['step']}"
        self.on_note(
            f"held-out, {who}: reward {row['eval_reward']:+.3f} sampled, {row['eval_reward_greedy']:+.3f} greedy, "
            f"KL {row['eval_kl']:.3f}, distinct bigrams {row['eval_distinct_2']:.2f}, surprise {row['eval_base_nll']:.2f}"
        )


def _print_outcome(result: TrainResult) -> None:
    """Base and trained completions side by side, then where to look."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

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


def _plain(text: str):  # noqa: ANN202
    from rich.text import Text

    return Text(text.strip())
