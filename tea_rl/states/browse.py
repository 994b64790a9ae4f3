"""Look into a store: rows with their rewards, and one row token by token, beside a head's log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.head.checkpoint import WEIGHTS_NAME, load_weights, read_config
from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.labelling import TokenLabeller
from tea_rl.states.store import StateStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_head_for(store: StateStore, folder: str | Path) -> TeaHead:
    """A saved head on the store's own copy of the reference weight.

    Raises:
        TeaError: if the head is missing or damaged, or belongs to another base model or other context features.
    """
    config = read_config(folder)
    if config["reference_digest"] != store.keys["reference_digest"]:
        raise TeaError(
            f"the head in {folder} was trained on {config.get('base_model_name_or_path')} with reference digest "
            f"{config['reference_digest'][:12]}, but the store {store.path} was made with "
            f"{store.keys['reference_digest'][:12]}; take a head of the same model"
        )
    head_config = HeadConfig(**config["head"])
    if head_config.context.model_dump() != store.keys["context"]:
        raise TeaError(
            f"the head in {folder} reads head.context {head_config.context.model_dump()}, but the states in {store.path} were "
            f"made with {store.keys['context']}; take another head, or make another store with the head's context"
        )
    head = store.make_head(head_config)
    load_weights(head, Path(folder) / WEIGHTS_NAME)
    head.strength = config["strength"]
    head.set_return(config["asked_return"])
    return head.eval()


@torch.no_grad()
def head_logps(store: StateStore, head: TeaHead, tokens: TokenBatch) -> Tensor:
    """Log-probability of stored tokens under a head, at the store's temperature, ``(N,)`` nats."""
    if not head.full_vocabulary and head.shortlist_size != store.shortlist_size:
        labeller = TokenLabeller(head, head.shortlist_size, store.temperature)
        tokens = labeller.label(tokens.states, tokens.actions, [len(tokens)])
    return head.terms(tokens, store.temperature).logps


def row_summaries(
    store: StateStore, rows: Sequence[int], head: TeaHead | None = None
) -> list[dict[str, Any]]:
    """One dictionary a row: texts, rewards and mean log-probabilities (nats a token).

    ``logp`` is that of the policy that wrote the completion, ``base_logp`` the original model's (equal for data that no
    policy of ours wrote), ``gain`` the head's minus the original model's.
    """
    summaries = []
    for row in rows:
        text = store.text(row)
        reward, label = float(store.rewards[row]), int(store.labels[row])
        summary = {
            "row": row,
            "group": int(store.groups[row]),
            "prompt": text["prompt"],
            "completion": text["completion"],
            "reward": None if reward != reward else reward,
            "terms": text["terms"],
            "label": None if label < 0 else bool(label),
            "chosen": None if store.chosen[row] < 0 else bool(store.chosen[row]),
            "finished": bool(store.finished[row]),
            "tokens": int(store.lengths[row]),
            "logp": store.token_array("logps", [row]).mean().item(),
            "base_logp": store.token_array("base_logps", [row]).mean().item(),
            "place": text["place"],
            "columns": text["columns"],
        }
        if head is not None:
            mean = head_logps(store, head, store.tokens(rows=[row])).mean().item()
            summary.update(head_logp=mean, gain=mean - summary["base_logp"])
        summaries.append(summary)
    return summaries


def token_rows(
    store: StateStore,
    row: int,
    head: TeaHead | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, Any]]:
    """One dictionary a token of a row: id, text, rank in the shortlist (None: in the tail), log-probabilities in nats."""
    if not 0 <= row < len(store):
        raise TeaError(
            f"the store {store.path} has rows 0 to {len(store) - 1}, got {row}; choose one of them"
        )
    batch = store.tokens(rows=[row])
    own = head_logps(store, head, batch) if head is not None else None
    result = []
    for position, action in enumerate(batch.actions.tolist()):
        slot = int(batch.slots[position])
        token = {
            "position": position,
            "token": action,
            "text": None if tokenizer is None else tokenizer.decode([action]),
            "rank": slot + 1 if slot < store.shortlist_size else None,
            "logp": batch.logps[position].item(),
            "base_logp": batch.base_logps[position].item(),
        }
        if own is not None:
            token.update(head_logp=own[position].item(), gain=own[position].item() - token["base_logp"])
        result.append(token)
    return result


def store_summary(store: StateStore) -> dict[str, Any]:
    """What a store holds, as JSON values; ``bytes`` counts every file."""
    given = store.rewards[store.rewards == store.rewards]
    manifest = store.manifest
    entries = [*manifest.files.values(), *(e for shard in manifest.shards for e in shard["files"].values())]
    return {
        "path": str(store.path),
        "kind": store.kind,
        "rows": len(store),
        "tokens": store.num_tokens,
        "groups": len(set(store.groups.tolist())),
        "shards": len(manifest.shards),
        "bytes": sum(entry["bytes"] for entry in entries),
        "rewards": len(given),
        "mean_reward": float(given.mean()) if len(given) else None,
        "pairs": len(set(store.pairs.tolist()) - {-1}),
        "labels": int((store.labels >= 0).sum()),
        "width": store.width,
        "keys": store.keys,
        "notes": manifest.notes,
    }


def load_tokenizer(store: StateStore) -> PreTrainedTokenizerBase | None:
    """The base model's tokenizer, to show tokens as text; None where it cannot be had or is another one."""
    from transformers import AutoTokenizer

    from tea_rl.data.encode import tokenizer_digest
    from tea_rl.model_source import find_model, quiet_transformers

    try:
        source = find_model(
            store.keys["base_model_name_or_path"], store.manifest.header.base_settings.get("revision")
        )
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments())
    except Exception:  # a convenience: ids are shown instead, whatever is wrong with the model
        return None
    return tokenizer if tokenizer_digest(tokenizer) == store.keys["tokenizer_digest"] else None
