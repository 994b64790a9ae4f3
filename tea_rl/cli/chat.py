"""``tea-rl chat``: talk to the model with its head installed."""

from __future__ import annotations

from typing import Annotated

import typer

from tea_rl.cli.common import HeadOption, ModelOption, apply_chat_template, load_head, note, parse_strengths
from tea_rl.cli.returns import note_beyond, parse_returns, returns_for

_HELP = "Type a message. /strength 0.5 changes the head's strength, /reset forgets the conversation, /exit leaves."
_RETURN_HELP = "/return 0.5 changes the return that the head aims at."


def chat(
    head: HeadOption,
    strength: Annotated[
        str, typer.Option("--strength", help="Scale of the correction; 0 is the base model.")
    ] = "1",
    asked: Annotated[
        str | None,
        typer.Option("--return", help="Return to aim at, for a head with return conditioning."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    model: ModelOption = None,
) -> None:
    """Chat with a model and its trained head.

    Example: [bold]tea-rl chat --head runs/demo/head[/bold]
    """
    first = parse_strengths(strength)[0]
    returns = returns_for(head, asked, "--return")[:1]
    backbone, tea = load_head(head, model)
    from transformers import TextStreamer

    from tea_rl.errors import TeaError

    if not backbone.tokenizer.chat_template:
        raise TeaError(f"{backbone.name_or_path} has no chat template; use tea-rl generate instead")
    tea.strength = first
    for value in returns:
        _aim(tea, value)
    backbone.install(tea)
    streamer = TextStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    note(_HELP if tea.members.modulation is None else f"{_HELP} {_RETURN_HELP}")
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            turns = list(opening)
        elif line.startswith("/"):
            _command(line, tea)
        elif line:
            turns.append({"role": "user", "content": line})
            answer = _answer(backbone, turns, streamer, max_new_tokens, temperature)
            turns = [*turns, {"role": "assistant", "content": answer}] if answer is not None else turns[:-1]


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _command(line: str, tea) -> None:  # noqa: ANN001
    from tea_rl.errors import TeaError

    name, _, value = line.partition(" ")
    try:
        if name == "/strength":
            tea.strength = parse_strengths(value)[0]
            note(f"strength {tea.strength:g}")
        elif name == "/return":
            _aim(tea, parse_returns(value, "/return")[0])
            note(f"return {tea.asked_return:g}")
        else:
            note(f"no command {name}. {_HELP}")
    except TeaError as error:
        note(str(error))


def _aim(tea, value: float) -> None:  # noqa: ANN001
    tea.set_return(value)
    note_beyond(tea, [value])


def _answer(
    backbone, turns: list[dict[str, str]], streamer, max_new_tokens: int, temperature: float
) -> str | None:  # noqa: ANN001
    text = apply_chat_template(backbone, turns)
    inputs = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(backbone.device)
    length = inputs["input_ids"].shape[1]
    if length + max_new_tokens > backbone.max_length:
        note("the conversation no longer fits the model; /reset starts a new one")
        return None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = backbone.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=backbone.pad_token_id,
        eos_token_id=list(backbone.eos_token_ids),
        streamer=streamer,
        **sampling,
    )
    return backbone.tokenizer.decode(output[0, length:], skip_special_tokens=True)
