"""Environments in threads of their own: slow ones overlap, and one that raises, hangs or answers nonsense fails alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tea_rl.errors import TeaError

if TYPE_CHECKING:
    import gymnasium

#: Longest single wait in seconds. The patience with a call is counted in such slices, so that a process that was
#: suspended for a while does not find its environments late.
_SLICE = 0.1
#: Seconds that making an environment may take: some generate their games first.
MAKING = 300.0
#: Longest reason that is kept of a failure, in characters.
_REASON = 200


@dataclass(frozen=True)
class Reply:
    """What an environment answered; with ``failed`` nothing else counts.

    Attributes:
        observation: the new user-turn text.
        reward: of this step; 0 after a reset.
        terminated, truncated: as the environment says.
        invalid: the environment did not understand the action (``info["invalid"]``).
        parsed: the action as it understood it (``info["parsed"]``), as text.
        info: as the environment says.
        failed: why this is no answer, or None.
    """

    observation: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    invalid: bool = False
    parsed: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


class Seat:
    """One environment and the thread it lives in: made, reset, stepped and closed there.

    The thread is a daemon: one that hangs does not keep the interpreter from leaving.

    Args:
        make_env: makes the environment; called at once, and waited for.
        patience: seconds to wait.

    Raises:
        TeaError: as ``make_env`` raised it.
        TimeoutError: it takes longer.
        Exception: anything else that ``make_env`` raised.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], patience: float = MAKING) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future] | None] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="tea-rl environment").start()
        self.pending: Future | None = None
        try:
            made = self._call(make_env)
            _wait([made], patience)
            if not made.done():
                raise TimeoutError(f"it is not there after {patience:g} seconds")
            self._env: gymnasium.Env = made.result()
        except BaseException:
            self._calls.put(None)
            raise

    def reset(self, index: int) -> None:
        """Begin episode ``index``; `collect` gives the answer."""
        self.pending = self._call(lambda: _first_reply(self._env.reset(seed=index, options={"index": index})))

    def step(self, action: str) -> None:
        """Answer with ``action``; `collect` gives what comes back."""
        self.pending = self._call(lambda: _next_reply(self._env.step(action)))

    def leave(self) -> Future:
        """Close the environment and end the thread, after what it is at; the future is done when it is closed."""
        closed = self._call(lambda: self._env.close())
        self._calls.put(None)
        return closed

    def _call(self, function: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._calls.put((function, future))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:  # also an environment's sys.exit() is its own affair
                future.set_exception(error)


def collect(seats: Sequence[Seat], timeout: float) -> list[Reply]:
    """Wait for every seat's answer; those that are out when none has come for ``timeout`` seconds have failed.

    Environments that wait for one another, as those of libraries with a lock do, are not late while they get on.
    """
    futures = [seat.pending for seat in seats if seat.pending is not None]
    _wait(futures, timeout)
    return [_reply(future, timeout) for future in futures]


def close(seats: Sequence[Seat], timeout: float) -> None:
    """Close the environments, waiting as `collect` does."""
    _wait([seat.leave() for seat in seats], timeout)


def _wait(futures: Sequence[Future], timeout: float) -> None:
    """Until all are done, or none has been for ``timeout`` seconds."""
    waited, pending = 0.0, set(futures)
    while pending and waited < timeout:
        some = min(_SLICE, timeout - waited)
        done, pending = wait(pending, timeout=some)
        waited = 0.0 if done else waited + some


def _reply(future: Future, timeout: float) -> Reply:
    if not future.done():
        return Reply(failed=f"no answer within {timeout:g} seconds")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, _BadReply):
        return Reply(failed=str(error))
    return Reply(failed=describe(error))


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON]
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair could not be logged


class _BadReply(Exception):
    """An answer that is not what Gymnasium prescribes."""


def _first_reply(answer: Any) -> Reply:
    observation, info = _parts(answer, 2, "reset() must return (text, info)")
    return Reply(_text(observation), info=_info(info))


def _next_reply(answer: Any) -> Reply:
    what = "step() must return (text, reward, terminated, truncated, info)"
    observation, reward, terminated, truncated, info = _parts(answer, 5, what)
    try:
        reward = float(reward)
    except (TypeError, ValueError, RuntimeError):
        raise _BadReply(f"the reward must be a number, got {type(reward).__name__}") from None
    if not math.isfinite(reward):
        raise _BadReply(f"the reward must be finite, got {reward}")
    info = _info(info)
    over, cut, invalid = (_flag(value) for value in (terminated, truncated, info.get("invalid", False)))
    parsed = info.get("parsed")
    return Reply(
        _text(observation), reward, over, cut, invalid, None if parsed is None else str(parsed), info
    )


def _parts(answer: Any, count: int, what: str) -> tuple[Any, ...]:
    if not isinstance(answer, tuple) or len(answer) != count:
        got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise _BadReply(f"{what}, got {got}")
    return answer


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise _BadReply(f"the observation must be text, got {type(observation).__name__}")
    return observation


def _flag(value: Any) -> bool:
    try:
        return bool(value)
    except Exception:
        raise _BadReply(
            f'terminated, truncated and info["invalid"] must be true or false, got {type(value).__name__}'
        ) from None


def _info(info: Any) -> dict[str, Any]:
    if not isinstance(info, Mapping):
        raise _BadReply(f"info must be a dictionary, got {type(info).__name__}")
    return dict(info)


def make_seat(make_env: Callable[[], gymnasium.Env]) -> Seat | str:
    """A seat, or why there is none.

    Raises:
        TeaError: a mistake that a user can mend.
    """
    try:
        return Seat(make_env)
    except TeaError:
        raise
    except Exception as error:
        return f"the environment cannot be made: {describe(error)}"
