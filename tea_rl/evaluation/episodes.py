"""Held-out episodes of an environment, and what no skill earns in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tea_rl.backbone import Backbone
from tea_rl.evaluation.evaluate import Evaluation, Sample
from tea_rl.evaluation.metrics import distinct_n, mean
from tea_rl.head.layer import TeaHead
from tea_rl.rollout.choices import ChoiceBatch
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, EpisodeSettings, EpisodeStart
from tea_rl.rollout.episodes import run_episodes
from tea_rl.rollout.scripted import Policy, ScriptedPlay
from tea_rl.rollout.trajectory import TokenBatch

if TYPE_CHECKING:
    import gymnasium

#: Separates evaluation's random numbers from training's, whose keys hold the step here.
_EVAL_STREAM = 2**31


def evaluate_episodes(
    backbone: Backbone,
    head: TeaHead,
    make_env: Callable[[], gymnasium.Env[str, str]],
    starts: Sequence[int],
    settings: EpisodeSettings,
    num_generations: int,
    seed: int = 0,
) -> Evaluation:
    """Play held-out starts with a head at its current strength: ``num_generations`` sampled episodes of each and a greedy one.

    Returns:
        metrics ``eval_reward`` (mean return of the sampled episodes that did not fail), ``eval_reward_greedy``, those of
        `rollout_metrics` with ``eval_`` before them, ``eval_distinct_2`` and ``eval_base_nll`` (nats a token); the samples are
        the first sampled episode of each start, as a transcript.
    """
    episodes = [
        EpisodeStart(start, number, number == num_generations)
        for start in starts
        for number in range(num_generations + 1)
    ]
    batch = run_episodes(backbone, head, make_env, episodes, settings, (seed, _EVAL_STREAM))
    sampled = [episode for episode in batch.episodes if not episode.start.greedy]
    surprises = [-logp for records in _records(batch) for logp in records.base_logps.tolist()]
    wanted = {n for n, episode in enumerate(batch.episodes) if not episode.start.greedy}
    metrics = {
        "eval_reward": mean_return(sampled),
        "eval_reward_greedy": mean_return([e for e in batch.episodes if e.start.greedy]),
        **{f"eval_{name}": value for name, value in rollout_metrics(batch).items()},
        "eval_distinct_2": distinct_n([t.completion for t in batch.turns if t.episode in wanted], 2),
        "eval_base_nll": mean(surprises),
    }
    first = range(0, len(batch.episodes), num_generations + 1)
    earned = [episode.total_reward for episode in sampled if episode.failed is None]
    return Evaluation(metrics, [transcript(batch, number) for number in first], earned)


def scores_without_skill(
    make_env: Callable[[], gymnasium.Env[str, str]],
    starts: Sequence[int],
    notify: Callable[[str], None],
    settings: EpisodeSettings | None = None,
) -> dict[str, float]:
    """What constant, random and expert answers earn on these starts: beating the first two is the claim.

    Args:
        make_env: makes one environment.
        starts: indices.
        notify: hears of starts that are left out because the environment failed there, and why.
        settings: how long an episode and the patience with it are, and how many are stepped together; None: the defaults.

    Returns:
        ``eval_constant_reward``, ``eval_random_reward`` and ``eval_expert_reward``, each where the environment says enough
        for it.
    """
    from tea_rl.envs.checking import Outcome, reference_scores

    settings = settings or EpisodeSettings()
    limits = settings.num_parallel, settings.max_turns, settings.step_timeout
    with ScriptedPlay(make_env, *limits) as scripted:

        def play_many(policy: Policy, which: Sequence[int]) -> list[Outcome]:
            played = scripted.play(policy, which)
            return [None if one.failed is not None else (one.total_reward, one.turns) for one in played]

        found = reference_scores(play_many, starts)
    if scripted.failures:
        reason = next(iter(scripted.failures.values()))
        notify(
            f"scores without skill leave out {len(scripted.failures)} starts where the environment failed ({reason})"
        )
    return {f"eval_{name}_reward": value for name, value in found.items()}


def mean_return(episodes: Sequence[Episode]) -> float:
    """Mean return of the episodes that did not fail; NaN if all did."""
    return mean([episode.total_reward for episode in episodes if episode.failed is None])


def rollout_metrics(batch: EpisodeBatch) -> dict[str, float]:
    """``kl`` (exact, nats a token or decision), ``entropy``, ``turns`` (an episode), ``invalid`` (share of turns), ``truncated`` and
    ``failed`` (shares of episodes)."""
    records = _records(batch)
    turns = [turn for turn in batch.turns if batch.episodes[turn.episode].failed is None]
    sound = [episode for episode in batch.episodes if episode.failed is None]
    return {
        "kl": mean([kl for some in records for kl in some.kl.tolist()]),
        "entropy": mean([entropy for some in records for entropy in some.entropy.tolist()]),
        "turns": mean([float(episode.length) for episode in sound]),
        "invalid": mean([float(turn.invalid) for turn in turns]),
        "truncated": mean([float(episode.truncated) for episode in sound]),
        "failed": batch.num_failed / max(1, len(batch.episodes)),
    }


def _records(batch: EpisodeBatch) -> list[TokenBatch | ChoiceBatch]:
    """Tokens that were written, and decisions between listed choices."""
    return [batch.tokens] if batch.choices is None else [batch.tokens, batch.choices]


@dataclass
class EpisodeSample(Sample):
    """An episode as a sample: the ``prompt`` is its first observation, the ``completion`` everything after that as one text.

    Attributes:
        episode: the same turn by turn, as JSON values: ``start``; ``turns``, each with ``turn``, ``observation``,
            ``completion``, ``reward`` and ``invalid``; ``final_observation``; ``cut`` and ``failed``, why, or None.
    """

    episode: dict[str, Any] = field(default_factory=dict)


def transcript(batch: EpisodeBatch, number: int) -> EpisodeSample:
    """An episode of a rollout for people."""
    episode = batch.episodes[number]
    turns = [turn for turn in batch.turns if turn.episode == number]
    told = {
        "start": episode.start.index,
        "turns": [
            {
                "turn": turn.turn,
                "observation": _loggable(turn.observation),
                "completion": _loggable(turn.completion),
                "reward": turn.reward,
                "invalid": turn.invalid,
            }
            for turn in turns
        ],
        "final_observation": _loggable(episode.final_observation),
        "cut": episode.reason,
        "failed": episode.failed,
    }
    if not turns:
        what = f"failed: {episode.failed}" if episode.failed is not None else "no room for a turn"
        return EpisodeSample(_loggable(episode.final_observation), f"({what})", episode.total_reward, told)
    text = turns[0].completion
    for turn in turns[1:]:
        text = _below(text, turn.observation) + turn.completion
    last = episode.final_observation if episode.failed is None else f"(failed: {episode.failed})"
    text = _loggable(_below(text, last))
    return EpisodeSample(_loggable(turns[0].observation), text, episode.total_reward, told)


def _loggable(text: str) -> str:
    """Without half surrogate pairs, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _below(text: str, line: str) -> str:
    return text + line if text.endswith("\n") or line.startswith("\n") else f"{text}\n{line}"
