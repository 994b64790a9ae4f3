"""The command line. Each command parses, calls the library and prints; nothing heavy loads before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tea_rl import __version__
from tea_rl.cli import (
    chat,
    compare,
    data,
    doctor,
    embed,
    envs,
    evaluate,
    generate,
    inspect,
    play,
    recipes,
    relabel,
    report,
    rollout,
    sweep,
    train,
)
from tea_rl.errors import TeaError, did_you_mean
from tea_rl.huge_pages import use_huge_pages

#: Typer carries its own copy of click in newer releases; the base class is reached through what it exports.
_UsageMistake: type[Exception] = next(
    base
    for base in typer.BadParameter.__mro__
    if base.__name__ == "ClickException" and issubclass(base, Exception)
)


class _SuggestingGroup(typer.core.TyperGroup):
    """Answers a mistyped command with the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise TeaError(
                f'no command "{args[0]}".{did_you_mean(args[0], known)} Commands: {", ".join(known)}'
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tea-rl",
    cls=_SuggestingGroup,
    help="Fine-tune a language model with rewards by training only its tail.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"tea-rl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


app.command("train")(train.train)
app.command("recipes")(recipes.recipes)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.command("embed")(embed.embed)
app.command("rollout")(rollout.rollout)
app.command("inspect")(inspect.inspect)
app.command("relabel")(relabel.relabel)
app.command("sweep")(sweep.sweep)
app.command("envs")(envs.envs)
app.command("play")(play.play)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a user's mistake (one line on stderr), 130 interrupted."""
    if args is None:  # the process is ours
        use_huge_pages()
    try:
        code = app(args=args, standalone_mode=False)
    except TeaError as error:
        code = _fail(str(error))
    except _UsageMistake as error:
        # Without arguments the help is the message, and has been printed.
        mistake: Any = error
        message, context = mistake.format_message(), getattr(mistake, "ctx", None)
        where = f"; see {context.command_path} --help" if context else ""
        code = _fail(message.rstrip(".") + where) if message.strip() else 2
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        code = _fail(
            f"the system refused a file operation ({error}); check the path, the permissions and the disk"
        )
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> int:
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code
