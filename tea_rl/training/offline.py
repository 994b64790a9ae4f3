"""Offline training of a TEA head: from stored states, or from labelled rows that are embedded first.

A step is one optimizer step on a minibatch read from the store. No backbone is loaded for it, and nothing but a minibatch
of states is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tea_rl.data.encode import labelled_digest
from tea_rl.data.labelled import read_labelled
from tea_rl.errors import TeaError, did_you_mean
from tea_rl.evaluation.evaluate import Evaluation
from tea_rl.evaluation.offline import LOWER_IS_BETTER, METRICS, offline_metrics, row_figures
from tea_rl.recipe import Recipe, TrainConfig
from tea_rl.states.manifest import ANCHOR_NAME, MANIFEST_NAME
from tea_rl.states.relabel import rescore
from tea_rl.states.store import StateStore
from tea_rl.training.files import atomic_write_text, disk_errors
from tea_rl.training.loop import TrainingLoop, TrainResult
from tea_rl.training.manifest import BaseModelFacts, describe_changes
from tea_rl.training.offline_data import OfflineData
from tea_rl.training.offline_learner import OfflineLearner
from tea_rl.training.offline_rows import RowTable, check_metric, check_rows
from tea_rl.training.progress import Listener
from tea_rl.training.run_directory import RunDirectory, has_run
from tea_rl.training.seeding import seed_step
from tea_rl.training.stored_recipe import fit_recipe

#: Where a run from labelled rows keeps their states.
STORE_NAME = "store"
_BEST_NAME = "best.safetensors"
#: Objectives that read the stored behaviour and hold to the trust region ``target_kl``.
POLICY_GRADIENTS = ("grpo", "rloo", "reinforce", "ppo")


def open_store(recipe: Recipe, run_path: Path, listener: Listener) -> StateStore:
    """The store a recipe learns from: its own, or one made of its dataset inside the run.

    Raises:
        TeaError: if there is none, it is damaged, or its rows cannot be learnt from (before a backbone is loaded).
    """
    if recipe.data.store is not None:
        return StateStore.open(recipe.data.store)
    path = run_path / STORE_NAME
    if has_run(run_path):  # what a run began with is what it goes on with
        with suppress(TeaError):  # damaged: embedding mends it
            open_anchor(recipe, StateStore.open(path))
            return StateStore.open(path)
    from tea_rl.states.embed import embed

    digest = check_dataset(recipe)
    begun = _EmbeddingRecord(run_path)
    begun.check(recipe, digest)
    begun.write(recipe, digest)
    try:
        return embed(recipe, path, listener)
    except BaseException:
        if not path.exists():  # nothing was begun: leave no run behind
            begun.remove()
        raise


def open_anchor(recipe: Recipe, store: StateStore) -> StateStore | None:
    """The states of the recipe's ``anchor.dataset`` inside a store; None if the recipe names none.

    Raises:
        TeaError: if the store has none, or they are damaged.
    """
    if recipe.anchor.dataset is None:
        return None
    path = store.path / ANCHOR_NAME
    if not path.exists():
        raise TeaError(
            f"the recipe names anchor.dataset {recipe.anchor.dataset}, but the store {store.path} holds no states of it; run tea-rl "
            "embed with this recipe and the same --output, or delete anchor.dataset"
        )
    anchor = StateStore.open(path)
    for name in ("reference_digest", "context", "shortlist_size", "temperature"):
        if anchor.keys[name] != store.keys[name]:
            raise TeaError(
                f"the store {path} does not belong to the one around it ({name}: {anchor.keys[name]!r}, not "
                f"{store.keys[name]!r}); remove it with rm -r {path} and run tea-rl embed again"
            )
    return anchor


def check_dataset(recipe: Recipe) -> str:
    """Refuse labelled rows that the recipe cannot learn from, before the backbone reads them all.

    Returns:
        their digest.

    Raises:
        TeaError: if they lack what the objective learns from, there is nothing to learn, or the held-out ones cannot give
            the metric of the best head.
    """
    assert recipe.data.dataset is not None
    data = read_labelled(recipe.data.dataset, recipe.data.kwargs, recipe.data.columns)
    check_rows(RowTable.of_labelled(data, recipe), recipe)
    return labelled_digest(data.rows)


class _EmbeddingRecord:
    """What a run's embedding was begun with, kept beside it until the run has a recipe of its own."""

    def __init__(self, run_path: Path) -> None:
        self.run_path, self.path = run_path, run_path / "embedding.json"

    def check(self, recipe: Recipe, digest: str) -> None:
        """Refuse to go on with other settings or rows.

        Raises:
            TeaError: naming what differs, with both values.
        """
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or torn: the store has digests of its own
            return
        changed = describe_changes(before.get("settings"), self._settings(recipe))
        if not changed and before.get("rows") != digest:
            changed = f"the rows of {recipe.data.dataset}, which have changed"
        if changed:
            raise TeaError(
                f"cannot resume {self.run_path}: its embedding was begun with other data or settings: {changed}; set that back "
                "or start a new run"
            )

    def write(self, recipe: Recipe, digest: str) -> None:
        """Note down what an embedding begins with."""
        facts = {"settings": self._settings(recipe), "rows": digest}
        with disk_errors(f"write {self.path}"):
            atomic_write_text(self.path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """Forget it."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _settings(self, recipe: Recipe) -> dict[str, Any]:
        """Everything in a recipe that decides what a store holds."""
        raw = recipe.model_dump(mode="json")
        for name in ("eval_prompts", "eval_fraction", "eval_size", "split_seed", "size"):
            del raw["data"][name]
        head = {name: raw["head"][name] for name in ("context", "shortlist_size")}
        rollout = {"temperature": raw["rollout"]["temperature"]}
        anchor = {name: raw["anchor"][name] for name in ("dataset", "kwargs", "size")}
        return {
            **{name: raw[name] for name in ("model", "data", "rewards")},
            "head": head,
            "rollout": rollout,
            "anchor": anchor,
        }


def check_best_model(train: TrainConfig) -> None:
    """Refuse settings about the best head that contradict themselves.

    Raises:
        TeaError: for patience without a metric, or a metric that there is not.
    """
    if train.early_stopping_patience is not None and train.metric_for_best_model is None:
        raise TeaError(
            "train.early_stopping_patience needs train.metric_for_best_model, got none; set it to eval_loss, say"
        )
    if train.metric_for_best_model is not None and train.metric_for_best_model not in METRICS:
        raise TeaError(
            f"train.metric_for_best_model must be one of {', '.join(METRICS)}, got {train.metric_for_best_model}."
            f"{did_you_mean(train.metric_for_best_model, METRICS)}"
        )


def store_facts(store: StateStore) -> BaseModelFacts:
    """What a store knows of its base model."""
    keys, settings = store.keys, store.manifest.header.base_settings
    name = keys["base_model_name_or_path"]
    return BaseModelFacts(name, settings.get("source", name), keys["reference_digest"], keys["dtype"], "cpu")


class OfflineTrainer(TrainingLoop):
    """An offline run: a step reads a minibatch and descends; `tea_rl.training.online.train` is the usual way in."""

    learner: OfflineLearner

    def __init__(self, recipe: Recipe, run: RunDirectory, listener: Listener, resume: bool) -> None:
        super().__init__(recipe, run, listener, resume)
        train = recipe.train
        check_best_model(train)
        self.store = open_store(recipe, run.path, listener)
        recipe = self.recipe = fit_recipe(recipe, self.store, listener)
        if recipe.rewards and recipe.data.store is not None:
            listener.on_note("scoring the stored completions with the recipe's rewards")
            self.store.rewards, self.store.terms = rescore(self.store, recipe.rewards, recipe.base_dir)
        self.data = OfflineData(self.store, recipe, open_anchor(recipe, self.store))
        check_metric(self.data.table, self.data.eval_rows, train.metric_for_best_model)
        if self.data.left_out is not None:
            listener.on_note(self.data.left_out)
        if self.data.credit is not None:
            listener.on_note(self.data.credit.describe())
        self.total_steps = self.data.total_steps
        head = self.store.make_head(recipe.head, seed=train.seed)
        if recipe.model.compile:
            head.use_compiler()
        self.data.fit_returns(head)
        learner = OfflineLearner(
            head, recipe.objective, recipe.anchor, train, self.store.temperature, self.total_steps
        )
        stores = [self.store] if self.data.anchor is None else [self.store, self.data.anchor.store]
        manifests = b"".join((store.path / MANIFEST_NAME).read_bytes() for store in stores)
        digest = hashlib.sha256(manifests).hexdigest()
        self.base_metrics: dict[str, float] = {}
        self.best = Best(train.metric_for_best_model, train.early_stopping_patience)
        self._prepare(head, learner, store_facts(self.store), digest)

    def _begin(self) -> int:
        first = super()._begin()
        _EmbeddingRecord(self.run.path).remove()  # recipe.yaml says it all from now on
        return first

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        with self.clock.stage("read"):
            batch = self.data.batch(step, seed_step(self.recipe.train.seed, step))
        with self.clock.stage("update"):
            report = self.learner.update(batch)
        seconds = time.perf_counter() - started
        row = {
            "step": step,
            "epoch": step / self.data.steps_per_epoch,
            "loss": report.loss,
            "kl": report.kl,
            **({} if self.data.anchor is None else {"anchor_kl": report.anchor_kl}),
            "entropy": report.entropy,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "skipped_steps": self.learner.skipped_steps,
            "tokens_per_second": len(batch) / seconds,
            "seconds": seconds,
        }
        self._log(step, row)
        self.listener.on_step(row)
        if self._left_trust_region(step, report.behaviour_kl):
            self.ended = True
            self.listener.on_note(
                f"step {step}: KL(behaviour || policy) passed objective.target_kl "
                f"{self.recipe.objective.target_kl:g}; training ends"
            )

    def _left_trust_region(self, step: int, behaviour_kl: float) -> bool:
        objective = self.recipe.objective
        if objective.name not in POLICY_GRADIENTS or objective.target_kl is None:
            return False
        # As online: the first pass over the data always completes.
        return step > self.data.steps_per_epoch and behaviour_kl > objective.target_kl

    def _evaluate(self, step: int, record: bool = True) -> None:
        """Held-out figures; at step 0 those of the original model."""
        best = self.best
        if not len(self.data.eval_rows):
            return
        figures = row_figures([self.head], self.store, self.data.eval_rows)[0]
        metrics = offline_metrics(figures)
        metrics.update(self.data.return_metrics(self.head, figures))
        metrics.update(self.data.anchor_metrics(self.head))
        self.last_evaluation = Evaluation(metrics, [])
        row: dict[str, Any] = {"step": step, **metrics}
        if step == 0:
            self.base_metrics = metrics
        if record:
            if best.better(step, metrics):
                best.weights = {
                    name: value.detach().clone() for name, value in self.head.head_state().items()
                }
            elif best.exhausted and step:
                self.ended = True
            self._log(step, row)
            self._flush()
            self._draw_curves()
        self.listener.on_evaluation(row)
        if record and self.ended and best.exhausted:
            self.listener.on_note(
                f"no better {best.metric} in {best.patience} evaluations; training ends, the head of step {best.step} is kept"
            )

    # -- the best head ------------------------------------------------------------------------------------------------

    def _write_state(self, folder: Path) -> dict[str, Any]:
        if self.best.weights:
            save_file(self.best.weights, folder / _BEST_NAME)
        return {**super()._write_state(folder), "ended": self.ended, "best": self.best.state()}

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        super()._load_state(state, folder)
        self.ended = state["ended"]
        self.best.load_state(state["best"])
        if (folder / _BEST_NAME).is_file():
            self.best.weights = load_file(folder / _BEST_NAME)
        evaluations = [row for row in self.run.read_metrics() if "eval_loss" in row]
        if evaluations and evaluations[0]["step"] == 0:
            self.base_metrics = {name: value for name, value in evaluations[0].items() if name != "step"}

    def _finish(self) -> None:
        if self.best.weights:
            self.head.load_state_dict(self.best.weights, strict=False)
            self.last_evaluation = Evaluation(self.best.metrics, [])
        super()._finish()

    def _result(self, step: int, stopped: bool) -> TrainResult:
        return TrainResult(self.run.path, step, stopped, self.last_evaluation, base_metrics=self.base_metrics)


class Best:
    """The best head so far by a held-out metric, the original model (step 0) included, and when to give up.

    Args:
        metric: its name; None: the last head is kept.
        patience: evaluations without a better one before the run ends; None: never.
    """

    def __init__(self, metric: str | None, patience: int | None) -> None:
        self.metric, self.patience = metric, patience
        self.step, self.waited = -1, 0
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def better(self, step: int, metrics: dict[str, float]) -> bool:
        """Take note of an evaluation; True if it is the best yet."""
        if self.metric is None:
            return False
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        if not self.metrics or sign * metrics[self.metric] > sign * self.metrics[self.metric]:
            self.step, self.waited, self.metrics = step, 0, metrics
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Everything but the weights, as JSON values."""
        return {"step": self.step, "waited": self.waited, "metrics": self.metrics}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.step, self.waited, self.metrics = state["step"], state["waited"], state["metrics"]
