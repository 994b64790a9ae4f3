"""Held-out figures of heads on stored rows: nothing is generated and no backbone is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from tea_rl.evaluation.metrics import spearman
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import action_logps
from tea_rl.head.shared import shared_corrections
from tea_rl.objectives.anchor import divergence
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states.store import StateStore

#: Tokens of rows evaluated together, about.
_CHUNK_TOKENS = 1024
#: Tokens whose logits over the whole vocabulary are alive at once.
_FULL_TOKENS = 64
#: Every metric of `offline_metrics`.
METRICS = (
    "eval_loss", "eval_base_loss", "eval_perplexity", "eval_accuracy", "eval_base_accuracy", "eval_row_accuracy", "eval_kl",
    "eval_reward_correlation", "eval_pair_accuracy", "eval_pair_accuracy_logp", "eval_base_pair_accuracy",
)  # fmt: skip
#: Those of which less is better.
LOWER_IS_BETTER = ("eval_loss", "eval_perplexity", "eval_kl")


@dataclass
class RowFigures:
    """Sums over the tokens of each of ``R`` rows, ``(R,)`` float64 each, and what the data says of the rows.

    Attributes:
        tokens: how many.
        logps, base_logps: log-probability under head and original model (nats).
        hits, base_hits: tokens that were the likeliest ones of the whole vocabulary.
        gains: ``logps - base_logps``, both computed from the same logits, so that it is exactly 0 where the head changes nothing.
        kl: exact KL(head || original model) at each token.
        rewards: NaN for none.
        verdicts: 1 good, 0 bad, -1 nobody said.
        pairs: preference pair, -1 for none.
    """

    tokens: np.ndarray
    logps: np.ndarray
    base_logps: np.ndarray
    hits: np.ndarray
    base_hits: np.ndarray
    kl: np.ndarray
    gains: np.ndarray
    rewards: np.ndarray
    verdicts: np.ndarray
    pairs: np.ndarray

    def take(self, index: np.ndarray) -> RowFigures:
        """The rows at ``index``."""
        return RowFigures(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def paired(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of whole pairs: chosen ones and rejected ones, ``(P,)`` each."""
        rows = np.flatnonzero(self.pairs >= 0)
        rows = rows[np.lexsort((-self.verdicts[rows], self.pairs[rows]))]
        pairs, counts = np.unique(self.pairs[rows], return_counts=True)
        rows = rows[np.isin(self.pairs[rows], pairs[counts == 2])]
        return rows[::2], rows[1::2]


@torch.no_grad()
def row_figures(
    heads: Sequence[TeaHead], store: StateStore, rows: np.ndarray, returns: np.ndarray | None = None
) -> list[RowFigures]:
    """Figures of several heads on rows of a store, which is read once.

    Args:
        returns: what heads with ``return_conditioning`` are asked for in each row, ``(R,)``, NaN for nothing; None: the row's own
            reward.
    """
    asked = torch.from_numpy(np.asarray(store.rewards[rows] if returns is None else returns, np.float32))
    names = ("logps", "hits", "kl", "gains")
    sums = [{name: np.zeros(len(rows)) for name in names} for _ in heads]
    base = {name: np.zeros(len(rows)) for name in ("logps", "hits")}
    for start, chunk in _chunks(store, rows):
        batch = store.tokens(rows=chunk)
        assert batch.shortlist is not None  # a store always holds one
        place = slice(start, start + len(chunk))
        found = {
            "logps": batch.base_logps,
            "hits": batch.shortlist.logits.argmax(dim=1) == batch.slots,
        }
        for name, values in found.items():
            base[name][place] = _row_sums(values, batch, len(chunk))
        found_by_head = _token_figures(heads, batch, store.temperature, asked[place][batch.rows])
        for own, measured in zip(sums, found_by_head, strict=True):
            for name, values in zip(names, measured, strict=True):
                own[name][place] = _row_sums(values, batch, len(chunk))
    about = {
        "tokens": store.lengths[rows].astype(np.float64),
        "rewards": store.rewards[rows].astype(np.float64),
        "verdicts": np.where(store.labels >= 0, store.labels, store.chosen)[rows],
        "pairs": store.pairs[rows],
        "base_logps": base["logps"],
        "base_hits": base["hits"],
    }
    return [RowFigures(**own, **about) for own in sums]


def _chunks(store: StateStore, rows: np.ndarray):  # noqa: ANN202
    """Yield ``(first place, rows)`` of about ``_CHUNK_TOKENS`` tokens."""
    ends = np.cumsum(store.lengths[rows])
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CHUNK_TOKENS, "right")))
        yield start, rows[start:stop]
        start = stop


def _row_sums(values: torch.Tensor, batch: TokenBatch, count: int) -> np.ndarray:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, batch.rows, values.double()).numpy()


