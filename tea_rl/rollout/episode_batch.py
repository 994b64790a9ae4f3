"""What a multi-turn rollout takes and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.rollout.choices import ChoiceBatch
from tea_rl.rollout.conversation import ConversationFormat
from tea_rl.rollout.trajectory import TokenBatch


@dataclass(frozen=True)
class EpisodeStart:
    """Which episode to play.

    Attributes:
        index: of the start, at least 0; the environment is reset with it as seed and as ``options["index"]``.
        generation: tells episodes of the same start apart; their random numbers differ.
        greedy: take the likeliest token, or choice, throughout.
    """

    index: int
    generation: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class EpisodeSettings:
    """How to play.

    Attributes:
        num_parallel: episodes that are stepped together.
        max_new_tokens: longest turn of the model, in tokens.
        max_turns: an episode with as many turns is cut.
        max_context: tokens of a whole conversation; an episode whose next turn might not fit is cut. None: what the
            model can read.
        temperature: divides the logits; the policy is defined at it.
        greedy: every episode takes the likeliest tokens.
        stop: strings; a turn ends with the first token whose text contains one.
        conversation: chat template or plain transcript.
        choose_admissible: where the environment lists choices (``info["admissible"]``), score them instead of writing.
        guidance: share of the turns between listed choices in which the environment's expert (``info["expert"]``) is followed,
            where it names one of them.
        step_timeout: seconds that the environments may take to answer.
    """

    num_parallel: int = 64
    max_new_tokens: int = 32
    max_turns: int = 32
    max_context: int | None = None
    temperature: float = 1.0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    conversation: ConversationFormat = field(default_factory=ConversationFormat)
    choose_admissible: bool = False
    guidance: float = 0.0
    step_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "num_parallel",
            "max_new_tokens",
            "max_turns",
            "max_context",
            "step_timeout",
            "temperature",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TeaError(f"expected {name} above 0, got {value}; raise it")


@dataclass
class Turn:
    """One observation, the model's answer, and what came of it.

    Attributes:
        episode: index into `EpisodeBatch.episodes`.
        turn: of the episode, from 0.
        observation: the text that was answered.
        completion: the answer, without special tokens; a stop string that ended it included.
        reward: of this turn.
        terminated, truncated: as the environment said after it.
        invalid: the environment did not understand the answer (``info["invalid"]``).
        parsed: the answer as the environment understood it (``info["parsed"]``), where it says so.
        expert: what the environment's expert would have answered (``info["expert"]``), where there is one.
        finished: the model ended the turn itself (else: ``max_new_tokens``); True for a choice.
    """

    episode: int
    turn: int
    observation: str
    completion: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    invalid: bool = False
    parsed: str | None = None
    expert: str | None = None
    finished: bool = True


@dataclass
class Episode:
    """One episode.

    Attributes:
        start: which one.
        total_reward: sum over its turns; NaN where it failed, so that no mean takes it in unnoticed.
        length: turns.
        terminated: the environment says that it is over: nothing follows, a value bootstraps nothing.
        truncated: cut before its end: a value bootstraps from ``final_state``. Never together with ``terminated``.
        reason: why it was cut: ``environment``, ``turns`` (``max_turns``) or ``context`` (``max_context``).
        failed: why the environment failed, or None. A failed episode has no tokens and no signal.
        token_ids: the whole conversation as the model read and wrote it.
        model_mask: which of them the model wrote.
        final_state: state after the last observation of a truncated episode, as far as it fits into the context,
            ``(W,)``; None otherwise, and where there was no turn.
        final_observation: the newest text of the environment, which nothing answered.
        info: of the last step (of the reset, before any).
    """

    start: EpisodeStart
    total_reward: float
    length: int
    terminated: bool = False
    truncated: bool = False
    reason: str | None = None
    failed: str | None = None
    token_ids: list[int] = field(default_factory=list)
    model_mask: list[bool] = field(default_factory=list)
    final_state: Tensor | None = None
    final_observation: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class EpisodeBatch:
    """Episodes in the order of their starts.

    Attributes:
        tokens: every token that the model wrote freely, ordered by turn, then position: ``rows`` is an index into
            ``turns``, ``positions`` count within the turn. None of failed episodes. May be empty.
        choices: the turns that were decided between listed choices, none of failed episodes; their tokens are here and
            not in ``tokens``. None where there was none.
        turns: every turn, ordered by episode, then turn; those of failed episodes, too.
        episodes: one for each start.
        seconds: wall time of the rollout.
        model_seconds: of these, spent in backbone and head; the rest is the environments and the text around them.
        tokens_run: token positions that went through the backbone, padding included.
    """

    tokens: TokenBatch
    choices: ChoiceBatch | None
    turns: list[Turn]
    episodes: list[Episode]
    seconds: float
    model_seconds: float
    tokens_run: int

    @property
    def num_failed(self) -> int:
        """Episodes whose environment failed."""
        return sum(episode.failed is not None for episode in self.episodes)

    @property
    def environment_seconds(self) -> float:
        """Everything but the model."""
        return self.seconds - self.model_seconds
