"""Prompts: read from any source, rendered, freed of repeats, and split into training and held-out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tea_rl.data.sources import Row, read_rows
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tea_rl.recipe import DataConfig

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the question as the data gives it; of a conversation, its turns.
        rendered: what the model reads, after template and chat format.
        columns: the row's other columns, handed to rewards.
        chat: rendered through the chat template, which brings its own special tokens.
    """

    text: str
    rendered: str
    columns: dict[str, Any] = field(default_factory=dict)
    chat: bool = False


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """Load the prompts of a recipe.

    The split is by distinct prompt: a prompt that occurs twice (the first one counts) is never on both sides. It depends
    on nothing but the prompts and ``split_seed``; both sides come in the shuffled order.

    Returns:
        Prompts to train on and held-out prompts (none when ``eval_fraction`` is 0 and ``eval_prompts`` is not given).

    Raises:
        TeaError: for a missing, empty or malformed source, or if nothing is left to train on.
    """
    if data.prompts is None:
        raise TeaError("expected data.prompts to generate from, got none; set it.")
    prompts = _distinct(data, read_rows(data.prompts, data.kwargs, data.size, 1 + data.split_seed), tokenizer)
    random.Random(data.split_seed).shuffle(prompts)
    if data.eval_prompts is not None:
        # Another seed, so that a generator does not write the training questions again.
        rows = read_rows(
            data.eval_prompts, data.kwargs, data.size, 1_000_001 + data.split_seed, "data.eval_prompts"
        )
        heldout = _distinct(data, rows, tokenizer)
        random.Random(data.split_seed).shuffle(heldout)
        known = {prompt.rendered for prompt in heldout}
        train = [prompt for prompt in prompts if prompt.rendered not in known]
        reason = "every prompt of data.prompts is also in data.eval_prompts"
    else:
        wanted = round(len(prompts) * data.eval_fraction)
        # A held-out share above 0 means an evaluation: keep at least one prompt for it, and never the only one.
        count = max(1, wanted) if data.eval_fraction > 0 and len(prompts) > 1 else wanted
        heldout, train = prompts[:count], prompts[count:]
        reason = f"{len(prompts)} distinct prompts, {count} of them held out by data.eval_fraction"
    if not train:
        raise TeaError(
            f"expected at least one prompt to train on, got none ({reason}); add prompts or hold out fewer."
        )
    return train, heldout[: data.eval_size]


def data_digest(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> str:
    """SHA-256 (hex) over rendered prompts and columns of both sides, in order."""
    digest = hashlib.sha256()
    for side, prompts in (("train", train), ("heldout", heldout)):
        for prompt in prompts:
            digest.update(repr([side, prompt.rendered, prompt.chat, plain(prompt.columns)]).encode() + b"\n")
    return digest.hexdigest()


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Turn prompts into token ids.

    Args:
        max_length: most tokens a prompt may have: the model's context minus the completion.

    Raises:
        TeaError: for a prompt that is longer, or that has no tokens at all.
    """
    rows: list[list[int]] = []
    for prompt in prompts:
        ids = list(tokenizer(prompt.rendered, add_special_tokens=not prompt.chat)["input_ids"])
        if len(ids) > max_length:
            raise TeaError(
                f"expected prompts of at most {max_length} tokens (the model's context minus "
                f"rollout.max_completion_length), got {len(ids)} in the prompt {short(prompt.text)}; shorten or remove it."
            )
        if not ids:
            raise TeaError(
                f"expected at least one token, got none from the prompt {short(prompt.rendered)}; remove it."
            )
        rows.append(ids)
    return rows


def _distinct(data: DataConfig, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Render rows, dropping repeats and excluded prompts."""
    excluded = {text.strip() for text in data.exclude}
    prompts: dict[str, Prompt] = {}
    for row in rows:
        prompt = _render(data, row, tokenizer)
        if prompt.text.strip() not in excluded:
            prompts.setdefault(prompt.rendered, prompt)
    return list(prompts.values())


def _render(data: DataConfig, row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    rendered, chat = render_prompt(data, row.prompt, tokenizer, row.place)
    return Prompt(prompt_text(row.prompt), rendered, row.columns, chat)


def prompt_text(prompt: str | list[Message]) -> str:
    """The question as people read it: its text, or the turns of a conversation of several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def render_prompt(
    data: DataConfig, prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, bool]:
    """Put a prompt into the recipe's template and, where asked or given as messages, into the chat template.

    Args:
        prompt: text, or messages that end with the user's turn.
        place: where the prompt stands, for errors.

    Returns:
        What the model reads, and whether it went through the chat template (which brings its own special tokens).

    Raises:
        TeaError: if the tokenizer has no chat template, or its template refuses the conversation.
    """
    if isinstance(prompt, str):
        question = data.template.replace("{prompt}", prompt)
        if data.format == "plain":
            return question, False
        messages: list[Message] = [{"role": "user", "content": question}]
    else:
        *earlier, last = prompt
        messages = [*earlier, {**last, "content": data.template.replace("{prompt}", last["content"])}]
    if data.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    if not getattr(tokenizer, "chat_template", None):
        raise TeaError(
            f"{place}: expected a model with a chat template, got one without ({tokenizer.name_or_path}); set "
            "data.format plain and give prompts as text, or use an instruction-tuned model."
        )
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs and raise what they like
        reason = " ".join(str(error).split())
        raise TeaError(f"{place}: the model's chat template refuses the conversation: {reason}.") from error
    return str(rendered), True


def plain(value: Any) -> Any:
    """Reduce a column to builtins whose ``repr`` is the same in every process."""
    if isinstance(value, dict):
        return [[plain(key), plain(item)] for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def short(text: str, limit: int = 60) -> str:
    """A text quoted for an error, cut where it is long."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= limit else shown[: limit - 4] + '..."'
