"""Labelled rows as token ids, and the digests that say what they were made from.

A row is encoded as the model would meet it: the prompt exactly as it is rendered to generate from it, then the completion's
tokens, then the token that ends a turn or text, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tea_rl.data.labelled import LabelledData, LabelledRow
from tea_rl.data.prompts import plain, prompt_text, render_prompt
from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tea_rl.recipe import DataConfig

#: Rows tokenised in one call; enough for a fast tokenizer, little enough for memory.
_BATCH = 1024


@dataclass
class EncodedRow:
    """One row as the model reads it.

    Attributes:
        prompt_ids: tokens that are read; at least one, so that the first predicted token has a state.
        completion_ids: tokens that are predicted; at least one.
        row: where it comes from.
        truncated: cut to the longest length; such a row has no end token.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    row: LabelledRow
    truncated: bool


@dataclass
class EncodeReport:
    """What became of the rows.

    Attributes:
        rows: rows encoded.
        tokens: their completion tokens.
        truncated: rows among them whose completion was cut.
        dropped: rows whose prompt leaves no room for a completion (the other row of their pair goes with them).
        max_length: the longest length, in tokens.
        dropped_places: where the first few of the dropped ones stand.
    """

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    max_length: int = 0
    dropped_places: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The report in one line."""
        text = f"{self.rows:,} rows, {self.tokens:,} completion tokens"
        if self.truncated:
            text += f"; {self.truncated:,} cut at {self.max_length} tokens"
        if self.dropped:
            where = ", ".join(self.dropped_places)
            text += f"; {self.dropped:,} left out, whose prompt alone has {self.max_length} tokens or more ({where})"
        return text


def encode_rows(
    data: LabelledData,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_id: int | None,
    max_length: int,
) -> tuple[list[EncodedRow], EncodeReport]:
    """Render and tokenise rows; their order stays.

    Plain text (an empty prompt) goes without template: it is all completion, after the tokenizer's opening token or, where
    it has none, after its own first token.

    Args:
        config: template, format, system and exclude apply to prompts as they do online; a smaller ``max_length`` wins.
        eos_token_id: ends a completion; None appends nothing. A chat answer ends with the token its template ends it with.
        max_length: most tokens of a row, prompt included.

    Raises:
        TeaError: if no row is left, or the chat template refuses a prompt.
    """
    max_length = min(max_length, config.max_length or max_length)
    excluded = {text.strip() for text in config.exclude}
    rows = [row for row in data.rows if not excluded or prompt_text(row.prompt).strip() not in excluded]
    encoder = _Encoder(config, tokenizer, eos_token_id)
    report = EncodeReport(max_length=max_length)
    encoded: list[EncodedRow] = []
    too_long: list[LabelledRow] = []
    for start in range(0, len(rows), _BATCH):
        for row in encoder.encode(rows[start : start + _BATCH]):
            room = max_length - len(row.prompt_ids)
            if room < 1 or not row.completion_ids:
                too_long.append(row.row)
                continue
            row.truncated = len(row.completion_ids) > room
            del row.completion_ids[room:]
            encoded.append(row)
    lost_pairs = {row.pair for row in too_long if row.pair is not None}
    kept = [row for row in encoded if row.row.pair is None or row.row.pair not in lost_pairs]
    report.rows, report.tokens = len(kept), sum(len(row.completion_ids) for row in kept)
    report.truncated = sum(row.truncated for row in kept)
    report.dropped = len(rows) - len(kept)
    report.dropped_places = [row.place for row in too_long[:3]]
    if not kept:
        raise TeaError(
            f"{data.source}: expected a row that fits {max_length} tokens, got none of {len(rows)} (prompts too long, or all "
            "in data.exclude); raise data.max_length or shorten the prompts."
        )
    return kept, report


class _Encoder:
    """What encoding needs to know of a tokenizer, found out once."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None
    ) -> None:
        self.config, self.tokenizer, self.eos_token_id = config, tokenizer, eos_token_id
        self.opening = _opening(tokenizer)
        self._turn_end: int | None = None
        self._turn_end_known = False

    def encode(self, rows: Sequence[LabelledRow]) -> list[EncodedRow]:
        rendered = [self._render(row) for row in rows]
        prompts = self._tokenize([text for text, _ in rendered])
        wholes = self._tokenize(
            [text + row.completion for (text, _), row in zip(rendered, rows, strict=True)]
        )
        encoded = []
        for row, (_, chat), prompt, whole in zip(rows, rendered, prompts, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            else:
                # A token spans the border. Whoever generates has the prompt's own tokens behind it, never that one.
                completion = self._tokenize_alone(row.completion)
            completion = self._ended(completion, chat)
            prompt = prompt if chat else [*self.opening, *prompt]
            if not prompt:
                prompt, completion = completion[:1], completion[1:]
            encoded.append(EncodedRow(prompt, completion, row, truncated=False))
        return encoded

    def _render(self, row: LabelledRow) -> tuple[str, bool]:
        if row.prompt == "":
            return "", False
        return render_prompt(self.config, row.prompt, self.tokenizer, row.place)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without the tokenizer's special tokens around them."""
        # a text longer than the model is cut later, and counted: the tokenizer's warning about it would be noise
        return [
            list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def _tokenize_alone(self, text: str) -> list[int]:
        """Ids of a text as they are behind something else.

        Some tokenizers put a space before whatever comes first; behind a line break they do not.
        """
        before, both, alone = self._tokenize(["\n", "\n" + text, text])
        return both[len(before) :] if both[: len(before)] == before else alone

    def _ended(self, ids: list[int], chat: bool) -> list[int]:
        """With one end token behind; a text may bring its own."""
        end = self._end_of_turn() if chat else self.eos_token_id
        if end is None or ids[-1:] in ([end], [self.eos_token_id]):
            return ids
        return [*ids, end]

    def _end_of_turn(self) -> int | None:
        """The special token the chat template puts behind an answer; the end of a text where there is none."""
        if not self._turn_end_known:
            self._turn_end = _turn_end(self.tokenizer)
            self._turn_end_known = True
        return self.eos_token_id if self._turn_end is None else self._turn_end


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens the tokenizer puts before a text, such as BOS."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else []


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first token the chat template puts behind an answer, if it is a special one."""
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates are programs and raise what they like; then nothing is known
        return None
    behind = text[text.rfind(answer) + len(answer) :] if answer in text else ""
    ids = list(tokenizer(behind, add_special_tokens=False)["input_ids"]) if behind else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None


#: Settings of ``data`` that decide what the tokens of a row are.
RENDERING_SETTINGS = ("format", "template", "system", "max_length")


def rendering_digest(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides how a row is rendered, as JSON values.

    The recipe's settings (`RENDERING_SETTINGS`) stand there as they are, so that whoever reads states made with them can say
    which one differs, without the tokenizer; its chat template and opening tokens are a SHA-256 (hex) under ``tokenizer``.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in RENDERING_SETTINGS}
    return {
        **settings,
        "tokenizer": _sha256([getattr(tokenizer, "chat_template", None), _opening(tokenizer)]),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over all that decides a text's ids: vocabulary, merges, normalisation, added tokens.

    Padding and truncation are left out: a tokenizer changes those as it is used.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items())
    if backend is None:
        return _sha256([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added])
    facts = json.loads(backend.to_str())
    parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return _sha256([[facts.get(part) for part in parts], added])


def labelled_digest(rows: Sequence[LabelledRow]) -> str:
    """SHA-256 (hex) over rows in their order; places, which change when a file is moved, do not count."""
    digest = hashlib.sha256()
    for row in rows:
        facts = [row.prompt, row.completion, row.reward, row.label, row.pair, row.chosen]
        digest.update(repr([plain(facts), plain(row.columns)]).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()
