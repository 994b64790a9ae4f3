"""``tea-rl report``: write the pages of runs and comparisons again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tea_rl.cli.common import JsonOption, print_json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of `tea-rl train` or of `tea-rl compare`, in any mixture."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write report.html, and its pictures, anew from what each folder holds, finished or not.

    Example: [bold]tea-rl report runs/demo runs/compare-quickstart[/bold]
    """
    from tea_rl.compare.report import write_comparison
    from tea_rl.compare.results import RESULTS_NAME
    from tea_rl.errors import TeaError
    from tea_rl.evaluation.report import write_report
    from tea_rl.training.run_directory import has_run

    writers: list[Callable[[Path], Path]] = []
    for folder in runs:  # a mistake shows before anything is written
        if (folder / RESULTS_NAME).is_file():
            writers.append(write_comparison)
        elif has_run(folder):
            writers.append(write_report)
        else:
            raise TeaError(
                f"expected the folder of a run or a comparison, but {folder} holds neither recipe.yaml nor {RESULTS_NAME}; "
                "give one made by `tea-rl train` or `tea-rl compare`"
            )
    pages = [write(folder) for write, folder in zip(writers, runs, strict=True)]
    if as_json:
        print_json([str(page) for page in pages])
    else:
        for page in pages:
            typer.echo(page)
