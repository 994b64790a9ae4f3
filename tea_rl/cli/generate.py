"""``tea-rl generate``: completions with a trained head, side by side with the base model."""

from __future__ import annotations

from typing import Annotated

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


def generate(
    head: HeadOption,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to complete.")],
    strength: Annotated[
        str, typer.Option("--strength", help="Scale of the correction; a list such as 0,0.5,1 prints each.")
    ] = "1",
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
    backbone, tea = load_head(head, model)
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
    for value in strengths:
        tea.strength = value
        result = run_rollout(backbone, tea, [ids], settings, seed=(seed,))
        gain = result.mean_over_rows(result.tokens.logps - result.tokens.base_logps)
        rows += [
            {"strength": value, "completion": text, "logp_gain_per_token": each}
            for text, each in zip(result.texts, gain.tolist(), strict=True)
        ]
    if as_json:
        print_json({"prompt": prompt, "completions": rows})
        return
    for row in rows:
        label = (
            "base"
            if row["strength"] == 0.0
            else "trained"
            if row["strength"] == 1.0
            else f"strength {row['strength']:g}"
        )
        shown = row["completion"] if chat else prompt + row["completion"]
        typer.echo(f"{label:>8} | {shown}" if len(rows) > 1 else shown)
