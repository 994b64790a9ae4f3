"""Rollouts to a state store: what an online run would generate or play, kept for training without generating."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tea_rl.backbone import Backbone, load_backbone
from tea_rl.data.prompts import Prompt, data_digest
from tea_rl.errors import TeaError
from tea_rl.evaluation.evaluate import PromptSet, score
from tea_rl.head.layer import TeaHead
from tea_rl.recipe import Recipe
from tea_rl.rewards import RewardSum, load_rewards
from tea_rl.rollout import Rollout, generate
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.embed import make_header
from tea_rl.states.labelling import TokenLabeller
from tea_rl.states.rows import StoredRow
from tea_rl.states.store import StateStore
from tea_rl.states.writer import SHARD_TOKENS, StoreWriter
from tea_rl.training.progress import Listener
from tea_rl.training.seeding import prompts_of_step, seed_step

if TYPE_CHECKING:
    from tea_rl.states.episode_rows import EpisodeSource


def write_rollouts(
    recipe: Recipe,
    output: str | Path,
    steps: int | None = None,
    listener: Listener | None = None,
    *,
    head: str | Path | None = None,
    backbone: Backbone | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> StateStore:
    """Generate completions of a recipe's training prompts, or play its environment, as its online run would, and store that.

    Step ``s`` has the prompts (starts) and the random numbers of step ``s`` in training; the policy stays the same throughout.
    Of an episode every turn is a row, see `tea_rl.states.episode_rows`.
    Killed and called again, it goes on after what was on disk, at most about half a minute of work earlier, and ends with
    the same bytes; a damaged store is mended in the same way, and rewards that `relabel` put in force stay.

    Args:
        recipe: an online recipe, with prompts and rewards or with an environment.
        output: folder of the store.
        steps: how many; ``train.max_steps`` if None.
        listener: hears of progress, in completions or episodes.
        head: folder of a saved head to sample from; None samples from the original model.
        backbone: already loaded; None loads the recipe's.
        shard_tokens: when a shard is closed.

    Raises:
        TeaError: for every mistake a user can mend.
    """
    listener = listener or Listener()
    source = _source(recipe)
    if recipe.train.num_threads is not None:
        torch.set_num_threads(recipe.train.num_threads)
    backbone = backbone or _load(recipe, listener)
    policy = _policy(recipe, backbone, head)
    source.prepare(backbone, policy)
    steps = steps or recipe.train.max_steps
    digest = _source_digest(recipe, policy, source.digest, shard_tokens)
    header = make_header(recipe, backbone, "rollout", digest)
    labeller = TokenLabeller.for_backbone(backbone, header.shortlist_size, header.temperature)
    with StoreWriter.create_or_continue(output, header, backbone.reference, shard_tokens) as writer:
        done, total = source.steps_done(writer), steps * source.per_step
        _check_steps(writer, done, steps)
        if writer.complete:
            listener.on_note(f"{output} is complete already")
            return StateStore.open(output, verify=False)
        if done:
            listener.on_note(f"continuing after {done} of {steps} steps")
        listener.on_progress(done * source.per_step, total, source.unit)
        for step in range(done + 1, steps + 1):
            seed_step(recipe.train.seed, step)  # for those that draw from the global streams
            rows, tokens = source.sample(step)
            if rows:
                writer.append(rows, _stored_tokens(tokens, len(rows), labeller))
            listener.on_progress(step * source.per_step, total, source.unit)
        writer.finish({"steps": steps, **source.notes(steps)})
        if (remark := source.remark()) is not None:
            listener.on_note(remark)
    return StateStore.open(output, verify=False)


def _load(recipe: Recipe, listener: Listener) -> Backbone:
    listener.on_note(f"loading {recipe.model.name_or_path}")
    return load_backbone(**recipe.model.model_dump(), notify=listener.on_note)


def _check_steps(writer: StoreWriter, done: int, steps: int) -> None:
    """Refuse another number of steps than a complete store has, and fewer than one holds that was not finished.

    Raises:
        TeaError: naming the number it takes.
    """
    was = None if writer.final_rows is None else writer.manifest.notes["steps"]
    if done > steps or was not in (None, steps):
        there = done if was is None else was
        what = "the beginning" if was is None else "a complete store"
        advice = f"give --steps {there}" + (" or more" if was is None else "")
        raise TeaError(
            f"{writer.path} holds {what} of {there} steps, got {steps}; {advice}, or choose another folder with --output"
        )


def _source(recipe: Recipe) -> PromptSource | EpisodeSource:
    """Mistakes in rewards and environments show here, before a model is loaded."""
    if recipe.offline:
        raise TeaError(
            f"a rollout needs data.prompts or env.id to generate from, which recipe {recipe.name} does not set; for labelled "
            "rows use tea-rl embed"
        )
    if recipe.env.id is None:
        return PromptSource(recipe)
    from tea_rl.states.episode_rows import EpisodeSource

    return EpisodeSource(recipe)


class PromptSource:
    """Completions of a recipe's training prompts, step by step, as its online run would sample them first.

    Args:
        recipe: one with prompts and rewards.

    Attributes:
        unit: what is counted.
        per_step: completions in a step, after `prepare`.
        digest: of the prompts, after `prepare`.

    Raises:
        TeaError: for a reward that cannot be loaded.
    """

    unit = "completions"
    per_step: int
    digest: str

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._rewards = load_rewards(recipe.rewards, recipe.base_dir)

    def prepare(self, backbone: Backbone, head: TeaHead) -> None:
        """Tokenise the prompts, and take the model that samples."""
        from tea_rl.training.online import decode_settings, prepare_prompts

        rollout = self.recipe.rollout
        self._backbone, self._head = backbone, head
        self._prompts, held_out = prepare_prompts(self.recipe, backbone)
        self._settings = decode_settings(self.recipe, rollout.num_generations)
        self._num_prompts = min(rollout.prompts_per_step, len(self._prompts))
        self.per_step = self._num_prompts * rollout.num_generations
        self.digest = data_digest(self._prompts.prompts, held_out.prompts)

    def steps_done(self, writer: StoreWriter) -> int:
        """Steps that are on disk."""
        return writer.num_rows // self.per_step

    def sample(self, step: int) -> tuple[list[StoredRow], TokenBatch]:
        """The rows of a step (from 1) and their tokens."""
        seed = self.recipe.train.seed
        chosen = prompts_of_step(seed, step, len(self._prompts), self._num_prompts)
        part = self._prompts.take(chosen)
        generated = generate(self._backbone, self._head, part.token_ids, self._settings, seed=(seed, step))
        return _stored_rows(part, chosen, generated, self._rewards), generated.tokens

    def notes(self, steps: int) -> dict[str, int]:
        """What the store is to remember."""
        return {"rows": steps * self.per_step}

    def remark(self) -> str | None:
        """Every completion leaves a row, so there is nothing to tell."""
        return None


def _policy(recipe: Recipe, backbone: Backbone, folder: str | Path | None) -> TeaHead:
    """The head to sample from; one that reads other context features than the recipe's would leave other states."""
    if folder is None:
        return TeaHead.for_backbone(backbone, recipe.head, seed=recipe.train.seed)
    head = TeaHead.from_pretrained(folder, backbone)
    if head.config.context != recipe.head.context:
        raise TeaError(
            f"the head in {folder} reads head.context {head.config.context.model_dump()}, but the recipe sets "
            f"{recipe.head.context.model_dump()}; set the recipe to the head's"
        )
    return head