def _token_figures(
    heads: Sequence[TeaHead], batch: TokenBatch, temperature: float, returns: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """For each head: log-probability, whether the action is the likeliest token, KL, and gain over the original model, ``(N,)``
    each."""
    assert batch.shortlist is not None
    listed = [head for head in heads if not head.full_vocabulary]
    corrections = iter(
        shared_corrections(listed, batch.states, batch.shortlist.ids, returns) if listed else []
    )
    return [
        _full_figures(head, batch, temperature, returns if head.config.return_conditioning else None)
        if head.full_vocabulary
        else _listed_figures(head, batch, temperature, *next(corrections))
        for head in heads
    ]


def _listed_figures(
    head: TeaHead, batch: TokenBatch, temperature: float, delta: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    assert batch.shortlist is not None
    base = batch.shortlist.slot_logits()
    logits = base + (head.strength / temperature) * torch.cat([delta, shift.unsqueeze(1)], dim=1)
    logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
    hits = _listed_hits(head, batch, temperature, logits, shift)
    kl = divergence("reverse_kl", logits, base, logps, base_logps)
    own, before = (action_logps(found, batch.slots, batch.within_tail_logps) for found in (logps, base_logps))
    return own, hits, kl, own - before


def _listed_hits(
    head: TeaHead, batch: TokenBatch, temperature: float, logits: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Whether the action is the likeliest token of the whole vocabulary, ``(N,)``.

    The tail moves as one, and the original model ranks each of its tokens at most as high as the last of the list: only where
    that bound passes the best listed token can one of the tail be the likeliest, and only there it is looked for.
    """
    assert batch.shortlist is not None
    moved = (head.strength / temperature) * shift
    best, slots = logits[:, :-1].max(dim=1)
    hits = slots == batch.slots
    doubtful = (batch.shortlist.logits.min(dim=1).values + moved >= best).nonzero().squeeze(1)
    for part in doubtful.split(_FULL_TOKENS):
        reference = head.reference_logits(batch.states[part], temperature)
        reference.scatter_(1, batch.shortlist.ids[part], -math.inf)
        highest, tokens = reference.max(dim=1)
        from_tail = highest + moved[part] > best[part]
        hits[part] = torch.where(from_tail, tokens == batch.actions[part], hits[part])
    return hits


def _full_figures(
    head: TeaHead, batch: TokenBatch, temperature: float, returns: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    parts = []
    for start in range(0, len(batch), _FULL_TOKENS):
        part = slice(start, start + _FULL_TOKENS)
        states, actions = batch.states[part], batch.actions[part]
        base = head.reference_logits(states, temperature)
        logits = head.full_logits(states, base, temperature, None if returns is None else returns[part])
        logps, base_logps = logits.log_softmax(dim=-1), base.log_softmax(dim=-1)
        kl = divergence("reverse_kl", logits, base, logps, base_logps)
        own = logps.gather(1, actions.unsqueeze(1)).squeeze(1)
        before = base_logps.gather(1, actions.unsqueeze(1)).squeeze(1)
        parts.append((own, logits.argmax(dim=1) == actions, kl, own - before))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def offline_metrics(figures: RowFigures) -> dict[str, float]:
    """Held-out metrics of one head.

    Returns:
        ``eval_loss``, ``eval_base_loss`` (cross-entropy, nats a token), ``eval_perplexity``, ``eval_accuracy``,
        ``eval_base_accuracy`` (share of tokens that are the likeliest ones of the whole vocabulary), ``eval_row_accuracy`` (share of rows all of whose
        tokens are), all over rows that are not marked as bad (label false, rejected, a reward below 0), unless all are;
        ``eval_kl`` (exact, nats a token); where rewards differ, ``eval_reward_correlation`` (Spearman, between a row's
        reward and its gain in log-probability over the original model, mean over tokens; 0 where no row gains); where there are pairs,
        ``eval_pair_accuracy`` (share whose chosen completion gained more than the rejected one, ties count half),
        ``eval_pair_accuracy_logp`` and ``eval_base_pair_accuracy`` (the same by log-probability itself).
    """
    wanted = (figures.verdicts != 0) & ~(figures.rewards < 0)
    good = figures.take(wanted if wanted.any() else np.ones_like(wanted))
    tokens = max(good.tokens.sum(), 1.0)
    loss = -float(good.logps.sum() / tokens)
    metrics = {
        "eval_loss": loss,
        "eval_base_loss": -float(good.base_logps.sum() / tokens),
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_accuracy": float(good.hits.sum() / tokens),
        "eval_base_accuracy": float(good.base_hits.sum() / tokens),
        "eval_row_accuracy": float((good.hits == good.tokens).mean()),
        "eval_kl": float(figures.kl.sum() / figures.tokens.sum()),
    }
    rated = figures.take(~np.isnan(figures.rewards))
    if len(rated.rewards) > 1 and rated.rewards.min() < rated.rewards.max():
        metrics["eval_reward_correlation"] = spearman(rated.rewards, rated.gains / rated.tokens)
    chosen, rejected = figures.paired()
    if len(chosen):
        metrics["eval_pair_accuracy"] = _wins(figures.gains[chosen], figures.gains[rejected])
        metrics["eval_pair_accuracy_logp"] = _wins(figures.logps[chosen], figures.logps[rejected])
        metrics["eval_base_pair_accuracy"] = _wins(figures.base_logps[chosen], figures.base_logps[rejected])
    return metrics


def _wins(first: np.ndarray, second: np.ndarray) -> float:
    return float(((first > second) + 0.5 * (first == second)).mean())


def bootstrap_interval(
    figures: RowFigures, metric: str, resamples: int = 400, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a metric of `offline_metrics`, by resampling rows, and whole pairs for those of pairs.

    Rows of one prompt count as independent. NaN twice if the metric cannot be computed.
    """
    rng = np.random.default_rng(seed)
    chosen, rejected = figures.paired()
    by_pair = "pair" in metric
    count = len(chosen) if by_pair else len(figures.tokens)
    measure: Callable[[RowFigures], dict[str, float]] = offline_metrics
    values = []
    for _ in range(resamples if count else 0):
        pick = rng.integers(0, count, count)
        if by_pair:
            sample = figures.take(np.stack([chosen[pick], rejected[pick]], axis=1).flatten())
            sample.pairs = np.repeat(np.arange(count), 2)  # a pair drawn twice is two pairs
        else:
            sample = figures.take(pick)
            sample.pairs = np.full(count, -1)
        values.append(measure(sample).get(metric, math.nan))
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
