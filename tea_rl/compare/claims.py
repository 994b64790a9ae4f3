"""The project's claims, each with what this comparison says of it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from tea_rl.compare.intervals import paired_difference
from tea_rl.compare.results import FrontierPoint, Results
from tea_rl.compare.summary import OURS, Row, Summary, level_time

#: What issue and README promise against the peer named here.
PEER = "grpo-lora"
TIMES_SOONER, LEVEL, MEMORY_SHARE = 8.0, 0.8, 0.2


@dataclass(frozen=True)
class Claim:
    """A promise and its answer.

    Attributes:
        text: the promise.
        holds: None where the comparison cannot tell.
        answer: what was found, in plain words.
    """

    text: str
    holds: bool | None
    answer: str


@dataclass(frozen=True)
class AgainstPeer:
    """Our method beside one peer; ratios above 1 speak for ours, NaN where there is nothing to divide.

    Attributes:
        sooner: time of the peer over ours to the level; a lower bound if ``peer_never``.
        level: of ``sooner``.
        peer_never: the peer did not get there in the ``peer_seconds`` that it trained.
        memory, parameters: of the peer over ours.
        reward: ours minus the peer's: mean, low, high.
        at_equal_kl: ours on its frontier, at the peer's KL, minus the peer's.
        how_equal: where on the frontier that is, or why it cannot be told.
    """

    peer: str
    level: float
    sooner: float
    peer_never: bool
    peer_seconds: float
    memory: float
    parameters: float
    reward: tuple[float, float, float]
    at_equal_kl: float
    how_equal: str


def against_peer(ours: Row, peer: Row, level: float) -> AgainstPeer:
    """Compare our row with a peer's, times at a reward level."""
    own, other = (level_time(row.method.seeds, level) for row in (ours, peer))
    sooner, never, trained = math.nan, False, peer.average(lambda seed: seed.train_seconds)
    if math.isfinite(own.seconds) and own.seconds > 0:
        never = math.isinf(other.seconds)
        sooner = (trained if never else other.seconds) / own.seconds
    parameters = ours.average(lambda seed: float(seed.trainable_parameters)) or math.nan
    frontier = mean_frontier(ours)
    rewards = [[seed.metrics.reward_sampled for seed in row.method.seeds] for row in (ours, peer)]
    return AgainstPeer(
        peer.name,
        level,
        sooner,
        never,
        trained,
        peer.peak_memory / ours.peak_memory,
        peer.average(lambda seed: float(seed.trainable_parameters)) / parameters,
        tuple(paired_difference(*rewards)),  # type: ignore[arg-type]
        reward_at_kl(frontier, peer.kl) - peer.reward.mean,
        _place_on(frontier, peer),
    )


def mean_frontier(row: Row) -> list[FrontierPoint]:
    """Reward and KL at each strength, means over seeds, by strength."""
    found: dict[float, list[FrontierPoint]] = defaultdict(list)
    for seed in row.method.seeds:
        for point in seed.frontier:
            found[point.strength].append(point)
    return [
        FrontierPoint(
            strength=strength,
            reward=sum(p.reward for p in found[strength]) / len(found[strength]),
            kl=sum(p.kl for p in found[strength]) / len(found[strength]),
        )
        for strength in sorted(found)
    ]


def reward_at_kl(frontier: list[FrontierPoint], kl: float) -> float:
    """Reward that the frontier has at a KL, straight between its points; NaN below it.

    Beyond its last point it is what that point has: a larger budget need not be used.
    """
    points = sorted(frontier, key=lambda point: point.kl)
    if not points or math.isnan(kl) or kl < points[0].kl:
        return math.nan
    for before, after in zip(points, points[1:], strict=False):
        if before.kl <= kl <= after.kl:
            share = (kl - before.kl) / (after.kl - before.kl) if after.kl > before.kl else 1.0
            return before.reward + share * (after.reward - before.reward)
    return points[-1].reward