def _stored_rows(
    prompts: PromptSet, chosen: Sequence[int], generated: Rollout, rewards: RewardSum
) -> list[StoredRow]:
    batch = score(rewards, prompts.prompts, generated)
    rows = []
    for number, index in enumerate(generated.prompt_index.tolist()):
        prompt: Prompt = prompts.prompts[index]
        rows.append(
            StoredRow(
                prompt_ids=prompts.token_ids[index],
                prompt=prompt.text,
                completion=generated.texts[number],
                reward=batch.total[number],
                terms={name: values[number] for name, values in batch.terms.items()},
                group=chosen[index],
                finished=bool(generated.finished[number]),
                source_row=chosen[index],
                columns=prompt.columns,
            )
        )
    return rows


def _stored_tokens(tokens: TokenBatch, num_rows: int, labeller: TokenLabeller) -> TokenBatch:
    """The rollout's records; heads without a shortlist, or with another one, get the store's. Behaviour stays as sampled."""
    if tokens.shortlist is not None and tokens.shortlist.ids.shape[1] == labeller.shortlist_size:
        return tokens
    lengths = torch.bincount(tokens.rows, minlength=num_rows).tolist()
    labelled = labeller.label(tokens.states, tokens.actions, lengths)
    return replace(labelled, logps=tokens.logps)


#: What of a recipe's ``rollout`` decides which completions are stored.
_DECIDING = {
    "prompts_per_step", "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "stop",
}  # fmt: skip


def _source_digest(recipe: Recipe, head: TeaHead, data: str, shard_tokens: int) -> str:
    """SHA-256 over everything that decides the bytes of the shards beside the header; more steps may follow."""
    settings = {
        "data": data,
        "rewards": [spec.model_dump() for spec in recipe.rewards],
        "rollout": recipe.rollout.model_dump(include=_DECIDING),
        "head": head.config.model_dump(),
        "strength": head.strength,
        "return": None if head.asked_return is None else head.asked_return.tolist(),
        "seed": recipe.train.seed,
        "shard_tokens": shard_tokens,
    }
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(head.head_state().items()):
        sha.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
