"""Labelled texts to a state store: the backbone reads every row once, and never again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tea_rl.backbone import Backbone, load_backbone
from tea_rl.data.encode import EncodedRow, encode_rows
from tea_rl.data.labelled import LabelledData, LabelledRow, read_labelled, row_groups
from tea_rl.data.prompts import prompt_text
from tea_rl.errors import TeaError
from tea_rl.head.context import ContextState
from tea_rl.recipe import AnchorConfig, DataConfig, Recipe
from tea_rl.rewards import RewardBatch, load_rewards
from tea_rl.states.keys import store_keys
from tea_rl.states.labelling import TokenLabeller
from tea_rl.states.manifest import ANCHOR_NAME, StoreHeader
from tea_rl.states.rows import StoredRow
from tea_rl.states.store import StateStore
from tea_rl.states.writer import SHARD_TOKENS, StoreWriter
from tea_rl.training.progress import Listener
from tea_rl.training.seeding import seed_step

#: Tokens that go through the backbone together, padding included.
BATCH_TOKENS = 2048
#: Rows are sorted by length inside windows of this many: little padding, and the order stays near that of the data.
WINDOW_ROWS = 1024


def embed(
    recipe: Recipe,
    output: str | Path,
    listener: Listener | None = None,
    *,
    backbone: Backbone | None = None,
    batch_tokens: int = BATCH_TOKENS,
    shard_tokens: int = SHARD_TOKENS,
) -> StateStore:
    """Run the backbone over a recipe's dataset and keep the states that predict completion tokens.

    Killed at any moment and called again, it goes on after what was on disk, at most about half a minute of work earlier,
    and ends with the same bytes. Called again when it is done, it mends what is damaged, or only opens the store; rewards
    that `relabel` put in force stay. Rewards named in the recipe replace those of the data. Text that the recipe anchors on
    becomes a store of its own inside the other one (`ANCHOR_NAME`).

    Args:
        recipe: gives data, model, temperature, context and shortlist size.
        output: folder of the store.
        listener: hears of progress, in completion tokens.
        backbone: already loaded; None loads the recipe's.
        batch_tokens: tokens that go through the backbone together, padding included.
        shard_tokens: when a shard is closed.

    Raises:
        TeaError: for every mistake a user can mend.
    """
    listener = listener or Listener()
    if recipe.data.dataset is None:
        raise TeaError(
            f"embedding needs data.dataset, which recipe {recipe.name} does not set; name a file of labelled rows"
        )
    if recipe.train.num_threads is not None:
        torch.set_num_threads(recipe.train.num_threads)
    data = read_labelled(recipe.data.dataset, recipe.data.kwargs, recipe.data.columns)
    scored = score_rows(recipe, data.rows)  # before the model, so that a wrong reward is answered at once
    anchor = None if recipe.anchor.dataset is None else read_anchor(recipe.anchor)
    if backbone is None:
        listener.on_note(f"loading {recipe.model.name_or_path}")
        backbone = load_backbone(**recipe.model.model_dump(), notify=listener.on_note)
    output, sizes = Path(output), (batch_tokens, shard_tokens)
    _embed_rows(recipe, data, scored, backbone, output, listener, *sizes)
    if anchor is not None:
        listener.on_note(
            f"the text of {recipe.anchor.dataset}, on which the policy is held to the original model"
        )
        plain = recipe.model_copy(update={"data": DataConfig(dataset=recipe.anchor.dataset)})
        _embed_rows(plain, anchor, None, backbone, output / ANCHOR_NAME, listener, *sizes)
    # The writer has compared or computed every digest; reading compares those of the files that are read once more.
    return StateStore.open(output, verify=False)


def read_anchor(config: AnchorConfig) -> LabelledData:
    """The text of ``anchor.dataset`` as rows without prompt or label: every token of it is one to be held.

    Raises:
        TeaError: if it cannot be read.
    """
    assert config.dataset is not None
    found = read_labelled(config.dataset, config.kwargs, {})
    rows = [
        LabelledRow("", (prompt_text(row.prompt) + row.completion).strip(), place=row.place)
        for row in found.rows[: config.size]
    ]
    return LabelledData("text", rows, found.source)


def _embed_rows(
    recipe: Recipe,
    data: LabelledData,
    scored: RewardBatch | None,
    backbone: Backbone,
    output: Path,
    listener: Listener,
    batch_tokens: int,
    shard_tokens: int,
) -> None:
    """The store of some rows, begun, continued, mended or left alone."""
    encoded, report = encode_rows(
        data, recipe.data, backbone.tokenizer, end_token(backbone), backbone.max_length
    )
    listener.on_note(("warning: " if report.truncated or report.dropped else "") + report.describe())
    rows = _stored_rows(encoded, data.rows, scored, backbone)
    batches = plan_batches([len(row.prompt_ids) + len(row.completion_ids) for row in encoded], batch_tokens)
    source = _source_digest(encoded, rows, (batch_tokens, WINDOW_ROWS, shard_tokens))
    header = make_header(recipe, backbone, "dataset", source)
    with StoreWriter.create_or_continue(output, header, backbone.reference, shard_tokens) as writer:
        if writer.complete:
            listener.on_note(f"{output} is complete already")
        else:
            _write_batches(writer, backbone, recipe, encoded, rows, batches, listener)
            writer.finish({"rows": report.rows, "truncated": report.truncated, "dropped": report.dropped})


def make_header(recipe: Recipe, backbone: Backbone, kind: str, source: str) -> StoreHeader:
    """Header of a store made with this recipe and backbone."""
    keys = store_keys(recipe, backbone)
    return StoreHeader(
        kind=kind,
        keys=keys,
        source=source,
        width=backbone.hidden_size * (1 + recipe.head.context.num_means),
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        shortlist_size=keys["shortlist_size"],
        temperature=recipe.rollout.temperature,
        logit_scale=backbone.logit_scale,
        base_settings=backbone.settings,
    )


def plan_batches(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Rows that go through the backbone together: similar lengths, at most ``batch_tokens`` with padding.

    >>> plan_batches([900, 3, 901, 2])
    [[3, 1], [0, 2]]
    """
    batches: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW_ROWS):
        window = range(start, min(start + WINDOW_ROWS, len(lengths)))
        batch: list[int] = []
        for row in sorted(window, key=lambda row: (lengths[row], row)):
            # Rows come by rising length, so this one is the widest of its batch.
            wasteful = batch and lengths[row] > 2 * lengths[batch[0]] + 16
            if batch and (wasteful or lengths[row] * (len(batch) + 1) > batch_tokens):
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    return batches


