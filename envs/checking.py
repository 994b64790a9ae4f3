"""Look an environment over before training on it: does it keep the rules, and how far does no skill get?"""

from __future__ import annotations

import json
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import gymnasium
import numpy as np

from tea_rl.envs.base import tidy
from tea_rl.envs.junk import HIDING, hidden, junk
from tea_rl.envs.making import make_env
from tea_rl.envs.wrappers import reward_range

#: An answer to what was observed; None when the policy has none.
Policy: TypeAlias = Callable[[dict[str, Any]], str | None]
#: What `play` gives of one episode; None of one whose environment failed.
Outcome: TypeAlias = tuple[float, list[tuple[str, str, float]]] | None
#: Episodes of a policy at these starts.
PlayMany: TypeAlias = Callable[[Policy, Sequence[int]], Iterable[Outcome]]

_MOST_CANDIDATES = 40
_SELECTION_EPISODES = 8
#: Starts that choose the best constant answer lie here, so that its score is measured on others.
_SELECTION_START = 1_000_507
#: Backstop for an environment that never ends by itself.
_MOST_TURNS = 200
_JUNK = 200


@dataclass(frozen=True)
class Score:
    """Mean return over episodes, and its standard error."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.stderr:.3f}"


@dataclass
class EnvReport:
    """What :func:`check_text_env` found.

    Attributes:
        id: of the environment.
        kwargs: its settings.
        prompt: the observation of start 0.
        admissible: what it accepts at start 0, where it says so.
        max_turns: of an episode, where declared.
        declared_rewards: bounds of the reward of one turn, by the environment.
        seen_rewards: smallest and largest reward of one turn in this check.
        episodes: behind each score.
        constant_answer: the best answer to give always.
        constant_score: what it earns, on other starts than chose it.
        random_score: a random admissible answer each turn; None where none are listed.
        expert_score: the expert's answer each turn; None without an expert.
        problems: rules that are broken; empty when all is well.
    """

    id: str
    kwargs: dict[str, Any]
    prompt: str = ""
    admissible: list[str] | None = None
    max_turns: int | None = None
    declared_rewards: tuple[float, float] = (float("-inf"), float("inf"))
    seen_rewards: tuple[float, float] | None = None
    episodes: int = 0
    constant_answer: str | None = None
    constant_score: Score | None = None
    random_score: Score | None = None
    expert_score: Score | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no rule is broken."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        low, high = self.declared_rewards
        seen = f", seen {self.seen_rewards[0]:g} to {self.seen_rewards[1]:g}" if self.seen_rewards else ""
        limit = f", at most {self.max_turns} turns" if self.max_turns else ""
        best = f" (always {self.constant_answer!r:.40})" if self.constant_answer is not None else ""
        lines = [
            f"{self.id} {json.dumps(self.kwargs) if self.kwargs else ''}".rstrip(),
            f"reward a turn:   {low:g} to {high:g}{seen}{limit}",
            f"mean return over {self.episodes} episodes:",
            f"  best constant answer  {self.constant_score or 'unknown'}{best}",
            f"  random valid answer   {self.random_score or 'unknown: no admissible answers listed'}",
            f"  expert                {self.expert_score or 'unknown: no expert'}",
            *(f"problem: {problem}" for problem in self.problems),
        ]
        return "\n".join(
            [*lines, "checks: all passed" if self.ok else f"checks: {len(self.problems)} failed"]
        )


def check_text_env(id: str, kwargs: Mapping[str, Any] | None = None, episodes: int = 100) -> EnvReport:
    """Check an environment and measure what constant, random and expert answers earn.

    Checked: gymnasium's own ``check_env``; the same seed, and the same index with the same seed, give the same
    transcript; the same index gives the same prompt whatever the seed; junk raises nothing and is never paid; rewards
    are finite and within the declared bounds; ``info`` holds what it must.

    Args:
        id: of a gymnasium environment with text.
        kwargs: its settings.
        episodes: behind each score; the starts are the indices 0 to ``episodes - 1``.

    Raises:
        TeaError: the environment cannot be made.
    """
    report = EnvReport(id, dict(kwargs or {}), episodes=episodes)
    env = make_env(id, kwargs)
    try:
        _Checker(env, report).run()
    finally:
        env.close()
    return report


def play(
    env: gymnasium.Env[str, str], policy: Policy, index: int, seed: int
) -> tuple[float, list[tuple[str, str, float]]]:
    """One episode: its return, and ``(observation, action, reward)`` of every turn.

    It ends early where the policy has no answer.
    """
    observation, info = env.reset(seed=seed, options={"index": index})
    total, transcript = 0.0, []
    for _ in range(_MOST_TURNS):
        action = policy(info)
        if action is None:
            break
        following, reward, terminated, truncated, info = env.step(action)
        transcript.append((observation, action, float(reward)))
        observation, total = following, total + float(reward)
        if terminated or truncated:
            break
    return total, transcript


def reference_scores(play_many: PlayMany, starts: Sequence[int]) -> dict[str, float]:
    """Mean return on these starts of policies that read nothing, and of the expert; failed episodes are left out.

    Args:
        play_many: plays a policy.
        starts: their indices.

    Returns:
        ``constant`` (the best answer to give always, chosen on other starts), ``random`` (a listed answer at random) and
        ``expert``, each only where the environment says enough for it.
    """
    report = EnvReport("", {}, episodes=len(starts))
    _Scorer(report, starts, play_many).run()
    found = {"constant": report.constant_score, "random": report.random_score, "expert": report.expert_score}
    return {name: score.mean for name, score in found.items() if score is not None}


class _Scorer:
    """What policies without skill and the expert earn; fills that part of a report.

    Attributes:
        candidates: answers that were tried as the constant one.
    """

    def __init__(self, report: EnvReport, starts: Sequence[int], play_many: PlayMany) -> None:
        self.report, self.starts, self._play_many = report, starts, play_many
        self._rng = np.random.default_rng(0)
        self.candidates: dict[str, None] = {}

    def run(self) -> None:
        """Play them all."""
        report = self.report
        report.expert_score = self._score(self._expert)
        report.random_score = self._score(lambda info: _random_answer(info, self._rng))
        few = min(report.episodes, _SELECTION_EPISODES)
        others = range(_SELECTION_START, _SELECTION_START + few)
        self._mean(lambda info: _note(info.get("expert"), self.candidates), others)
        for answer in report.admissible or []:
            self.candidates.setdefault(answer)
        answers = list(self.candidates)
        if len(answers) > _MOST_CANDIDATES:
            chosen = self._rng.choice(len(answers), _MOST_CANDIDATES, replace=False)
            answers = [answers[number] for number in sorted(chosen)]
        if answers:
            earned = {answer: self._mean(_always(answer), others) for answer in answers}
            report.constant_answer = max(answers, key=lambda answer: earned[answer])
            report.constant_score = self._score(_always(report.constant_answer))

    def _expert(self, info: dict[str, Any]) -> str | None:
        listed = info.get("admissible")
        if self.report.admissible is None and isinstance(listed, (list, tuple)):
            self.report.admissible = [choice for choice in listed if isinstance(choice, str)]
        return info.get("expert")

    def _returns(self, policy: Policy, starts: Sequence[int]) -> list[float] | None:
        returns = []
        for outcome in self._play_many(policy, starts):
            if outcome is None:
                continue
            total, transcript = outcome
            if not transcript:
                return None
            self._see([reward for *_, reward in transcript])
            returns.append(total)
        return returns

    def _mean(self, policy: Policy, starts: Sequence[int]) -> float:
        return statistics.fmean(self._returns(policy, starts) or [float("-inf")])

    def _score(self, policy: Policy) -> Score | None:
        returns = self._returns(policy, self.starts)
        if not returns:
            return None
        error = statistics.stdev(returns) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
        return Score(statistics.fmean(returns), error)

    def _see(self, rewards: Sequence[float]) -> None:
        if not np.isfinite(rewards).all():
            self.report.problems.append(f"a reward is not finite: {list(rewards)[:10]}")
            return
        low, high = self.report.seen_rewards or (rewards[0], rewards[0])
        self.report.seen_rewards = min(low, *rewards), max(high, *rewards)


class _Checker:
    """Fills a report; every check adds its own problems."""

    def __init__(self, env: gymnasium.Env[str, str], report: EnvReport) -> None:
        self.env, self.report = env, report
        self.scorer = _Scorer(
            report,
            range(report.episodes),
            lambda policy, starts: (play(env, policy, index, index) for index in starts),
        )

    def run(self) -> None:
        report = self.report
        low, high = report.declared_rewards = reward_range(self.env)
        if self.env.has_wrapper_attr("max_turns"):
            report.max_turns = int(self.env.get_wrapper_attr("max_turns"))
        for name, check in (
            ("gymnasium's check_env", self._gymnasium),
            ("info", self._info),
            ("determinism", self._determinism),
            ("scores", self.scorer.run),
            ("junk actions", self._junk),
        ):
            try:
                check()
            except Exception as error:  # a broken environment is the finding, not a crash of the checker
                reason = " ".join(str(error).split())[:300]
                report.problems.append(f"{name}: {type(error).__name__}: {reason}")
        if report.seen_rewards and not (low <= report.seen_rewards[0] and report.seen_rewards[1] <= high):
            report.problems.append(
                f"rewards from {report.seen_rewards} are outside of the declared {(low, high)}"
            )

    def _gymnasium(self) -> None:
        from gymnasium.utils.env_checker import check_env

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(self.env.unwrapped, skip_render_check=not self.env.metadata.get("render_modes"))
        for warning in caught:
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(warning.message))  # gymnasium colours its warnings
            if text.startswith("WARN:"):
                self.report.problems.append(f"gymnasium's check_env warns: {' '.join(text[5:].split())}")

    def _info(self) -> None:
        self.report.prompt, info = self.env.reset(seed=0, options={"index": 0})
        self.report.admissible = info.get("admissible")
        wanted = {"turn": int, "invalid": bool, "parsed": str | None}
        self._compare(info, wanted, "reset")
        *_, info = self.env.step("")
        self._compare(info, wanted, "step")
        if info.get("turn") != 1:
            self.report.problems.append(f'after one action info["turn"] is {info.get("turn")!r}, expected 1')

    def _compare(self, info: dict[str, Any], wanted: dict[str, Any], place: str) -> None:
        for key, kind in wanted.items():
            if key not in info or not isinstance(info[key], kind):
                self.report.problems.append(
                    f'{place}() must give info["{key}"] as {getattr(kind, "__name__", kind)}, got {info.get(key)!r:.60}'
                )

    def _determinism(self) -> None:
        for index in range(3):
            if self._transcript(index, 7) != self._transcript(index, 7):
                self.report.problems.append(f"start {index} with the same seed gives another transcript")
            prompts = {self.env.reset(seed=seed, options={"index": index})[0] for seed in (1, 2, 3)}
            if len(prompts) > 1:
                self.report.problems.append(f"start {index} gives another prompt with another seed")
        by_seed = [self.env.reset(seed=11)[0] for _ in range(2)]
        if by_seed[0] != by_seed[1]:
            self.report.problems.append("reset(seed=11) gives another prompt the second time")

    def _transcript(self, index: int, seed: int) -> list[tuple[str, str, float]]:
        rng = np.random.default_rng(seed)
        return play(self.env, lambda info: _random_answer(info, rng) or "anything", index, seed)[1]

    def _junk(self) -> None:
        found = [
            junk_problem(problem) for problem in paid_junk(self.env, _JUNK, list(self.scorer.candidates))
        ]
        self.report.problems += found[:5]


def paid_junk(
    env: gymnasium.Env[str, str], count: int, answers: Sequence[str] = (), seed: int = 0
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Try ``count`` junk actions and yield ``(action, reward, info)`` of each that was paid though it is no answer.

    Every other one hides an answer that is right or accepted at that very moment in something else; the rest is fixed or
    drawn. An action is junk when the environment calls it invalid, when it differs from what the environment says it
    understood, or when it is none of the answers that ``info`` gave beforehand (where it gave any). Episodes go on with a
    real answer now and then, so that junk also meets later turns.

    Args:
        env: the environment.
        count: how many junk actions.
        answers: more answers to hide in junk.
        seed: of the random characters, and of the episodes.
    """
    rng = np.random.default_rng(seed)
    _, info = env.reset(seed=seed, options={"index": 0})
    for number, action in enumerate(junk(count, answers, rng)):
        if number % 3 == 2 and (real := info.get("expert") or _random_answer(info, rng)) is not None:
            *_, terminated, truncated, info = env.step(real)
            if terminated or truncated:
                _, info = env.reset(seed=seed, options={"index": number})
        listed = _known(info)
        if number % 2 and (hiding := _hidden_now(listed, number // 2)) is not None:
            action = hiding
        _, reward, terminated, truncated, info = env.step(action)
        parsed = info.get("parsed")
        understood = not info.get("invalid") and parsed is not None and _same(action, parsed)
        understood = understood and (not listed or any(_same(action, answer) for answer in listed))
        if float(reward) > 0 and not understood:
            yield action, float(reward), info
        if terminated or truncated:
            _, info = env.reset(seed=seed, options={"index": number})


def junk_problem(found: tuple[str, float, dict[str, Any]]) -> str:
    """A line about one finding of :func:`paid_junk`."""
    action, reward, info = found
    return f"junk is paid: {action!r:.80} earned {reward:g}, understood as {info.get('parsed')!r:.40}"


def _hidden_now(listed: list[str], number: int) -> str | None:
    """One of the answers, the right one as a rule, in one of the frames; None without answers."""
    if not listed:
        return None
    frame, round_ = HIDING[number % len(HIDING)], number // len(HIDING)
    answer = listed[0] if round_ % 3 else listed[round_ // 3 % len(listed)]
    return next(iter(hidden([answer], (frame,), listed)), None)


def _same(action: str, parsed: str) -> bool:
    return tidy(action).strip("[]") == tidy(parsed).strip("[]")


def _known(info: dict[str, Any]) -> list[str]:
    found = [info.get("expert"), info.get("answer"), *(info.get("admissible") or [])]
    return [answer for answer in found if isinstance(answer, str)]


def _note(answer: str | None, seen: dict[str, None]) -> str | None:
    if answer is not None:
        seen.setdefault(answer)
    return answer


def _always(answer: str) -> Policy:
    return lambda info: answer


def _random_answer(info: dict[str, Any], rng: np.random.Generator) -> str | None:
    choices = info.get("admissible")
    return choices[int(rng.integers(len(choices)))] if choices else None
