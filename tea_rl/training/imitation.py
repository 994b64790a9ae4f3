"""A supervised start: the head imitates an environment's expert, where the original model never earns a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.context import ContextState
from tea_rl.head.layer import AUTO_SHORTLIST_SIZE, TeaHead
from tea_rl.objectives.supervised import cross_entropy
from tea_rl.recipe import EnvConfig, Recipe
from tea_rl.rollout.conversation import Conversation
from tea_rl.rollout.environments import describe
from tea_rl.rollout.episode_batch import EpisodeSettings
from tea_rl.rollout.scripted import ScriptedEpisode, ScriptedPlay
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.embed import plan_batches
from tea_rl.states.labelling import TokenLabeller
from tea_rl.training.choice_imitation import imitate_choices
from tea_rl.training.supervised_passes import supervised_passes

if TYPE_CHECKING:
    import gymnasium


def imitate(
    backbone: Backbone,
    head: TeaHead,
    make_env: Callable[[], gymnasium.Env[str, str]],
    settings: EpisodeSettings,
    recipe: Recipe,
    notify: Callable[[str], None],
) -> float:
    """Play the expert's episodes, read them once, and train on its answers by cross-entropy.

    Where answers are listed, `imitate_choices` does it.

    Args:
        backbone, head: what learns.
        make_env: makes one environment.
        settings: how episodes are played.
        recipe: gives the number of episodes, and how to learn.
        notify: hears of episodes that are left out.

    Returns:
        cross-entropy of the last pass, nats a token, or with listed answers (`imitate_choices`) nats an answer.

    Raises:
        TeaError: if no expert's episode can be imitated.
    """
    if settings.choose_admissible:
        return imitate_choices(backbone, head, make_env, settings, recipe, notify)
    conversation = Conversation(backbone.tokenizer, settings.conversation)
    context = settings.max_context or backbone.max_length
    conversations = expert_conversations(make_env, conversation, settings, recipe.env, context, notify)
    tokens = _answers(backbone, head, conversations, settings.temperature)

    def losses(index: Tensor) -> tuple[Tensor, Tensor]:
        terms = head.terms(tokens.select(index), settings.temperature, recipe.anchor.divergence)
        return cross_entropy(terms.logps), terms.anchor

    size = recipe.objective.minibatch_tokens
    return supervised_passes(head, recipe, settings.temperature, len(tokens), size, losses)


def check_expert(
    make_env: Callable[[], gymnasium.Env[str, str]], settings: EpisodeSettings, env: EnvConfig
) -> None:
    """Refuse an environment without an expert, before a model is loaded.

    Raises:
        TeaError: it has none at start 0.
    """

    def look(info: dict[str, Any]) -> None:
        _expert_of(env, info)

    with _scripted(make_env, settings) as scripted:
        scripted.play(look, [0])  # should that start fail, another may not


def expert_conversations(
    make_env: Callable[[], gymnasium.Env[str, str]],
    conversation: Conversation,
    settings: EpisodeSettings,
    env: EnvConfig,
    max_tokens: int,
    notify: Callable[[str], None],
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of the expert's episodes at starts 0, 1, ... and which of them it said; cut behind the last answer that fits.

    An episode whose environment fails is left out, which ``notify`` hears of.

    Raises:
        TeaError: if the environment has no expert, fails at every start, or leaves no room for any answer.
    """
    episodes = env.expert.episodes
    with _scripted(make_env, settings) as scripted:
        played = scripted.play(lambda info: _expert_of(env, info), range(episodes))
    failures = [episode.failed for episode in played if episode.failed is not None]
    found = []
    for episode in played:
        if episode.failed is not None:
            continue
        try:
            ids, said = _conversation(conversation, episode, max_tokens)
        except TeaError:
            raise
        except Exception as error:
            failures.append(f"what it says cannot be tokenised: {describe(error)}")
            continue
        if any(said):
            found.append((ids, said))
    if not found:
        reason = failures[0] if failures else f"no answer fits into {max_tokens} tokens"
        raise TeaError(
            f"none of {episodes} expert episodes can be imitated ({reason}); mend that, or set env.expert.episodes to 0"
        )
    if failures:
        notify(f"{len(failures)} of {episodes} expert episodes failed and are left out ({failures[0]})")
    return found


def _scripted(make_env: Callable[[], gymnasium.Env[str, str]], settings: EpisodeSettings) -> ScriptedPlay:
    return ScriptedPlay(make_env, settings.num_parallel, settings.max_turns, settings.step_timeout)


def _expert_of(env: EnvConfig, info: dict[str, Any]) -> str:
    answer = info.get("expert")
    if answer is None:
        raise TeaError(
            f"env.expert.episodes is {env.expert.episodes}, but {env.id} has no expert; set it to 0"
        )
    return str(answer)


def _conversation(
    conversation: Conversation, episode: ScriptedEpisode, max_tokens: int
) -> tuple[list[int], list[bool]]:
    """An episode as token ids, and which of them are answers."""
    ids: list[int] = []
    said: list[bool] = []
    end = 0
    answer: list[int] = []
    for number, (observation, words, _) in enumerate(episode.turns):
        heard = conversation.following(answer, observation) if number else conversation.first(observation)
        answer = conversation.choice(words)
        ids, said = [*ids, *heard], [*said, *[False] * len(heard)]
        if len(ids) + len(answer) > max_tokens:
            break
        ids, said = [*ids, *answer], [*said, *[True] * len(answer)]
        end = len(ids)
    return ids[:end], said[:end]  # what nothing answers need not be read, and might not fit


@torch.no_grad()
def _answers(
    backbone: Backbone,
    head: TeaHead,
    conversations: list[tuple[list[int], list[bool]]],
    temperature: float,
) -> TokenBatch:
    """Records of the expert's tokens, from one pass over every conversation."""
    size = AUTO_SHORTLIST_SIZE if head.full_vocabulary else head.shortlist_size
    labeller = TokenLabeller.for_backbone(backbone, size, temperature)
    batches, num_states = [], 0
    for rows in plan_batches([len(ids) for ids, _ in conversations]):
        longest = max(len(conversations[row][0]) for row in rows)
        ids = torch.full((len(rows), longest), backbone.pad_token_id)
        real = torch.zeros(len(rows), longest, dtype=torch.long)
        said = torch.zeros(len(rows), longest, dtype=torch.bool)
        # Padding on the right: causal attention never reads it.
        for number, row in enumerate(rows):
            tokens, mine = conversations[row]
            ids[number, : len(tokens)] = torch.tensor(tokens)
            real[number, : len(tokens)] = 1
            said[number, : len(tokens)] = torch.tensor(mine)
        ids, real, said = (part.to(backbone.device) for part in (ids, real, said))
        states = backbone.forward(ids, attention_mask=real, context=ContextState.begin(head.config.context))
        batch = labeller.label(states[:, :-1][said[:, 1:]], ids[said], said.sum(dim=1).tolist())
        batch.state_ids = torch.arange(len(batch), device=backbone.device) + num_states
        num_states += len(batch)
        batches.append(batch)
    return TokenBatch.cat(batches)
