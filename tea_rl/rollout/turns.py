"""The model's turns in a multi-turn rollout: what is new is read over the kept cache, then written or chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tea_rl.backbone import Backbone
from tea_rl.head.context import ContextState
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import sample_slots
from tea_rl.head.scratch import Scratch
from tea_rl.rollout.cache import CachedRow
from tea_rl.rollout.choices import score_choices
from tea_rl.rollout.conversation import Conversation
from tea_rl.rollout.decode import choose_tokens, ending_tokens, uniforms_on
from tea_rl.rollout.environments import Seat
from tea_rl.rollout.episode_batch import EpisodeSettings, EpisodeStart, Turn
from tea_rl.rollout.records import Records
from tea_rl.rollout.sequences import Prefilled, Sequences, extend, join, like_lengths, prefill


@dataclass(eq=False)
class Live:
    """An episode that is being played.

    Attributes:
        number: which of the starts it is.
        ids, mask: the conversation so far, and which tokens of it the model wrote.
        cached: what is known of its beginning; None before the first pass.
        turns: its turns so far.
        completion: token ids of the newest.
    """

    number: int
    start: EpisodeStart
    seat: Seat
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    cached: CachedRow | None = None
    turns: list[Turn] = field(default_factory=list)
    completion: list[int] = field(default_factory=list)
    observation: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def hear(self, ids: list[int], observation: str, info: dict[str, Any]) -> None:
        """Take the environment's text."""
        self.ids, self.mask = self.ids + ids, self.mask + [False] * len(ids)
        self.observation, self.info = observation, info

    @property
    def expert(self) -> str | None:
        """What the environment's expert would answer now; None where there is none."""
        answer = self.info.get("expert")
        return None if answer is None else str(answer)

    def say(self, token: int) -> None:
        """Append a token of the model."""
        self.ids.append(token)
        self.mask.append(True)
        self.completion.append(token)


