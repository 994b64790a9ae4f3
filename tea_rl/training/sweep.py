"""Many heads from one state store in one process: one read of each minibatch, one gather of the reference rows for all."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tea_rl.errors import TeaError
from tea_rl.evaluation.offline import (
    LOWER_IS_BETTER,
    bootstrap_interval,
    offline_metrics,
    row_figures,
)
from tea_rl.head.layer import TeaHead
from tea_rl.head.policy import PolicyTerms
from tea_rl.head.shared import shared_corrections
from tea_rl.recipe import Recipe, parse_recipe
from tea_rl.recipe_groups import GENERATING
from tea_rl.states.relabel import rescore
from tea_rl.states.store import StateStore
from tea_rl.training.checkpoint import replace_directory
from tea_rl.training.files import atomic_write_text, disk_errors
from tea_rl.training.offline import POLICY_GRADIENTS, check_best_model, open_anchor
from tea_rl.training.offline_data import OfflineData
from tea_rl.training.offline_learner import OfflineBatch, OfflineLearner, StepReport
from tea_rl.training.offline_rows import check_metric
from tea_rl.training.progress import Listener
from tea_rl.training.seeding import seed_step
from tea_rl.training.stored_recipe import fit_recipe

#: Settings that decide what a minibatch is: it is the same one for all heads.
_SHARED = {
    "objective.name", "objective.token_credit", "objective.minibatch_tokens", "train.max_steps", "train.num_train_epochs", "train.token_dropout",
    "train.state_noise", "train.short_answer_damping", "train.return_dropout",
}  # fmt: skip
#: Settings of the loop that `train` runs and a sweep does not have: heads would not differ in them.
_WITHOUT_EFFECT = {
    "objective.target_kl", "objective.inner_epochs", "train.save_steps", "train.save_total_limit", "train.eval_steps",
    "train.eval_generations", "train.sample_prompts", "train.report_to", "train.num_threads", "train.metric_for_best_model",
    "train.early_stopping_patience", "train.compile",
}  # fmt: skip
_GROUPS = ("head", "objective", "anchor", "train")
#: What heads are ranked by where the recipe names no metric: the first of these that was measured.
_RANKED_BY = ("eval_pair_accuracy_logp", "eval_reward_correlation", "eval_loss")


@dataclass
class SweepResult:
    """One head of a sweep.

    Attributes:
        number: its place in the grid, from 1; the name of its folder.
        settings: what the grid set.
        metric: what heads are ranked by.
        value, low, high: the metric on held-out rows and its 95 % bootstrap interval.
        metrics: every held-out figure.
        parameters: trained numbers.
        problem: why it did not finish; None for a head that did.
        path: folder of the saved head; None if it did not finish.
    """

    number: int
    settings: dict[str, Any]
    metric: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    problem: str | None = None
    path: str | None = None


@dataclass
class _Runner:
    """A head under way."""

    result: SweepResult
    head: TeaHead
    learner: OfflineLearner
    signal: torch.Tensor


def sweep(
    store: StateStore | str | Path,
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    output: str | Path,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[SweepResult]:
    """Train one head for every combination of a grid, on the same minibatches in the same order.

    Heads that read through the frozen reference weight share its gathered rows; each has its own optimizer and schedule. A
    head that diverges is left behind and reported. ``train.seed`` in the grid seeds the heads, not the order of the data.
    There are no checkpoints, evaluation comes once, at the end, and every head takes all steps: ``objective.target_kl``, which
    ends the passes of `train` over stored rollouts, is not looked at.

    Args:
        store: opened, or its folder.
        recipe: everything the grid does not set; its data source is replaced by the store.
        grid: values by key, such as ``{"train.learning_rate": [1e-4, 3e-4]}``.
        output: new folder, for ``heads/<number>/`` and ``results.json``.
        listener: hears of progress.
        should_stop: asked after every step; True ends the training, and what was trained is evaluated and saved.

    Returns:
        the heads, best first.

    Raises:
        TeaError: for every mistake a user can mend.
    """
    listener = listener or Listener()
    check_best_model(recipe.train)
    output = _new_folder(Path(output))
    store = store if isinstance(store, StateStore) else StateStore.open(store)
    combinations = grid_recipes(store, recipe, grid, listener)
    base = combinations[0][1]
    if recipe.rewards:
        listener.on_note("scoring the stored completions with the recipe's rewards")
        store.rewards, store.terms = rescore(store, recipe.rewards, recipe.base_dir)
    if recipe.train.num_threads is not None:
        torch.set_num_threads(recipe.train.num_threads)
    data = OfflineData(store, base, open_anchor(base, store))
    if not len(data.eval_rows):
        raise TeaError("a sweep ranks heads on held-out rows, got none; raise data.eval_fraction")
    check_metric(data.table, data.eval_rows, recipe.train.metric_for_best_model)
    for text in (data.left_out, _ignored(recipe)):
        if text is not None:
            listener.on_note(text)
    runners = _make_runners(store, data, combinations)
    listener.on_start(1, data.total_steps)
    alive = list(runners)
    for step in range(1, data.total_steps + 1):
        generator = seed_step(recipe.train.seed, step)
        report = _step(alive, data.batch(step, generator))
        alive = [runner for runner in alive if runner.result.problem is None]
        listener.on_step({"step": step, "heads": len(alive), **report})
        if not alive or should_stop():
            break
    results = _evaluate(runners, data, recipe.train.metric_for_best_model)
    _save(output, runners, results)
    return results


def grid_recipes(
    store: StateStore, recipe: Recipe, grid: Mapping[str, Sequence[Any]], listener: Listener | None = None
) -> list[tuple[dict[str, Any], Recipe]]:
    """Settings and recipe of every combination, the last key varying fastest.

    Raises:
        TeaError: for a key that cannot vary, an empty list of values, a value the recipe refuses, two combinations that are the
            same, or a store that does not fit.
    """
    listener = listener or Listener()
    for key, values in grid.items():
        if key.split(".")[0] not in _GROUPS or key.startswith("head.context") or key in _SHARED:
            raise TeaError(
                f"--grid {key}: all heads of a sweep learn from the same states and minibatches, so only settings of "
                f"{', '.join(_GROUPS)} that leave these alone can vary; sweep that one in separate runs"
            )
        if key in _WITHOUT_EFFECT:
            raise TeaError(
                f"--grid {key}: a sweep trains all heads together, takes every step and evaluates once, so that heads would not differ in it; "
                "compare that in separate runs of tea-rl train"
            )
        if not len(values):
            raise TeaError(f"--grid {key}: expected values, got none; write {key}=A,B")
    # Only what the recipe says itself: `fit_recipe` takes the rest from the store.
    raw = recipe.model_dump(exclude_unset=True)
    raw["data"].update(prompts=None, dataset=None, store=str(Path(store.path).resolve()))
    for group, name in GENERATING:
        raw.get(group, {}).pop(name, None)
    combinations: list[tuple[dict[str, Any], Recipe]] = []
    places = list(itertools.product(*(range(len(values)) for values in grid.values())))
    for place in places:
        settings = {key: values[at] for (key, values), at in zip(grid.items(), place, strict=True)}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        source = " ".join(f"--grid {text}" for text in overrides)
        found = parse_recipe(raw, source, recipe.base_dir, overrides, "--grid")
        # One note is enough for all.
        found = fit_recipe(found, store, Listener() if combinations else listener)
        for earlier, (_, other) in zip(places, combinations, strict=False):
            if other == found:  # perhaps in another spelling, such as 1e-4 and 0.0001
                key = next(key for key, one, two in zip(grid, earlier, place, strict=True) if one != two)
                raise TeaError(
                    f"--grid {key}: expected values that differ, got {json.dumps(settings[key])} twice; remove one"
                )
        combinations.append((settings, found))
    return combinations


def _ignored(recipe: Recipe) -> str | None:
    """A line about a setting that the recipe makes and a sweep does not look at; None if there is none."""
    objective = recipe.objective
    if "target_kl" not in objective.model_fields_set or objective.target_kl is None:
        return None
    if objective.name not in POLICY_GRADIENTS:
        return None
    return (
        f"objective.target_kl {objective.target_kl:g} is not looked at in a sweep: every head takes all steps (tea-rl train ends "
        "the passes there)"
    )


def _make_runners(
    store: StateStore, data: OfflineData, combinations: Sequence[tuple[dict[str, Any], Recipe]]
) -> list[_Runner]:
    runners: list[_Runner] = []
    for number, (settings, recipe) in enumerate(combinations, start=1):
        if runners:
            first = runners[0].head  # the reference weight is shared, not copied
            head = TeaHead(first, recipe.head, logit_scale=first.logit_scale, seed=recipe.train.seed)
            head.base_model_name_or_path = first.base_model_name_or_path
            head.reference_digest, head.base_settings = first.reference_digest, first.base_settings
        else:
            head = store.make_head(recipe.head, seed=recipe.train.seed)
        if recipe.model.compile:
            head.use_compiler()
        data.fit_returns(head)
        learner = OfflineLearner(
            head, recipe.objective, recipe.anchor, recipe.train, store.temperature, data.total_steps
        )
        signal = data.signal_of(recipe.objective)
        result = SweepResult(number, settings)
        result.parameters = sum(parameter.numel() for parameter in head.trainable_parameters())
        runners.append(_Runner(result, head, learner, signal))
    return runners


def _step(runners: Sequence[_Runner], batch: OfflineBatch) -> dict[str, float]:
    """One step of every head on the same minibatch; a head that diverges gets its ``problem``."""
    tokens = batch.tokens
    assert tokens.shortlist is not None  # a store always holds one
    listed = [runner for runner in runners if not runner.head.full_vocabulary]
    losses = []
    for runner in runners:
        runner.head.train()
    heads = [runner.head for runner in listed]
    corrections = (
        shared_corrections(heads, tokens.states, tokens.shortlist.ids, batch.returns) if heads else []
    )
    work: list[tuple[_Runner, OfflineBatch, PolicyTerms, torch.Tensor]] = []
    for runner, (delta, shift) in zip(listed, corrections, strict=True):
        learner = runner.learner
        terms = runner.head.terms_of_correction(
            delta,
            shift,
            tokens.shortlist,
            tokens.slots,
            tokens.within_tail_logps,
            learner.temperature,
            learner.anchor.divergence,
        )
        own = _own_batch(runner, batch)
        work.append((runner, own, terms, learner.loss(own, terms)))
    if work:
        # One backward pass for all: the heads share no trained number, so their gradients stay apart.
        torch.stack([loss for *_, loss in work]).sum().backward()
    for runner, own, terms, loss in work:
        losses.append(_guarded(runner, runner.learner.finish, own, terms, loss))
    for runner in runners:
        if runner.head.full_vocabulary:
            losses.append(_guarded(runner, runner.learner.update, _own_batch(runner, batch)))
    finite = [loss for loss in losses if math.isfinite(loss)]
    return {"loss": sum(finite) / len(finite) if finite else math.nan, "tokens": len(tokens)}


def _own_batch(runner: _Runner, batch: OfflineBatch) -> OfflineBatch:
    return replace(batch, signal=runner.signal[batch.row_numbers])


def _guarded(runner: _Runner, act: Callable[..., StepReport], *arguments: Any) -> float:
    """The loss of a step, NaN for a head that diverges in it."""
    try:
        return act(*arguments).loss
    except TeaError as error:
        runner.result.problem = str(error).split(";")[0]
        return math.nan


def _evaluate(runners: Sequence[_Runner], data: OfflineData, metric: str | None) -> list[SweepResult]:
    """Measure every head that finished and rank all, those with a problem last."""
    sound = [runner for runner in runners if runner.result.problem is None]
    for runner in sound:
        runner.head.eval()
    found = row_figures([runner.head for runner in sound], data.store, data.eval_rows) if sound else []
    for runner, figures in zip(sound, found, strict=True):
        result = runner.result
        result.metrics = {
            **offline_metrics(figures),
            **data.return_metrics(runner.head, figures),
            **data.anchor_metrics(runner.head),
        }
        if metric is None:
            metric = next(name for name in _RANKED_BY if name in result.metrics)
        result.metric, result.value = metric, result.metrics[metric]
        result.low, result.high = bootstrap_interval(figures, metric)
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def order(result: SweepResult) -> tuple[bool, float, int]:
        usable = math.isfinite(result.value)
        return not usable, sign * result.value if usable else 0.0, result.number

    return sorted((runner.result for runner in runners), key=order)


def _new_folder(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TeaError(
            f"expected a new or empty folder for the sweep, but {output} is not; choose another --output"
        )
    return output


def _save(output: Path, runners: Sequence[_Runner], results: Sequence[SweepResult]) -> None:
    for runner in runners:
        if runner.result.problem is None:
            target = output / "heads" / str(runner.result.number)
            replace_directory(target, runner.head.save_pretrained)
            runner.result.path = str(target)
    text = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    with disk_errors(f"write {output / 'results.json'}", "run the sweep again"):
        output.mkdir(parents=True, exist_ok=True)
        atomic_write_text(output / "results.json", text + "\n")
