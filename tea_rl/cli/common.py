"""What several commands share: options, loading a saved head, and printing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone
    from tea_rl.head.layer import TeaHead

HeadOption = Annotated[
    Path, typer.Option("--head", help="Folder of a saved TEA head, such as runs/NAME/head.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Base model, if not where the head remembers it: Hub id, folder or .gguf."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe value, such as --set train.max_steps=5. Repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]


def note(text: str) -> None:
    """A line for the person watching, on stderr so that printed data stays clean."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    """JSON on stdout; NaN is written as NaN."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def parse_strengths(text: str) -> list[float]:
    """``"0,0.5,1"`` to numbers.

    Raises:
        TeaError: for anything else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TeaError(
            f'--strength takes numbers separated by commas, such as 0,0.5,1; got "{text}"'
        ) from error
    if any(not 0.0 <= value <= 100.0 for value in values):
        raise TeaError(
            f'--strength takes numbers from 0 (original model) up, 1 is the trained head; got "{text}"'
        )
    return values


def load_head(
    folder: Path, model: str | None, settings: dict[str, Any] | None = None
) -> tuple[Backbone, TeaHead]:
    """Load a saved head and the base model it belongs to, or another copy of that model.

    The model is loaded as the head remembers (dtype, quantization, revision), or by ``settings``.
    """
    from tea_rl.head.checkpoint import read_config

    config = read_config(folder)  # before the model, so that a wrong folder is answered at once
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise TeaError(f"the head in {folder} does not remember its base model; name it with --model")
    remembered = config["base_model_settings"]
    if settings is None:
        settings = remembered
    for key in ("dtype", "quantization"):
        asked = settings.get(key, "auto")
        if key in remembered and asked not in ("auto", remembered[key]):
            note(f"warning: the head was trained with {key} {remembered[key]}, and runs with {asked} here")
    quiet_transformers()
    from tea_rl.backbone import load_backbone
    from tea_rl.head.layer import TeaHead

    backbone = load_backbone(name, **settings, notify=note)
    return backbone, TeaHead.from_pretrained(folder, backbone)


def render_prompt(backbone: Backbone, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, through the chat template when asked.

    Raises:
        TeaError: for an empty prompt or a tokenizer without a chat template.
    """
    if chat:
        if not backbone.tokenizer.chat_template:
            raise TeaError(f"{backbone.name_or_path} has no chat template; leave --chat out")
        text = apply_chat_template(backbone, [{"role": "user", "content": text}])
    ids = backbone.tokenizer(text, add_special_tokens=not chat).input_ids
    if not ids:
        raise TeaError("the prompt is empty; give some text with --prompt")
    return ids


def apply_chat_template(backbone: Backbone, turns: list[dict[str, str]]) -> str:
    """Render a conversation for the model's answer.

    Raises:
        TeaError: if the template refuses it, as some do a system message.
    """
    try:
        return str(backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise what they like
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TeaError(
            f"the chat template of {backbone.name_or_path} refused the conversation ({first})"
        ) from error


def quiet_transformers() -> None:
    """Keep libraries' advice out of a command's output."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def is_terminal() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr.isatty()
