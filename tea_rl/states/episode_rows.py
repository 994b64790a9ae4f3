"""Episodes of an environment as rows of a store: one row a turn, the conversation before it as the prompt.

Offline objectives then treat a turn like any other completion. Its reward is the (discounted) return from that turn on, and
its group holds the same turn of all episodes with the same start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.head.layer import TeaHead
from tea_rl.objectives.credit import discounted_returns
from tea_rl.recipe import Recipe
from tea_rl.rollout.episode_batch import Episode, EpisodeBatch, Turn
from tea_rl.rollout.episodes import run_episodes
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.rows import StoredRow
from tea_rl.states.writer import StoreWriter
from tea_rl.training.episodes import environment_maker, episode_settings, nothing_played, starts_of_step
from tea_rl.training.files import iterate_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Settings of the environment that decide no byte of a store.
_WITHOUT_EFFECT = {"eval_starts", "expert", "gae_lambda", "step_timeout"}


class EpisodeSource:
    """The training episodes of a recipe, step by step, as its online run would play them first.

    Args:
        recipe: one with an environment.

    Attributes:
        unit: what is counted.
        per_step: episodes in a step, those that fail included.
        digest: of all settings that decide what is played, beside those of model, head and sampling.
        lost: episodes of this session that left no rows.
        reason: why the first of them failed.

    Raises:
        TeaError: the environment cannot be made, or its turns are choices between listed answers.
    """

    unit = "episodes"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.settings = recipe, episode_settings(recipe)
        if self.settings.choose_admissible:
            raise TeaError(
                f"recipe {recipe.name} chooses between the answers that {recipe.env.id} lists, and a store holds written turns "
                "only; add --set env.choose_admissible=false (and leave the wrapper admissible_actions out), or learn with "
                "tea-rl train"
            )
        self.make_env = environment_maker(recipe.env)
        self.per_step = len(starts_of_step(recipe, 1))
        env = recipe.env.model_dump(exclude=_WITHOUT_EFFECT)
        self.digest = hashlib.sha256(json.dumps(env, sort_keys=True).encode()).hexdigest()
        self.lost, self.reason = 0, ""
        self._seen: set[int] = set()

    def prepare(self, backbone: Backbone, head: TeaHead) -> None:
        """Take the model that plays."""
        self._backbone, self._head, self._tokenizer = backbone, head, backbone.tokenizer

    def steps_done(self, writer: StoreWriter) -> int:
        """Steps whose rows are on disk."""
        for item in (*writer.manifest.shards, *writer.manifest.parts):
            rows = iterate_jsonl((writer.path / f"{item['name']}.jsonl").read_bytes())
            self._seen |= {row["columns"]["episode"] for _, row in rows}
        return max(self._seen, default=-1) // self.per_step + 1

    def sample(self, step: int) -> tuple[list[StoredRow], TokenBatch]:
        """The rows of a step (from 1) and their tokens; none where every episode failed.

        Raises:
            TeaError: every episode failed, and there is no row of an earlier step either.
        """
        starts = starts_of_step(self.recipe, step)
        seed = (self.recipe.train.seed, step)
        batch = run_episodes(self._backbone, self._head, self.make_env, starts, self.settings, seed)
        rows, tokens = episode_rows(
            batch,
            self._tokenizer,
            self.recipe.env.discount,
            self.settings.max_turns,
            (step - 1) * self.per_step,
        )
        self._seen |= {row.columns["episode"] for row in rows}
        self.lost += sum(episode.failed is not None or not episode.length for episode in batch.episodes)
        failures = (episode.failed for episode in batch.episodes if episode.failed is not None)
        self.reason = self.reason or next(failures, "")
        if not self._seen:
            raise nothing_played(batch, self.recipe)
        return rows, tokens

    def notes(self, steps: int) -> dict[str, int]:
        """What the store is to remember: how many episodes it holds, and how many failed or had no room for a turn."""
        return {"episodes": len(self._seen), "episodes_lost": steps * self.per_step - len(self._seen)}

    def remark(self) -> str | None:
        """A line about this session's episodes that left no rows; None without any."""
        if not self.lost:
            return None
        why = self.reason or "no room for a turn in the context"
        return f"{self.lost} episodes are left out of the store ({why})"


def episode_rows(
    batch: EpisodeBatch,
    tokenizer: PreTrainedTokenizerBase,
    discount: float,
    max_turns: int,
    first_episode: int,
) -> tuple[list[StoredRow], TokenBatch]:
    """One row for every turn of the episodes that did not fail.

    Args:
        batch: without listed choices.
        tokenizer: turns conversations into texts.
        discount: of the reward one turn later.
        max_turns: of an episode; turn ``t`` of start ``i`` has the group ``i * max_turns + t``.
        first_episode: number of the batch's first episode.

    Returns:
        the rows, and their tokens, whose ``rows`` count them.
    """
    sound = [number for number, turn in enumerate(batch.turns) if batch.episodes[turn.episode].failed is None]
    tokens = replace(batch.tokens)
    if not sound:
        return [], tokens
    place = torch.full((len(batch.turns),), -1, device=tokens.rows.device)
    place[sound] = torch.arange(len(sound), device=place.device)
    tokens.rows = place[tokens.rows]
    turns = [batch.turns[number] for number in sound]
    episode_of_turn = torch.tensor([turn.episode for turn in turns])
    returns = discounted_returns(torch.tensor([turn.reward for turn in turns]), episode_of_turn, discount)
    begins = _begins(batch, turns, torch.bincount(tokens.rows, minlength=len(turns)).tolist())
    rows = []
    for turn, value, begin in zip(turns, returns.tolist(), begins, strict=True):
        episode = batch.episodes[turn.episode]
        prompt_ids = episode.token_ids[:begin]
        rows.append(
            StoredRow(
                prompt_ids=prompt_ids,
                prompt=tokenizer.decode(prompt_ids),
                completion=turn.completion,
                reward=value,
                group=episode.start.index * max_turns + turn.turn,
                finished=turn.finished,
                source_row=episode.start.index,
                columns={"episode": first_episode + turn.episode, **_columns(turn, episode)},
            )
        )
    return rows, tokens


def _begins(batch: EpisodeBatch, turns: Sequence[Turn], lengths: Sequence[int]) -> Iterator[int]:
    """Where in its conversation each turn's first token is, given the tokens of each."""
    said = 0
    for turn, length in zip(turns, lengths, strict=True):
        if turn.turn == 0:
            mask = batch.episodes[turn.episode].model_mask
            own, said = [at for at, mine in enumerate(mask) if mine], 0
        yield own[said]
        said += length


def _columns(turn: Turn, episode: Episode) -> dict[str, Any]:
    """What else a store keeps of a turn; the last one also says how the episode ended."""
    last = turn.turn == episode.length - 1
    columns = {
        "turn": turn.turn,
        "start": episode.start.index,
        "generation": episode.start.generation,
        "observation": turn.observation,
        "parsed": turn.parsed,
        "invalid": turn.invalid,
        "step_reward": turn.reward,
        "terminated": last and episode.terminated,
        "truncated": last and episode.truncated,
    }
    if last:
        columns |= {"cut": episode.reason, "final_observation": episode.final_observation}
    return columns