class Turns:
    """Takes the model's turns in many conversations at once.

    Args:
        backbone: the frozen model.
        head: the policy.
        settings: how to play.
        seed: key of the rollout.

    Attributes:
        conversation: renders what the environments say.
        max_context: tokens of a whole conversation.
        records: what the turns left.
        model_seconds: spent in backbone and head.
        tokens_run: token positions that went through the backbone.
    """

    def __init__(
        self, backbone: Backbone, head: TeaHead, settings: EpisodeSettings, seed: Sequence[int]
    ) -> None:
        self.backbone, self.head, self.settings, self.seed = backbone, head, settings, tuple(seed)
        self.conversation = Conversation(backbone.tokenizer, settings.conversation)
        self.max_context = settings.max_context or backbone.max_length
        self.ending = ending_tokens(backbone, settings.stop)
        self.records = Records(head, settings.temperature)
        self.model_seconds = 0.0
        self.tokens_run = 0
        self._scratch = Scratch()

    def take(self, lives: Sequence[Live]) -> None:
        """One turn of every episode; each environment steps as soon as its turn is complete."""
        choosing = [live for live in lives if self.listed(live.info)]
        speaking = [live for live in lives if not self.listed(live.info)]
        if speaking:
            self._speak(speaking)
        if choosing:
            self._choose(choosing)

    def last_states(self, lives: Sequence[Live]) -> list[Tensor]:
        """The state after everything that was said, of each episode, as far as it fits into the context."""
        for live in lives:
            del live.ids[self.max_context :], live.mask[self.max_context :]
        with self._in_model():
            last, at = self._read(lives, room=0)
        self.tokens_run += last.tokens_run
        return [last.states[place].clone() for place in at.tolist()]

    def listed(self, info: Mapping[str, Any]) -> list[str]:
        """What the environment lists as choices, if they are to be scored."""
        listed = info.get("admissible") if self.settings.choose_admissible else None
        if not isinstance(listed, (list, tuple)):
            return []
        return list(dict.fromkeys(choice for choice in listed if isinstance(choice, str) and choice))

    def fits(self, live: Live) -> bool:
        """Whether the longest answer still fits into the context."""
        listed = [len(self.conversation.choice(choice)) for choice in self.listed(live.info)]
        return len(live.ids) + max(listed, default=self.settings.max_new_tokens) <= self.max_context

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.model_seconds += time.perf_counter() - started

    def _read(self, lives: Sequence[Live], room: int) -> tuple[Prefilled, Tensor]:
        """Run what is new of the conversations; those that are alike run once. Returns which of them each episode has."""
        context = self.head.config.context
        distinct: dict[tuple[int, ...], Live] = {}
        for live in lives:
            distinct.setdefault(tuple(live.ids), live)
        new = [ids for ids, live in distinct.items() if live.cached is None]
        known = [(ids, live.cached) for ids, live in distinct.items() if live.cached is not None]
        groups = like_lengths([len(ids) - row.length for ids, row in known])
        parts, order = [], list(new)
        if new:
            parts.append(prefill(self.backbone, new, ContextState.begin(context), DynamicCache()))
        for group in groups:
            token_ids, rows = zip(*(known[number] for number in group), strict=True)
            alone = room if len(groups) + len(parts) == 1 else 0
            parts.append(extend(self.backbone, rows, token_ids, context, alone)[1])
            order += token_ids
        place = {ids: number for number, ids in enumerate(order)}
        at = torch.tensor([place[tuple(live.ids)] for live in lives], device=self.backbone.device)
        for live in lives:
            live.cached = None  # it is in the batch now; two copies would be twice the memory
        return join(parts, context, room), at

    def _speak(self, lives: Sequence[Live]) -> None:
        """One turn of free text; every environment steps as soon as its turn is complete."""
        longest = self.settings.max_new_tokens
        uniforms = self._uniforms(lives, longest)
        greedy = torch.tensor([self._greedy(live) for live in lives], device=self.backbone.device)
        numbers = torch.tensor([self._open_turn(live) for live in lives], device=self.backbone.device)
        with self._in_model():
            sequences = Sequences(self.backbone, *self._read(lives, longest), longest)
        for position in range(longest):
            rows = sequences.rows
            with self._in_model():
                step = choose_tokens(
                    self.head,
                    sequences.states,
                    sequences.at,
                    uniforms[rows, position],
                    greedy[rows],
                    self.settings.temperature,
                    scratch=self._scratch,
                )
                ended = self.ending[step.actions]
                step.rows, step.positions = numbers[rows], torch.full_like(rows, position)
                self.records.add(step, len(sequences.states))
            last = position == longest - 1
            cuts: dict[int, CachedRow] = {}
            for row, place, token, end in zip(
                rows.tolist(), sequences.at.tolist(), step.actions.tolist(), ended.tolist(), strict=True
            ):
                live = lives[row]
                live.say(token)
                if end or last:
                    with self._in_model():
                        live.cached = cuts[place] if place in cuts else sequences.cut(place)
                    cuts[place] = live.cached
                    live.turns[-1].finished = end
                    self._act(live, self.backbone.tokenizer.decode(live.completion, skip_special_tokens=True))
            if last or bool(ended.all()):
                break
            with self._in_model():
                sequences.advance(step.actions, ended)
        self.tokens_run += sequences.tokens_run

    def _choose(self, lives: Sequence[Live]) -> None:
        """One turn between listed choices."""
        draws = self._uniforms(lives, 1)[:, 0]
        uniforms, guided = draws[:, 0], (draws[:, 1] < self.settings.guidance).tolist()
        listed = [self.listed(live.info) for live in lives]
        with self._in_model():
            after, at = self._read(lives, room=0)
            self.tokens_run += after.tokens_run
            sequences = Sequences(self.backbone, after, at, 0)
            places = at.tolist()
            cuts = {place: sequences.cut(place) for place in set(places)}
            # Episodes with the same conversation and the same choices are scored once.
            keys = [(place, tuple(texts)) for place, texts in zip(places, listed, strict=True)]
            first = {key: lives[number] for number, key in reversed(list(enumerate(keys)))}
            token_ids = {key: [self.conversation.choice(text) for text in key[1]] for key in first}
            scored, tokens_run = score_choices(
                self.backbone,
                self.head,
                [cuts[place] for place, _ in first],
                [live.ids for live in first.values()],
                after.states[[place for place, _ in first]],
                list(token_ids.values()),
                self.settings.temperature,
                self.settings.num_parallel,
            )
            self.tokens_run += tokens_run
            shared = {
                key: self.records.share(record, key[1]) for key, record in zip(first, scored, strict=True)
            }
        for number, (live, key) in enumerate(zip(lives, keys, strict=True)):
            logps, expert = shared[key].logps, live.expert
            if guided[number] and expert is not None and expert in key[1]:
                chosen = key[1].index(expert)
            elif self._greedy(live):
                chosen = int(logps.argmax())
            else:
                chosen = int(sample_slots(logps.unsqueeze(0), uniforms[number : number + 1]))
            self.records.decide(self._open_turn(live), shared[key], chosen)
            for token in token_ids[key][chosen]:
                live.say(token)
            # The chosen tokens run again, with the next observation: they are few.
            live.cached = cuts[key[0]]
            self._act(live, key[1][chosen])

    def _uniforms(self, lives: Sequence[Live], length: int) -> Tensor:
        keys = [(*self.seed, live.start.index, live.start.generation, len(live.turns)) for live in lives]
        return uniforms_on(self.backbone.device, keys, length)

    def _greedy(self, live: Live) -> bool:
        return self.settings.greedy or live.start.greedy

    def _open_turn(self, live: Live) -> int:
        """Begin an episode's next turn; its number in the records."""
        turn = Turn(live.number, len(live.turns), live.observation, expert=live.expert)
        live.turns.append(turn)
        live.completion = []
        return self.records.open(turn)

    def _act(self, live: Live, text: str) -> None:
        live.turns[-1].completion = text
        live.seat.step(text)