def completion_states(
    backbone: Backbone, recipe: Recipe, rows: Sequence[EncodedRow]
) -> tuple[Tensor, Tensor]:
    """States that predict the completion tokens of rows, and those tokens.

    Shape:
        ``(N, W)`` in the backbone's dtype and ``(N,)``, row by row.
    """
    # The last token predicts nothing that is kept.
    inputs = [[*row.prompt_ids, *row.completion_ids][:-1] for row in rows]
    longest = max(map(len, inputs))
    ids = torch.full((len(rows), longest), backbone.pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    keep = torch.zeros(len(rows), longest, dtype=torch.bool)
    # Padding on the right: every architecture then counts positions alike, and causal attention never reads it.
    for number, (row, tokens) in enumerate(zip(rows, inputs, strict=True)):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, : len(tokens)] = 1
        keep[number, len(row.prompt_ids) - 1 : len(tokens)] = True
    device = backbone.device
    context = ContextState.begin(recipe.head.context)
    states = backbone.forward(ids.to(device), attention_mask=mask.to(device), context=context)
    actions = torch.cat([torch.tensor(row.completion_ids) for row in rows])
    return states[keep.to(device)], actions.to(device)


def _write_batches(
    writer: StoreWriter,
    backbone: Backbone,
    recipe: Recipe,
    encoded: Sequence[EncodedRow],
    rows: Sequence[StoredRow],
    batches: Sequence[Sequence[int]],
    listener: Listener,
) -> None:
    """Embed every batch that is not on disk yet."""
    labeller = TokenLabeller.for_backbone(
        backbone, writer.manifest.header.shortlist_size, recipe.rollout.temperature
    )
    total = sum(len(row.completion_ids) for row in encoded)
    # What is on disk ends where a batch ends: the batches to come are then the same ones, padding included, that an uninterrupted
    # run would compute, and so are their last bits.
    ends = np.cumsum([0, *map(len, batches)])
    first = int(np.searchsorted(ends, writer.num_rows))
    done = total - sum(len(encoded[row].completion_ids) for batch in batches[first:] for row in batch)
    if first:
        listener.on_note(f"continuing after {writer.num_rows} of {len(rows)} rows")
    listener.on_progress(done, total, "tokens")
    for batch in batches[first:]:
        chosen = [encoded[row] for row in batch]
        lengths = [len(row.completion_ids) for row in chosen]
        states, actions = completion_states(backbone, recipe, chosen)
        writer.append([rows[row] for row in batch], labeller.label(states, actions, lengths))
        done += sum(lengths)
        listener.on_progress(done, total, "tokens")


