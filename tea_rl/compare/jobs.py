"""Jobs of a comparison: one method at one learning rate with one seed, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tea_rl.compare.methods import ADAPTERS, METHODS, Method, learning_rates
from tea_rl.compare.results import RESULT_NAME, JobResult, read_json
from tea_rl.errors import TeaError
from tea_rl.recipe import Recipe, parse_recipe
from tea_rl.training.files import atomic_write_text, disk_errors
from tea_rl.training.manifest import describe_changes

JOB_NAME, CURVE_NAME, TIMES_NAME, LOG_NAME = "job.json", "curve.jsonl", "times.json", "log.txt"
CHECKPOINT_NAME, ADAPTER_NAME, RUN_NAME = "checkpoint", "adapter", "run"
#: An empty file that is there once training has ended.
MEASURING_NAME = "measuring"
#: Settings of a comparison that choose its jobs, or judge them, and change none of them.
_CHOICES = ("learning_rates", "seeds", "peer_seeds", "levels", "guards")


@dataclass(frozen=True)
class Job:
    """What is to be done, and where.

    Attributes:
        folder: ``<comparison>/jobs/<method>/<rate>-seed<k>``.
        method: what is trained.
        learning_rate: of a peer; None for the others.
        seed: of training. Measuring draws with the recipe's seed, the same for all.
        recipe: the comparison's.
    """

    folder: Path
    method: Method
    learning_rate: float | None
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """``grpo-lora 0.001`` or ``tea seed 1``, for people."""
        parts = [self.method.name]
        if self.learning_rate is not None:
            parts.append(f"{self.learning_rate:g}")
        if self.seed != self.recipe.compare.seeds[0]:
            parts.append(f"seed {self.seed}")
        return " ".join(parts)

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the other jobs of its comparison, as fields of `JobResult`."""
        return {"method": self.method.name, "learning_rate": self.learning_rate, "seed": self.seed}

    @property
    def result_path(self) -> Path:
        """``result.json``."""
        return self.folder / RESULT_NAME

    @property
    def rollouts_path(self) -> Path:
        """Completions of the original model that jobs of this seed share."""
        return self.folder.parents[2] / "rollouts" / f"seed{self.seed}.json"

    def checkpoint(self) -> Path | None:
        """Where training can go on: the newest checkpoint of a peer whose time was used up."""
        found = (self.folder / CHECKPOINT_NAME).glob("checkpoint-*")
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    @property
    def is_swept(self) -> bool:
        """Whether reward and KL are measured along the strengths of its head: of the first seed of ours."""
        return self.method.name == "tea" and self.seed == self.recipe.compare.seeds[0]

    def base_outcome(self) -> JobResult | None:
        """How the original model's job of this comparison ended; None before that."""
        folder = self.folder.parents[1] / "base" / f"recipe-seed{self.recipe.compare.seeds[0]}"
        return replace(self, folder=folder).outcome()

    def facts(self) -> dict[str, Any]:
        """Everything that its result depends on, as JSON values."""
        recipe = self.recipe.model_dump(mode="json")
        for name in _CHOICES:
            del recipe["compare"][name]
        recipe["train"].pop("report_to")
        adapter = ADAPTERS.get(self.method.adapter or "")
        return {
            "method": self.method.name,
            "adapter": adapter,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "recipe": recipe,
        }

    def outcome(self) -> JobResult | None:
        """How it ended; None before that."""
        return read_json(JobResult, self.result_path) if self.result_path.is_file() else None

    def begin(self) -> None:
        """An empty folder that says what is done in it."""
        with disk_errors(f"write {self.folder}", "run the command again"):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            content = {**self.facts(), "seeds": self.recipe.compare.seeds}
            content["base_dir"] = str(self.recipe.base_dir)
            atomic_write_text(
                self.folder / JOB_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            )

    def check_same(self) -> None:
        """Refuse a folder in which another job was done.

        Raises:
            TeaError: naming what differs.
        """
        path = self.folder / JOB_NAME
        if not path.is_file():
            return
        changed = describe_changes(_facts_in(path), self.facts())
        if changed:
            raise TeaError(
                f"{self.folder.parents[2]} holds a comparison with other settings: {changed}; set them back, or choose another "
                "folder with --output"
            )


def read_job(folder: Path) -> Job:
    """The job whose folder `Job.begin` made."""
    path = folder / JOB_NAME
    facts = _facts_in(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    recipe = parse_recipe(facts["recipe"], str(path), Path(content["base_dir"]))
    recipe.compare.seeds = content["seeds"]
    return Job(folder, METHODS[facts["method"]], facts["learning_rate"], facts["seed"], recipe)


def read_jobs(output: Path) -> list[Job]:
    """Every job that was begun in a comparison's folder."""
    return [read_job(path.parent) for path in sorted((output / "jobs").glob(f"*/*/{JOB_NAME}"))]


def plan(recipe: Recipe, methods: Sequence[Method], output: Path) -> list[Job]:
    """The jobs of a comparison in the order in which they run: the base model, ours, then what takes least, so that time that
    is left over goes to what takes most."""
    methods = [METHODS["base"], *(method for method in methods if method.name != "base")]
    jobs = []
    for method in sorted(methods, key=lambda method: (method.name != "base", method.is_peer, method.cost)):
        seeds = recipe.compare.seeds
        if method.name != "tea":
            seeds = seeds[: recipe.compare.peer_seeds] if method.is_peer else seeds[:1]
        for seed in seeds:
            for rate in learning_rates(method, recipe):
                name = f"{'recipe' if rate is None else f'{rate:g}'}-seed{seed}"
                jobs.append(Job(output / "jobs" / method.name / name, method, rate, seed, recipe))
    return jobs


def _facts_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("method", "adapter", "learning_rate", "seed", "recipe")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TeaError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete the folder {path.parent} and run the command again"
        ) from error