def _place_on(frontier: list[FrontierPoint], peer: Row) -> str:
    """Where on our frontier a peer's KL lies, in words."""
    if math.isnan(peer.kl):
        return f"the KL of {peer.name} was not measured"
    if not frontier:
        return "the strengths of our head were not measured"
    points = sorted(frontier, key=lambda point: point.kl)
    if peer.kl < points[0].kl:
        return f"KL {peer.kl:.2g} of {peer.name} is below the smallest of our frontier, {points[0].kl:.2g}"
    if peer.kl > points[-1].kl:
        last = points[-1]
        return f"at KL {peer.kl:.2g}, beyond our frontier: its last point has KL {last.kl:.2g} (strength {last.strength:g})"
    below = max((p for p in points if p.kl <= peer.kl), key=lambda point: point.kl)
    above = min((p for p in points if p.kl >= peer.kl), key=lambda point: point.kl)
    if above.kl == below.kl:
        return f"at KL {peer.kl:.2g}, strength {below.strength:g}"
    return f"at KL {peer.kl:.2g}, between strength {below.strength:g} and {above.strength:g}"


def judge_claims(results: Results, summary: Summary) -> list[Claim]:
    """The four claims against the peer; empty where either side was not asked for."""
    asked = {method.name for method in results.methods}
    if not {OURS, PEER} <= asked:
        return []
    level = LEVEL if LEVEL in results.levels else max(results.levels, default=LEVEL)
    texts = [
        f"reward {level:g} at least {TIMES_SOONER:g} times sooner than best {PEER}",
        f"peak memory at most {MEMORY_SHARE:.0%} of {PEER}",
        f"fewer trainable parameters than {PEER}",
        f"at equal KL a reward no lower than {PEER}",
    ]
    ours, peer = summary.row(OURS), summary.row(PEER)
    if ours is None or peer is None:
        missing = OURS if ours is None else PEER
        return [Claim(text, None, f"cannot be told, {missing} did not finish") for text in texts]
    found = against_peer(ours, peer, level)
    judged = [_sooner(found, ours, level), _memory(found), _parameters(found), _equal_kl(found)]
    return [Claim(text, holds, answer) for text, (holds, answer) in zip(texts, judged, strict=True)]


def _sooner(found: AgainstPeer, ours: Row, level: float) -> tuple[bool | None, str]:
    own = level_time(ours.method.seeds, level)
    if math.isnan(own.seconds):
        return None, "cannot be told, no curve was recorded"
    if math.isinf(own.seconds):
        return False, f"no, ours had reward {level:g} with {own.reached} of {own.seeds} seeds"
    if math.isnan(found.sooner):
        return None, "cannot be told, no curve was recorded"
    if not found.peer_never:
        holds = found.sooner >= TIMES_SOONER
        return holds, f"{'yes' if holds else 'no'}, {found.sooner:.1f}"
    bound = f"at least {found.sooner:.1f} times (not reached within {found.peer_seconds:.0f} s)"
    return (True, f"yes, {bound}") if found.sooner >= TIMES_SOONER else (None, f"cannot be told, {bound}")


def _memory(found: AgainstPeer) -> tuple[bool | None, str]:
    if math.isnan(found.memory):
        return None, "cannot be told, memory was not measured"
    holds = 1 / found.memory <= MEMORY_SHARE
    return holds, f"{'yes' if holds else 'no'}, {1 / found.memory:.0%}"


def _parameters(found: AgainstPeer) -> tuple[bool | None, str]:
    if not found.parameters > 0:
        return None, "cannot be told, no parameters were counted"
    holds = found.parameters > 1
    return holds, f"{'yes' if holds else 'no'}, {1 / found.parameters:.0%} of its number"


def _equal_kl(found: AgainstPeer) -> tuple[bool | None, str]:
    if math.isnan(found.at_equal_kl):
        return None, f"cannot be told, {found.how_equal}"
    holds = found.at_equal_kl >= 0
    return holds, f"{'yes' if holds else 'no'}, {found.at_equal_kl:+.2f} {found.how_equal}"
