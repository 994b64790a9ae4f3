"""Conversations as token ids: what the model reads before its first turn, and between one turn and the next.

What the model wrote stays as it was sampled. Only what the environment said is tokenised, together with the text that the
format puts around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands for the assistant's turn while the text after it is looked for.
_MARK = "tea0assistant0turn"


@dataclass(frozen=True)
class ConversationFormat:
    """How turns become one text.

    Attributes:
        format: ``chat``, the tokenizer's chat template; or ``plain``, a transcript.
        system: the system turn; in a plain transcript it stands first. None: there is none.
        user: plain transcripts only: the environment's turn and everything up to the assistant's, with ``{observation}``.
        assistant_end: plain transcripts only: what follows the assistant's turn. Where a completion already ends with
            it (a stop string), it is not repeated.
        choice_prefix: put before a listed choice, such as the space that an answer begins with.
    """

    format: Literal["chat", "plain"] = "chat"
    system: str | None = None
    user: str = "{observation}\n"
    assistant_end: str = "\n"
    choice_prefix: str = ""


class Conversation:
    """Renders the environment's turns for one tokenizer.

    Args:
        tokenizer: of the model.
        format: how turns become text.

    Raises:
        TeaError: the tokenizer has no chat template, its template refuses two turns or hides what the assistant said, or
            ``user`` lacks ``{observation}``.

    Attributes:
        terminator: token ids that end an assistant's turn, for choices that are scored and not generated; may be empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: ConversationFormat) -> None:
        self._tokenizer, self._format = tokenizer, format
        self._choices: dict[str, list[int]] = {}
        if format.format == "plain":
            if "{observation}" not in format.user:
                raise TeaError(
                    f"expected {{observation}} in the user turn of a plain conversation, got {format.user!r}; put it in"
                )
            self.terminator = self._encode(format.assistant_end)
            return
        if not getattr(tokenizer, "chat_template", None):
            raise TeaError(
                f"expected a model with a chat template, got one without ({tokenizer.name_or_path}); set format plain, or use "
                "an instruction-tuned model"
            )
        # The template closes the assistant's turn with the token that the model ends its turns with.
        self.terminator = self._encode(self._after_assistant("observation"))[:1]

    def first(self, observation: str) -> list[int]:
        """Token ids up to the assistant's first turn."""
        system, form = self._format.system, self._format
        if form.format == "plain":
            text = (system or "") + form.user.replace("{observation}", observation)
            return list(self._tokenizer(text)["input_ids"])
        return self._encode(self._render([{"role": "user", "content": observation}]))

    def following(self, completion: Sequence[int], observation: str) -> list[int]:
        """Token ids between an assistant's turn, given as sampled, and the next one."""
        if self._format.format == "plain":
            text, end = self._format.user.replace("{observation}", observation), self._format.assistant_end
            ended = self._tokenizer.decode(list(completion)).endswith(end)
            return self._encode(text if ended else end + text)
        ids = self._encode(self._after_assistant(observation))
        # The model has ended its turn itself, with the token that the template would.
        return ids[1:] if completion and ids[:1] == list(completion[-1:]) else ids

    def choice(self, text: str) -> list[int]:
        """Token ids of a listed choice, its end included."""
        if text not in self._choices:  # the same ones are listed turn after turn
            self._choices[text] = self._encode(self._format.choice_prefix + text) + self.terminator
        return self._choices[text]

    def _after_assistant(self, observation: str) -> str:
        """What the template puts between the end of the assistant's words and the beginning of its next ones."""
        rendered = self._render(
            [
                {"role": "user", "content": "observation"},
                {"role": "assistant", "content": _MARK},
                {"role": "user", "content": observation},
            ]
        )
        before, mark, after = rendered.partition(_MARK)
        if not mark:
            raise TeaError(
                f"the chat template of {self._tokenizer.name_or_path} leaves out what the assistant said before, so a "
                "conversation cannot go on from it; set format plain"
            )
        return after

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._format.system is not None:
            messages = [{"role": "system", "content": self._format.system}, *messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs and raise what they like
            reason = " ".join(str(error).split())
            raise TeaError(f"the model's chat template refuses the conversation: {reason}") from error
        return str(rendered)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
