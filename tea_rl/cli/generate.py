"""``tea-rl generate``: completions with a trained head, side by side with the base model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tea_rl.cli.common import (
    HeadOption,
    JsonOption,
    ModelOption,
    load_head,
    parse_strengths,
    print_json,
    render_prompt,
)
from tea_rl.cli.returns import note_beyond, returns_for


def generate(
    head: HeadOption,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to complete.")],
    strength: Annotated[
        str, typer.Option("--strength", help="Scale of the correction; a list such as 0,0.5,1 prints each.")
    ] = "1",
    asked: Annotated[
        str | None,
        typer.Option(
            "--return",
            help="Return to aim at, for a head with return conditioning; a list such as 0,0.5,1 prints each.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print the base model's completion, too.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    num_generations: Annotated[int, typer.Option(min=1, help="Completions to print.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete a prompt with a trained head.

    Example: [bold]tea-rl generate --head runs/demo/head --prompt "The movie was" --compare[/bold]
    """
    strengths = parse_strengths(strength)
    if compare and 0.0 not in strengths:
        strengths = [0.0, *strengths]
    returns = returns_for(head, asked, "--return")
    backbone, tea = load_head(head, model)
    note_beyond(tea, returns)
    from tea_rl.errors import TeaError
    from tea_rl.rollout import DecodeSettings
    from tea_rl.rollout import generate as run_rollout

    ids = render_prompt(backbone, prompt, chat)
    if len(ids) + max_new_tokens > backbone.max_length:
        raise TeaError(
            f"the prompt has {len(ids)} tokens and the model holds {backbone.max_length}; shorten it or lower --max-new-tokens"
        )
    settings = DecodeSettings(
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
        greedy=temperature == 0.0,
    )
    rows = []
    saved = tea.asked_return
    # The original model can be asked for nothing.
    pairs = [(alpha, value) for alpha in strengths for value in (returns if alpha and returns else [None])]
    for alpha, value in pairs:
        tea.strength = alpha
        tea.set_return(saved if value is None else value)
        result = run_rollout(backbone, tea, [ids], settings, seed=(seed,))
        gain = result.mean_over_rows(result.tokens.logps - result.tokens.base_logps)
        rows += [
            {"strength": alpha, "return": value, "completion": text, "logp_gain_per_token": each}
            for text, each in zip(result.texts, gain.tolist(), strict=True)
        ]
    if as_json:
        print_json({"prompt": prompt, "completions": rows})
        return
    for row in rows:
        shown = row["completion"] if chat else prompt + row["completion"]
        typer.echo(f"{_label(row):>8} | {shown}" if len(rows) > 1 else shown)


def _label(row: dict[str, Any]) -> str:
    alpha, value = row["strength"], row["return"]
    if value is None:
        return {0.0: "base", 1.0: "trained"}.get(alpha, f"strength {alpha:g}")
    return f"return {value:g}" if alpha == 1.0 else f"strength {alpha:g}, return {value:g}"
