"""Multi-turn rollouts: many episodes of text environments played together by a TEA head.

All episodes that run take their turn together: observations run in one ragged pass over the kept cache, completions are
decoded in one batch, and an environment steps in its own thread as soon as its completion ends. Between two turns the
batch is packed anew, which leaves no padding behind, and finished episodes make room for waiting ones. Episodes with the
same conversation so far share one cache row. Nothing depends on how long an environment takes, so that a rollout can be repeated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.rollout.environments import Reply, Seat, close, collect, describe, make_seat
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, EpisodeSettings, EpisodeStart
from tea_rl.rollout.sequences import attends_to_all
from tea_rl.rollout.turns import Live, Turns

if TYPE_CHECKING:
    import gymnasium

#: Seconds that the environments may take to close.
_CLOSING = 5.0


@torch.no_grad()
def run_episodes(
    backbone: Backbone,
    head: TeaHead,
    make_env: Callable[[], gymnasium.Env],
    starts: Sequence[EpisodeStart],
    settings: EpisodeSettings,
    seed: Sequence[int] = (0,),
) -> EpisodeBatch:
    """Play episodes and record every token that the model writes.

    What an episode samples depends on ``seed``, its start and the turn, not on the batch around it.

    Args:
        backbone: the frozen model.
        head: the policy, at its current ``strength``; it need not be installed.
        make_env: makes one environment, whose observations and actions are text; called for as many as are played
            together, and again to replace one that failed.
        starts: which episodes.
        settings: how to play.
        seed: key of this rollout.

    Raises:
        TeaError: the model's cache cannot be kept across turns, the settings or the chat template do not fit it, or
            ``make_env`` says so. An environment that fails costs its episode and raises nothing.
    """
    _check(backbone, head, settings)
    run = _Run(backbone, head, make_env, starts, settings, seed)
    training = head.training
    head.eval()
    try:
        return run.play()
    finally:
        close(run.seats, min(settings.step_timeout, _CLOSING))
        head.train(training)


def _check(backbone: Backbone, head: TeaHead, settings: EpisodeSettings) -> None:
    config = backbone.model.config
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    chunked = "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())
    if chunked or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise TeaError(
            f"multi-turn rollouts keep the cache of {config.model_type} across turns, which needs full or sliding-window "
            "attention in every layer; choose another model"
        )
    if head.config.context.num_means and not attends_to_all(backbone):
        raise TeaError(
            f"multi-turn rollouts with head.context need full attention and given positions, which {config.model_type} "
            "has not: set head.context.layers to [], or choose another model"
        )
    context = settings.max_context or backbone.max_length
    if context > backbone.max_length:
        raise TeaError(
            f"max_context is {context}, but the model reads {backbone.max_length} tokens; lower it"
        )
    if settings.max_new_tokens >= context:
        raise TeaError(
            f"max_new_tokens is {settings.max_new_tokens}, which leaves no room for a conversation in a context of {context} "
            "tokens; lower it"
        )


class _Run:
    """One call of `run_episodes`.

    Attributes:
        seats: all environments that still answer.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: TeaHead,
        make_env: Callable[[], gymnasium.Env],
        starts: Sequence[EpisodeStart],
        settings: EpisodeSettings,
        seed: Sequence[int],
    ) -> None:
        self.turns = Turns(backbone, head, settings, seed)
        self.make_env, self.starts, self.settings = make_env, starts, settings
        self.waiting = deque(range(len(starts)))
        self.live: list[Live] = []
        self.seats: list[Seat] = []
        self.free: list[Seat] = []
        self.episodes: dict[int, Episode] = {}
        self.device = backbone.device

    def play(self) -> EpisodeBatch:
        """All episodes from beginning to end."""
        started = time.perf_counter()
        while self.waiting or self.live:
            self._admit()
            self.turns.take(self.live)
            self._listen()
        episodes = [self.episodes[number] for number in range(len(self.starts))]
        tokens, choices, turns = self.turns.records.close(
            [number for number, episode in enumerate(episodes) if episode.failed is not None],
            self.device,
        )
        seconds = time.perf_counter() - started
        return EpisodeBatch(
            tokens, choices, turns, episodes, seconds, self.turns.model_seconds, self.turns.tokens_run
        )

    def _admit(self) -> None:
        """Fill the batch with waiting episodes."""
        while self.waiting and len(self.live) < self.settings.num_parallel:
            room = self.settings.num_parallel - len(self.live)
            new = [
                live
                for number in [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
                if (live := self._seated(number)) is not None
            ]
            for live in new:
                live.seat.reset(live.start.index)
            self.live += new
            for live, reply in zip(
                new, collect([live.seat for live in new], self.settings.step_timeout), strict=True
            ):
                self._begin(live, reply)

    def _seated(self, number: int) -> Live | None:
        seat = self.free.pop() if self.free else make_seat(self.make_env)
        start = self.starts[number]
        if isinstance(seat, str):
            self.episodes[number] = Episode(start, float("nan"), 0, failed=seat)
            return None
        if seat not in self.seats:
            self.seats.append(seat)
        return Live(number, start, seat)

    def _begin(self, live: Live, reply: Reply) -> None:
        ids = self._tokens(live, reply, partial(self.turns.conversation.first, reply.observation))
        if ids is None:
            return
        if not ids:
            self._fail(live, "the first observation gives no tokens")
            return
        live.hear(ids, reply.observation, reply.info)
        if not self.turns.fits(live):
            self._finish(live, truncated=True, reason="context")

    def _listen(self) -> None:
        """Take the environments' answers."""
        acted = list(self.live)
        replies = collect([live.seat for live in acted], self.settings.step_timeout)
        cut: list[tuple[Live, str]] = []
        for live, reply in zip(acted, replies, strict=True):
            if reply.failed is None:
                turn = live.turns[-1]
                turn.reward, turn.invalid, turn.parsed = reply.reward, reply.invalid, reply.parsed
                turn.terminated, turn.truncated = reply.terminated, reply.truncated
            if reply.terminated:
                live.hear([], reply.observation, reply.info)
                self._finish(live, terminated=True)
                continue
            following = partial(self.turns.conversation.following, live.completion, reply.observation)
            ids = self._tokens(live, reply, following)
            if ids is None:
                continue
            live.hear(ids, reply.observation, reply.info)
            if reply.truncated:
                cut.append((live, "environment"))
            elif len(live.turns) >= self.settings.max_turns:
                cut.append((live, "turns"))
            elif not self.turns.fits(live):
                cut.append((live, "context"))
        self._cut(cut)

    def _tokens(self, live: Live, reply: Reply, encode: Callable[[], list[int]]) -> list[int] | None:
        """Token ids of a reply, or None where it fails the episode; text may be such that no tokenizer takes it."""
        if reply.failed is not None:
            self._fail(live, reply.failed)
            return None
        try:
            for choice in self.turns.listed(reply.info):
                self.turns.conversation.choice(choice)
            return encode()
        except Exception as error:
            self._fail(live, f"what it says cannot be tokenised: {describe(error)}")
            return None

    def _cut(self, cut: Sequence[tuple[Live, str]]) -> None:
        """End episodes before their end; the state after their last observation is for a value to bootstrap from."""
        if not cut:
            return
        states = self.turns.last_states([live for live, _ in cut])
        for (live, reason), state in zip(cut, states, strict=True):
            self._finish(live, truncated=True, reason=reason, final_state=state)

    def _finish(self, live: Live, failed: str | None = None, **how: Any) -> None:
        self.live.remove(live)
        if failed is None:
            self.free.append(live.seat)
        total = sum(turn.reward for turn in live.turns) if failed is None else float("nan")
        self.episodes[live.number] = Episode(
            live.start,
            total,
            len(live.turns),
            failed=failed,
            token_ids=live.ids,
            model_mask=live.mask,
            final_observation=live.observation,
            info=live.info,
            **how,
        )

    def _fail(self, live: Live, reason: str) -> None:
        """Give up an episode and its environment, which may be in any state, or never come back."""
        self.seats.remove(live.seat)
        live.seat.leave()
        self._finish(live, failed=reason)