def end_token(backbone: Backbone) -> int | None:
    """The id a completion ends with: the tokenizer's, or the model's first; None if there is none."""
    own = backbone.tokenizer.eos_token_id
    if own is not None and own in backbone.eos_token_ids:
        return int(own)
    return backbone.eos_token_ids[0] if backbone.eos_token_ids else None


def score_rows(recipe: Recipe, rows: Sequence[LabelledRow]) -> RewardBatch | None:
    """Rewards of the recipe's reward functions; None if it names none."""
    if not recipe.rewards:
        return None
    rewards = load_rewards(recipe.rewards, recipe.base_dir)
    # A reward that draws random numbers must give the same ones when a killed embedding goes on.
    seed_step(recipe.train.seed, 0)
    names = sorted({name for row in rows for name in row.columns})
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    return rewards([prompt_text(row.prompt) for row in rows], [row.completion for row in rows], columns)


def _stored_rows(
    encoded: Sequence[EncodedRow], rows: Sequence[LabelledRow], scored: RewardBatch | None, backbone: Backbone
) -> list[StoredRow]:
    number_of = {id(row): number for number, row in enumerate(rows)}
    groups = row_groups(rows)
    stored = []
    for item in encoded:
        row, number = item.row, number_of[id(item.row)]
        reward = row.reward if scored is None else scored.total[number]
        terms = {} if scored is None else {name: values[number] for name, values in scored.terms.items()}
        stored.append(
            StoredRow(
                prompt_ids=item.prompt_ids,
                prompt=prompt_text(row.prompt),
                completion=row.completion,
                reward=reward,
                terms=terms,
                label=row.label,
                pair=row.pair,
                chosen=row.chosen,
                group=groups[number],
                finished=not item.truncated and item.completion_ids[-1] in backbone.eos_token_ids,
                source_row=number,
                place=row.place,
                columns=row.columns,
            )
        )
    return stored


def _source_digest(encoded: Sequence[EncodedRow], rows: Sequence[StoredRow], sizes: tuple[int, ...]) -> str:
    """SHA-256 over everything that decides the bytes of the shards beside the header."""
    sha = hashlib.sha256(repr(sizes).encode())
    for item, row in zip(encoded, rows, strict=True):
        values = {**vars(row), "prompt_ids": item.prompt_ids, "completion_ids": item.completion_ids}
        del values["place"]  # it changes when the file is moved
        sha.update(json.dumps(values, sort_keys=True, default=str).encode("utf-8", "replace") + b"\n")
    return sha.hexdigest()
