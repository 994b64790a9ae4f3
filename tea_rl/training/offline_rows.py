"""What an offline objective looks at of rows, stored or not even embedded yet: who is held out, who teaches, and what."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tea_rl.data.labelled import LabelledData
from tea_rl.data.prompts import prompt_text
from tea_rl.data.split import SPLIT_COLUMN, row_groups, split_groups, split_side
from tea_rl.errors import TeaError
from tea_rl.objectives.advantages import stored_advantages
from tea_rl.recipe import DataConfig, ObjectiveConfig, Recipe
from tea_rl.states.store import StateStore
from tea_rl.training.offline_learner import PAIR_OBJECTIVES

#: Objectives that need no reward.
_WITHOUT_REWARD = ("cross_entropy", "kto", *PAIR_OBJECTIVES)
#: Objectives that can teach the rows whose return is hidden, while the others are imitated.
_WITH_RETURNS = ("cross_entropy", "reward_weighted", "awr")


@dataclass
class RowTable:
    """Columns of ``R`` rows.

    Attributes:
        source: where they come from, for errors.
        rewards: float32, NaN for none, ``(R,)``.
        labels, chosen: 1, 0 or -1 for none, ``(R,)``.
        pairs: preference pair, -1 for none, ``(R,)``.
        groups: equal for rows with the same prompt, ``(R,)``.
        units: equal for rows that stay on one side of the split, ``(R,)``: those of a prompt, or of an episode's start.
        sides: 1 for rows that the data itself holds out, 0 for others, ``(R,)``; None: the data does not say.
    """

    source: str
    rewards: np.ndarray
    labels: np.ndarray
    chosen: np.ndarray
    pairs: np.ndarray
    groups: np.ndarray
    units: np.ndarray
    sides: np.ndarray | None

    @classmethod
    def of_store(cls, store: StateStore) -> RowTable:
        """That of a store.

        Raises:
            TeaError: for a column ``split`` with something else than a side in it.
        """
        units = store.source_rows if store.kind == "rollout" else store.groups
        columns = store.rewards, store.labels, store.chosen, store.pairs, store.groups, units
        return cls(str(store.path), *columns, _stored_sides(store))

    @classmethod
    def of_labelled(cls, data: LabelledData, recipe: Recipe) -> RowTable:
        """That of rows which are not embedded yet. Those in ``data.exclude`` are left out already."""
        excluded = {text.strip() for text in recipe.data.exclude}
        numbers = row_groups(data.rows)
        kept = [
            at for at, row in enumerate(data.rows)
            if not excluded or prompt_text(row.prompt).strip() not in excluded
        ]  # fmt: skip
        rows = [data.rows[at] for at in kept]

        def column(values: Sequence[int | None]) -> np.ndarray:
            return np.array([-1 if value is None else value for value in values], np.int64)

        if recipe.rewards:
            # Not computed yet. With numbers that all differ, only what no rewards could mend is found.
            rewards = np.arange(len(rows), dtype=np.float32)
        else:
            rewards = np.array([np.nan if row.reward is None else row.reward for row in rows], np.float32)
        groups = np.array([numbers[at] for at in kept], np.int64)
        marked = any(SPLIT_COLUMN in row.columns for row in rows)
        return cls(
            data.source,
            rewards,
            column([row.label for row in rows]),
            column([row.chosen for row in rows]),
            column([row.pair for row in rows]),
            groups,
            groups,
            np.array([split_side(row.columns, row.place) for row in rows], np.int8) if marked else None,
        )

    @property
    def verdicts(self) -> np.ndarray:
        """1 for good rows, 0 for bad ones, -1 where nobody said, from labels or from pairs, ``(R,)``."""
        return np.where(self.labels >= 0, self.labels, self.chosen)

    def split(self, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
        """Training and held-out rows, ascending.

        A column ``split`` of the data decides where there is one (``train``; ``test``, ``eval``, ``validation`` or
        ``held_out``); else rows are drawn by prompt, and pairs stay together.

        Raises:
            TeaError: if no row is left to train on.
        """
        if not len(self.groups):
            raise TeaError(f"expected rows to learn from, but {self.source} holds none; add some")
        if self.sides is not None:
            train, held_out = (np.flatnonzero(self.sides == side) for side in (0, 1))
            if not len(train):
                raise TeaError(
                    f'{self.source}: expected rows whose column "{SPLIT_COLUMN}" is train, got none; mark some'
                )
        else:
            sides = split_groups(self.units.tolist(), data.eval_fraction, data.split_seed)
            train, held_out = (np.array(side, np.int64) for side in sides)
        if data.eval_size is not None:
            distinct = np.random.default_rng(data.split_seed).permutation(np.unique(self.groups[held_out]))
            held_out = held_out[np.isin(self.groups[held_out], distinct[: data.eval_size])]
        return train, held_out

    def teaching(self, objective: ObjectiveConfig, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that the objective can learn from; pair by pair, chosen first, for dpo and ipo.

        Raises:
            TeaError: if there are none, or they are all alike to it.
        """
        name = objective.name
        if name in PAIR_OBJECTIVES:
            found, wanted = self._whole_pairs(rows), "preference pairs (chosen, rejected)"
        elif name == "kto":
            found = rows[self.verdicts[rows] >= 0]
            wanted = "labels (label: true or false) or preference pairs"
        elif name == "cross_entropy":
            found, wanted = rows[self.verdicts[rows] != 0], "texts that are not marked as bad"
        else:
            found = rows[~np.isnan(self.rewards[rows])]
            wanted = "rewards (a column reward, rewards in the recipe, or tea-rl relabel)"
        if not len(found):
            raise TeaError(
                f"objective.name {name} learns from {wanted}, but the training rows of {self.source} have none; add them or "
                "choose another objective"
            )
        if name not in _WITHOUT_REWARD:
            self._refuse_equal(objective, found)
        return found

    def left_out(self, objective: ObjectiveConfig, rows: np.ndarray, teaching: np.ndarray) -> str | None:
        """A line about the training rows that teach the objective nothing; None if all do."""
        count = len(rows) - len(teaching)
        if not count:
            return None
        name = objective.name
        if name == "cross_entropy":
            pairs = bool((self.pairs[rows] >= 0).any())
            good, bad = ("chosen", "rejected") if pairs else ("good (label true)", "bad (label false)")
            hint = "; to learn from both take objective.name dpo" if pairs else ""
            return (
                f"cross_entropy imitates the {len(teaching)} {good} completions; the {count} {bad} ones are left out of "
                f"training{hint}"
            )
        lacks = {"kto": "a label", "dpo": "a whole pair", "ipo": "a whole pair"}.get(name, "a reward")
        return f"{count} of {len(rows)} training rows are without {lacks} and teach {name} nothing; they are left out"

    def returns(self, objective: ObjectiveConfig, rows: np.ndarray) -> np.ndarray:
        """What `TeaHead.fit_returns` measures asked returns by: the rewards of these training rows, NaN for none, ``(R,)``.

        Raises:
            TeaError: if the objective compares rows instead of imitating them, or fewer than two different rewards are there.
        """
        if objective.name not in _WITH_RETURNS:
            raise TeaError(
                f"head.return_conditioning learns to imitate what earned a return: objective.name must be one of "
                f"{', '.join(_WITH_RETURNS)}, got {objective.name}; change it or switch the conditioning off"
            )
        found = self.rewards[rows]
        distinct = np.unique(found[~np.isnan(found)])
        if len(distinct) < 2:
            what = f"the reward {distinct[0]:g} only" if len(distinct) else "no reward"
            raise TeaError(
                f"head.return_conditioning needs rewards that differ, but the {len(rows)} training rows of {self.source} have "
                f"{what}; add a column reward, rewards in the recipe, or use tea-rl relabel"
            )
        return found

    def available_metrics(self, rows: np.ndarray) -> set[str]:
        """Metrics beyond those of every evaluation that these held-out rows can give."""
        found = set()
        rewards = self.rewards[rows]
        rewards = rewards[~np.isnan(rewards)]
        if len(rewards) > 1 and rewards.min() < rewards.max():
            found.add("eval_reward_correlation")
        if len(self._whole_pairs(rows)):
            found |= {"eval_pair_accuracy", "eval_pair_accuracy_logp", "eval_base_pair_accuracy"}
        return found

    def _whole_pairs(self, rows: np.ndarray) -> np.ndarray:
        """Rows of pairs both of whose rows are there (``max_length`` may have cost one), chosen before rejected."""
        paired = rows[self.pairs[rows] >= 0]
        order = np.lexsort((-self.chosen[paired].astype(np.int64), self.pairs[paired]))
        paired = paired[order]
        pairs, counts = np.unique(self.pairs[paired], return_counts=True)
        return paired[np.isin(self.pairs[paired], pairs[counts == 2])]

    def _refuse_equal(self, objective: ObjectiveConfig, rows: np.ndarray) -> None:
        rewards = torch.from_numpy(self.rewards[rows]).float()
        if bool((rewards == rewards[0]).all()):
            raise TeaError(
                f"nothing to learn: all {len(rows)} training rows of {self.source} have the reward {rewards[0]:g}; give "
                "rewards that differ, or objective.name cross_entropy to learn every row alike"
            )
        if objective.name not in ("grpo", "rloo"):
            return
        groups = torch.from_numpy(self.groups[rows])
        if not bool(stored_advantages(objective.name, rewards, groups, objective.scale_rewards).any()):
            raise TeaError(
                f"nothing to learn: objective.name {objective.name} compares the completions of a prompt, but no two of the "
                f"same prompt differ in reward in the training rows of {self.source}; use objective.name awr or reinforce, or "
                "give several completions of each prompt"
            )


