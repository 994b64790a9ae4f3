"""``tea-rl chat``: talk to the model with its head installed."""

from __future__ import annotations

from typing import Annotated

import typer

from tea_rl.cli.common import HeadOption, ModelOption, apply_chat_template, load_head, note, parse_strengths

_HELP = "Type a message. /strength 0.5 changes the head's strength, /reset forgets the conversation, /exit leaves."


def chat(
    head: HeadOption,
    strength: Annotated[
        str, typer.Option("--strength", help="Scale of the correction; 0 is the base model.")
    ] = "1",
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    model: ModelOption = None,
) -> None:
    """Chat with a model and its trained head.

    Example: [bold]tea-rl chat --head runs/demo/head[/bold]
    """
    first = parse_strengths(strength)[0]
    backbone, tea = load_head(head, model)
    from transformers import TextStreamer

    from tea_rl.errors import TeaError

    if not backbone.tokenizer.chat_template:
        raise TeaError(f"{backbone.name_or_path} has no chat template; use tea-rl generate instead")
    tea.strength = first
    backbone.install(tea)
    streamer = TextStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    note(_HELP)
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
    if name != "/strength":
        note(f"no command {name}. {_HELP}")
        return
    try:
        tea.strength = parse_strengths(value)[0]
        note(f"strength {tea.strength:g}")
    except TeaError as error:
        note(str(error))


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
