"""What runs in a process that computes rewards: load the functions, then score what comes until the parent has gone.

Messages to the parent are ``("begun", time)``, then ``("scored", RewardBatch)`` or ``("failed", text of a TeaError)``.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from tea_rl.errors import TeaError
from tea_rl.rewards.loader import RewardBatch, RewardSum, load_rewards

#: Seconds an idle worker may take to leave in an orderly manner before it is killed.
GRACE = 1.0


class Task(NamedTuple):
    """What a worker is asked to score."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]
    seed: tuple[int, ...]


def serve(descriptor: int) -> None:
    """Main function of a worker: load the rewards, then score what comes until the parent has gone.

    Args:
        descriptor: this process's end of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    pipe = Connection(descriptor)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):  # nobody wants the answer any more
        try:
            if (setup := inbox.get()) is None:
                return
            rewards = load_rewards(*_opened(setup))
            import numpy  # noqa: F401  # seeded before each call, and start-up is not counted
        except TeaError as error:
            pipe.send(("failed", str(error)))
            return
        while (message := inbox.get()) is not None:
            pipe.send(("begun", time.monotonic()))
            pipe.send(_answer(rewards, message))


def _listen(pipe: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Pass messages on; when the parent has gone, see that this process goes, whatever its rewards are doing."""
    while True:
        try:
            packed = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        try:
            inbox.put(ForkingPickler.loads(packed))
        except Exception as error:  # a value that can be packed there and not unpacked here
            inbox.put(error)
    inbox.put(None)
    time.sleep(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(os.getpid(), signal.SIGKILL)


def _opened(message: Any) -> Any:
    if isinstance(message, Exception):
        raise TeaError(
            "expected settings and data columns that a reward worker can read, got "
            f"{type(message).__name__}: {' '.join(str(message).split())}; use numbers and texts."
        ) from message
    return message


def _answer(rewards: RewardSum, message: Any) -> tuple[str, RewardBatch | str]:
    try:
        task = _opened(message)
        _seed(task.seed)
        return "scored", rewards(task.prompts, task.completions, task.columns)
    except TeaError as error:
        return "failed", str(error)


def _seed(seed: Sequence[int]) -> None:
    """Seed what rewards may draw from."""
    import numpy as np

    state = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    if "torch" in sys.modules:  # it is imported for a reward that needs it only
        sys.modules["torch"].manual_seed(int(state[2]))