def check_rows(table: RowTable, recipe: Recipe) -> None:
    """Refuse rows that a recipe cannot train on.

    Raises:
        TeaError: if nothing is left to train on, or nothing to learn, or the held-out rows cannot give
            ``train.metric_for_best_model``.
    """
    train, held_out = table.split(recipe.data)
    teaching = table.teaching(recipe.objective, train)
    if recipe.head.return_conditioning:
        table.returns(recipe.objective, teaching)
    check_metric(table, held_out, recipe.train.metric_for_best_model)


def check_metric(table: RowTable, held_out: np.ndarray, metric: str | None) -> None:
    """Refuse a metric for the best head that these held-out rows cannot give.

    Raises:
        TeaError: saying what they lack.
    """
    if metric is None:
        return
    if not len(held_out):
        mend = (
            "mark some as test in the column split" if table.sides is not None else "raise data.eval_fraction"
        )
        raise TeaError(f"train.metric_for_best_model {metric} needs held-out rows, got none; {mend}")
    needs = (
        "rewards that differ"
        if "reward" in metric
        else "whole preference pairs"
        if "pair" in metric
        else None
    )
    if needs is not None and metric not in table.available_metrics(held_out):
        raise TeaError(
            f"train.metric_for_best_model {metric} needs {needs} among the {len(held_out)} held-out rows of {table.source}, got "
            "none; take eval_loss, say, or hold out more"
        )


def _stored_sides(store: StateStore) -> np.ndarray | None:
    """`RowTable.sides` of a store. Its texts are parsed only where the column is mentioned at all."""
    names = [shard["name"] for shard in store.manifest.shards]
    key = f'"{SPLIT_COLUMN}"'.encode()
    if not any(_mentions(store.path / f"{name}.jsonl", key) for name in names):
        return None
    sides = np.zeros(len(store), np.int8)
    marked, problem = False, None
    for row, text in enumerate(store.texts()):
        marked = marked or SPLIT_COLUMN in text["columns"]
        try:
            sides[row] = split_side(text["columns"], text["place"])
        except TeaError as error:
            problem = problem or error
    if marked and problem is not None:
        raise problem
    return sides if marked else None


def _mentions(path: object, key: bytes) -> bool:
    with open(str(path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(key) >= 0
