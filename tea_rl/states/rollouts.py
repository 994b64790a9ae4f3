"""Sampled completions to a state store: what an online run would generate, kept for training without generating."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
    """Generate and score completions of a recipe's training prompts, as its online run would, and store them.

    Step ``s`` has the prompts and the random numbers of step ``s`` in training; the policy stays the same throughout.
    Killed and called again, it goes on after what was on disk, at most about half a minute of work earlier, and ends with
    the same bytes; a damaged store is mended in the same way, and rewards that `relabel` put in force stay.

    Args:
        recipe: an online recipe with prompts, rewards and rollout settings.
        output: folder of the store.
        steps: how many; ``train.max_steps`` if None.
        listener: hears of progress, in completions.
        head: folder of a saved head to sample from; None samples from the original model.
        backbone: already loaded; None loads the recipe's.
        shard_tokens: when a shard is closed.

    Raises:
        TeaError: for every mistake a user can mend.
    """
    from tea_rl.training.online import decode_settings, prepare_prompts

    listener = listener or Listener()
    if recipe.offline:
        raise TeaError(
            f"a rollout needs data.prompts to generate from, which recipe {recipe.name} does not set; for labelled rows use "
            "tea-rl embed"
        )
    if recipe.env.id is not None:
        raise TeaError(
            f"a rollout stores completions of data.prompts, but recipe {recipe.name} plays {recipe.env.id}, and episodes of "
            "several turns cannot be stored yet; learn in the environment with tea-rl train"
        )
    if recipe.train.num_threads is not None:
        torch.set_num_threads(recipe.train.num_threads)
    rewards = load_rewards(recipe.rewards, recipe.base_dir)
    if backbone is None:
        listener.on_note(f"loading {recipe.model.name_or_path}")
        backbone = load_backbone(**recipe.model.model_dump(), notify=listener.on_note)
    prompts, held_out = prepare_prompts(recipe, backbone)
    policy = _policy(recipe, backbone, head)
    steps = recipe.train.max_steps if steps is None else steps
    settings = decode_settings(recipe, recipe.rollout.num_generations)
    per_step = min(recipe.rollout.prompts_per_step, len(prompts))
    rows_per_step = per_step * settings.num_generations
    digest = data_digest(prompts.prompts, held_out.prompts)
    header = make_header(recipe, backbone, "rollout", _source_digest(recipe, policy, digest, shard_tokens))
    labeller = TokenLabeller.for_backbone(backbone, header.shortlist_size, header.temperature)
    with StoreWriter.create_or_continue(output, header, backbone.reference, shard_tokens) as writer:
        done, total = writer.num_rows // rows_per_step, steps * rows_per_step
        was = writer.final_rows
        if writer.num_rows > total or was not in (None, total):
            there = (writer.num_rows if was is None else was) // rows_per_step
            what = "the beginning" if was is None else "a complete store"
            advice = f"give --steps {there}" + (" or more" if was is None else "")
            raise TeaError(
                f"{output} holds {what} of {there} steps, got {steps}; {advice}, or choose another folder with --output"
            )
        if writer.complete:
            listener.on_note(f"{output} is complete already")
            return StateStore.open(output, verify=False)
        if done:
            listener.on_note(f"continuing after {done} of {steps} steps")
        listener.on_progress(done * rows_per_step, total, "completions")
        for step in range(done + 1, steps + 1):
            seed_step(recipe.train.seed, step)  # for rewards that draw random numbers of their own
            chosen = prompts_of_step(recipe.train.seed, step, len(prompts), per_step)
            part = prompts.take(chosen)
            generated = generate(backbone, policy, part.token_ids, settings, seed=(recipe.train.seed, step))
            rows = _stored_rows(part, chosen, generated, rewards)
            writer.append(rows, _stored_tokens(generated, labeller))
            listener.on_progress(step * rows_per_step, total, "completions")
        writer.finish({"steps": steps, "rows": total})
    return StateStore.open(output, verify=False)


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


def _stored_tokens(generated: Rollout, labeller: TokenLabeller) -> TokenBatch:
    """The rollout's records; heads without a shortlist, or with another one, get the store's. Behaviour stays as sampled."""
    tokens = generated.tokens
    if tokens.shortlist is not None and tokens.shortlist.ids.shape[1] == labeller.shortlist_size:
        return tokens
    labelled = labeller.label(tokens.states, tokens.actions, generated.lengths.tolist())
    return replace(labelled, logps=tokens.logps)


def _source_digest(recipe: Recipe, head: TeaHead, data: str, shard_tokens: int) -> str:
    """SHA-256 over everything that decides the bytes of the shards beside the header; more steps may follow."""
    settings = {
        "data": data,
        "rewards": [spec.model_dump() for spec in recipe.rewards],
        "rollout": recipe.rollout.model_dump(),
        "head": head.config.model_dump(),
        "strength": head.strength,
        "seed": recipe.train.seed,
        "shard_tokens": shard_tokens,
    }
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(head.head_state().items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
