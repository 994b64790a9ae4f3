"""Imitation of an expert that chooses between listed answers: whole answers are compared, and mistakes are learnt from, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.objectives.supervised import cross_entropy
from tea_rl.recipe import Recipe
from tea_rl.rollout.choices import ChoiceBatch
from tea_rl.rollout.episode_batch import EpisodeBatch, EpisodeSettings, EpisodeStart
from tea_rl.rollout.episodes import run_episodes
from tea_rl.training.supervised_passes import supervised_passes
from tea_rl.training.turn_learner import decision_terms

if TYPE_CHECKING:
    import gymnasium

#: Separates the random numbers of these episodes from those of training and evaluation, whose keys hold a step here.
_STREAM = 2**31 + 1


def imitate_choices(
    backbone: Backbone,
    head: TeaHead,
    make_env: Callable[[], gymnasium.Env[str, str]],
    settings: EpisodeSettings,
    recipe: Recipe,
    notify: Callable[[str], None],
) -> float:
    """Play with the expert's guidance, then alone, and learn what the expert would have answered (DAgger, Ross et al. 2011).

    The loss is the cross-entropy of the policy over the listed answers. All of them were scored to play, so that the head
    learns from the states after wrong answers as well: whether an answer fits is best seen behind its last token.

    Args:
        backbone, head: what learns.
        make_env: makes one environment.
        settings: how episodes are played.
        recipe: gives the rounds, their episodes, and how to learn.
        notify: hears of each round, and of episodes that are left out.

    Returns:
        cross-entropy of the last pass, nats an answer.

    Raises:
        TeaError: if the expert's answer is never among those that are listed, or every episode fails.
    """
    expert, env = recipe.env.expert, recipe.env
    rounds = [(expert.episodes, expert.guidance), *[(expert.dagger_episodes, 0.0)] * expert.dagger_rounds]
    known: list[ChoiceBatch] = []
    loss, first = 0.0, 0
    for count, guidance in rounds:
        places = [divmod(index, env.num_starts) for index in range(first, first + count)]
        starts = [EpisodeStart(start, generation) for generation, start in places]
        first += count
        played = run_episodes(
            backbone,
            head,
            make_env,
            starts,
            replace(settings, guidance=guidance),
            (recipe.train.seed, _STREAM),
        )
        advice = expert_choices(played)
        _report(played, advice, guidance, notify)
        known += [advice] if advice is not None else []
        if not known:
            raise TeaError(
                f"nothing of {count} episodes can be imitated: the expert of {env.id} never names an answer that is listed; mend "
                "that, or set env.expert.episodes to 0"
            )
        loss = _fit(head, ChoiceBatch.cat(known), settings.temperature, recipe)
    return loss


def expert_choices(played: EpisodeBatch) -> ChoiceBatch | None:
    """The decisions in which the expert names a listed answer, with that one as the choice taken; None if there are none."""
    choices = played.choices
    if choices is None:
        return None
    named = torch.full((len(choices),), -1)
    turns = choices.turns.tolist()
    for choice, decision in enumerate(choices.decision_of_choice.tolist()):
        if choices.texts[choice] == played.turns[turns[decision]].expert:
            named[decision] = choice
    taken = (named >= 0).nonzero().squeeze(1)
    if not len(taken):
        return None
    device = choices.chosen.device
    return replace(choices, chosen=named.to(device)).select(taken.to(device))


def _report(
    played: EpisodeBatch, advice: ChoiceBatch | None, guidance: float, notify: Callable[[str], None]
) -> None:
    sound = [episode for episode in played.episodes if episode.failed is None]
    if not sound:
        raise TeaError(
            f"none of {len(played.episodes)} expert episodes can be imitated ({played.episodes[0].failed}); mend that, or set "
            "env.expert.episodes to 0"
        )
    if len(sound) < len(played.episodes):
        reason = next(episode.failed for episode in played.episodes if episode.failed is not None)
        notify(
            f"{len(played.episodes) - len(sound)} of {len(played.episodes)} expert episodes failed and are left out ({reason})"
        )
    who = f"guided in {guidance:.0%} of the turns" if guidance else "by itself"
    mean = sum(episode.total_reward for episode in sound) / len(sound)
    answers = 0 if advice is None else len(advice)
    turns = sum(episode.length for episode in sound)
    notify(
        f"played {len(sound)} episodes {who}: return {mean:+.3f}, {answers} of {turns} turns with an expert's answer"
    )


def _fit(head: TeaHead, known: ChoiceBatch, temperature: float, recipe: Recipe) -> float:
    """The passes of one round; mean cross-entropy of the last."""
    divergence = recipe.anchor.divergence

    def losses(index: Tensor) -> tuple[Tensor, Tensor]:
        batch = known.select(index.to(known.chosen.device))
        terms = head.terms(batch.tokens, temperature, divergence)
        logps, distance, _ = decision_terms(batch, terms.logps, divergence)
        return cross_entropy(logps), distance

    size = max(1, round(recipe.objective.minibatch_tokens * len(known) / len(known.tokens)))
    return supervised_passes(head, recipe, temperature, len(known), size, losses)
