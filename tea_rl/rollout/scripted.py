"""Episodes of policies that need no model - an expert, a constant answer - stepped as rollouts step theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from tea_rl.errors import TeaError
from tea_rl.rollout.environments import Reply, Seat, close, collect, describe, make_seat

if TYPE_CHECKING:
    import gymnasium

#: An answer to what the environment says of itself (``info``), or None where the policy has none: the episode ends there.
Policy: TypeAlias = Callable[[dict[str, Any]], str | None]
#: Seconds that the environments may take to close.
_CLOSING = 5.0


@dataclass
class ScriptedEpisode:
    """One episode.

    Attributes:
        start: its index.
        turns: observation, answer and reward of each turn.
        final_observation: the newest text of the environment, which nothing answered.
        ended: the environment said that it is over.
        failed: why the environment failed, or None.
    """

    start: int
    turns: list[tuple[str, str, float]] = field(default_factory=list)
    final_observation: str = ""
    ended: bool = False
    failed: str | None = None

    @property
    def total_reward(self) -> float:
        """Sum over its turns."""
        return sum(reward for *_, reward in self.turns)


class ScriptedPlay:
    """Plays such policies; an environment that raises, hangs or answers nonsense costs its own episode.

    Environments are kept from one call of `play` to the next. One that hangs costs a wait each time it is met, for all that
    are stepped together at once; a start where it failed is therefore not played again.

    Args:
        make_env: makes one environment.
        num_parallel: episodes that are stepped together.
        max_turns: an episode with as many turns is cut.
        step_timeout: seconds that the environments may take to answer.

    Attributes:
        failures: why the environment failed, by start.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        num_parallel: int,
        max_turns: int,
        step_timeout: float,
    ) -> None:
        self.make_env, self.num_parallel = make_env, num_parallel
        self.max_turns, self.step_timeout = max_turns, step_timeout
        self.failures: dict[int, str] = {}
        self._free: list[Seat] = []

    def __enter__(self) -> ScriptedPlay:
        return self

    def __exit__(self, *exc: object) -> None:
        close(self._free, min(self.step_timeout, _CLOSING))

    def play(self, policy: Policy, starts: Sequence[int]) -> list[ScriptedEpisode]:
        """One episode of each start.

        Raises:
            TeaError: as ``make_env`` or the policy raised it.
        """
        episodes: list[ScriptedEpisode] = []
        for first in range(0, len(starts), self.num_parallel):
            episodes += self._together(policy, starts[first : first + self.num_parallel])
        return episodes

    def _together(self, policy: Policy, starts: Sequence[int]) -> list[ScriptedEpisode]:
        episodes = [ScriptedEpisode(start, failed=self.failures.get(start)) for start in starts]
        # With what was said last: nothing yet.
        live: list[tuple[ScriptedEpisode, Seat, str | None]] = []
        for episode in episodes:
            seat = self._seat(episode)
            if seat is not None:
                seat.reset(episode.start)
                live.append((episode, seat, None))
        while live:
            replies = collect([seat for _, seat, _ in live], self.step_timeout)
            heard = zip(live, replies, strict=True)
            live = []
            for (episode, seat, said), reply in heard:
                answer = self._answer(policy, episode, seat, said, reply)
                if answer is not None:
                    seat.step(answer)
                    live.append((episode, seat, answer))
        return episodes

    def _seat(self, episode: ScriptedEpisode) -> Seat | None:
        if episode.failed is not None:
            return None
        seat = self._free.pop() if self._free else make_seat(self.make_env)
        if isinstance(seat, str):
            self._fail(episode, seat)
            return None
        return seat

    def _answer(
        self, policy: Policy, episode: ScriptedEpisode, seat: Seat, said: str | None, reply: Reply
    ) -> str | None:
        """Take the reply to what was ``said``; the next answer, or None at the end."""
        if reply.failed is not None:
            seat.leave()
            self._fail(episode, reply.failed)
            return None
        if said is not None:
            episode.turns.append((episode.final_observation, said, reply.reward))
        episode.final_observation = reply.observation
        episode.ended = reply.terminated or reply.truncated
        answer = None
        if not episode.ended and len(episode.turns) < self.max_turns:
            try:
                answer = policy(reply.info)
            except TeaError:
                raise
            except Exception as error:  # what it lists may be anything
                self._fail(episode, f"info cannot be answered: {describe(error)}")
        if answer is None:
            self._free.append(seat)
        return answer

    def _fail(self, episode: ScriptedEpisode, reason: str) -> None:
        episode.failed = self.failures[episode.start] = reason
