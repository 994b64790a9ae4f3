"""Held-out episodes of an environment, and what no skill earns in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tea_rl.backbone import Backbone
from tea_rl.evaluation.evaluate import Evaluation, Sample
from tea_rl.evaluation.metrics import distinct_n, mean
from tea_rl.head.layer import TeaHead
from tea_rl.rollout.environments import describe
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, EpisodeSettings, EpisodeStart
from tea_rl.rollout.episodes import run_episodes

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
    surprises = (-batch.tokens.base_logps).tolist() or (
        [] if batch.choices is None else (-batch.choices.base_logps).tolist()
    )
    wanted = {n for n, episode in enumerate(batch.episodes) if not episode.start.greedy}
    metrics = {
        "eval_reward": mean_return(sampled),
        "eval_reward_greedy": mean_return([e for e in batch.episodes if e.start.greedy]),
        **{f"eval_{name}": value for name, value in rollout_metrics(batch).items()},
        "eval_distinct_2": distinct_n([t.completion for t in batch.turns if t.episode in wanted], 2),
        "eval_base_nll": mean(surprises),
    }
    first = range(0, len(batch.episodes), num_generations + 1)
    return Evaluation(metrics, [transcript(batch, number) for number in first])


def scores_without_skill(
    make_env: Callable[[], gymnasium.Env[str, str]], starts: Sequence[int], notify: Callable[[str], None]
) -> dict[str, float]:
    """What constant, random and expert answers earn on these starts: beating the first two is the claim.

    Returns:
        ``eval_constant_reward``, ``eval_random_reward`` and ``eval_expert_reward``, each where the environment says enough
        for it; none of them where it fails, which ``notify`` hears of.
    """
    from tea_rl.envs.checking import reference_scores

    env = make_env()
    try:
        found = reference_scores(env, starts)
    except Exception as error:  # an environment that fails now and then must not end the run here
        notify(f"no constant, random or expert score: {describe(error)}")
        return {}
    finally:
        env.close()
    return {f"eval_{name}_reward": value for name, value in found.items()}


def mean_return(episodes: Sequence[Episode]) -> float:
    """Mean return of the episodes that did not fail; NaN if all did."""
    return mean([episode.total_reward for episode in episodes if episode.failed is None])


def rollout_metrics(batch: EpisodeBatch) -> dict[str, float]:
    """``kl`` (exact, nats a token or decision), ``entropy``, ``turns`` (an episode), ``invalid`` (share of turns), ``truncated`` and
    ``failed`` (shares of episodes)."""
    records = batch.tokens if batch.choices is None else batch.choices
    turns = [turn for turn in batch.turns if batch.episodes[turn.episode].failed is None]
    sound = [episode for episode in batch.episodes if episode.failed is None]
    return {
        "kl": records.kl.mean().item(),
        "entropy": records.entropy.mean().item(),
        "turns": mean([float(episode.length) for episode in sound]),
        "invalid": mean([float(turn.invalid) for turn in turns]),
        "truncated": mean([float(episode.truncated) for episode in sound]),
        "failed": batch.num_failed / max(1, len(batch.episodes)),
    }


def transcript(batch: EpisodeBatch, number: int) -> Sample:
    """An episode as one text behind its first observation."""
    episode = batch.episodes[number]
    turns = [turn for turn in batch.turns if turn.episode == number]
    if not turns:
        return Sample("", f"(failed: {episode.failed})", float("nan"))
    text = turns[0].completion
    for turn in turns[1:]:
        text = _below(text, turn.observation) + turn.completion
    last = episode.final_observation if episode.failed is None else f"(failed: {episode.failed})"
    return Sample(turns[0].observation, _below(text, last), episode.total_reward)


def _below(text: str, line: str) -> str:
    return text + line if text.endswith("\n") or line.startswith("\n") else f"{text}\n{line}"
