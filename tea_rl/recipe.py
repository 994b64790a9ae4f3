"""The recipe: everything a run is made of, in one YAML file.

A recipe is validated here, once; the rest of the library trusts it. Its groups are in `tea_rl.recipe_groups`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
from tea_rl.recipe_compare import CompareConfig
from tea_rl.recipe_groups import (
    FOR_PROMPTS,
    OFFLINE_OBJECTIVES,
    TOKEN_CREDIT_OBJECTIVES,
    AnchorConfig,
    DataConfig,
    EnvConfig,
    Group,
    ModelConfig,
    ObjectiveConfig,
    RewardSpec,
    RolloutConfig,
    TrainConfig,
)
from tea_rl.recipe_schema import (
    SchemaProblem,
    SchemaRow,
    dotted,
    field_at,
    markdown_tables,
    schema_rows,
    shown,
    validate,
)
from tea_rl.recipe_source import find_recipe_file, read_recipe_file, resolve_paths, shipped_recipes
from tea_rl.recipe_yaml import dump_yaml, parse_yaml

__all__ = [
    "AnchorConfig", "CompareConfig", "DataConfig", "EnvConfig", "HeadConfig", "ModelConfig", "ObjectiveConfig", "Recipe", "RewardSpec",
    "RolloutConfig", "TrainConfig", "describe_schema", "load_recipe", "parse_recipe", "schema_markdown",
    "shipped_recipes",
]  # fmt: skip


class Recipe(Group):
    """A whole run."""

    name: str = Field(
        "recipe",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the run's folder; the file's name unless set.",
    )
    description: str = Field("", description="One line on what the recipe shows.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The frozen backbone.")
    head: HeadConfig = Field(default_factory=HeadConfig, description="The trainable ensemble.")
    data: DataConfig = Field(
        default_factory=DataConfig,
        description="Prompts, labelled rows or stored states.",
        examples=["{prompts: prompts.txt}"],
    )
    env: EnvConfig = Field(default_factory=EnvConfig, description="A text environment to play in.")
    rewards: list[RewardSpec] = Field(
        default_factory=list,
        description="Terms whose weighted sum is the reward; offline they replace the labels of the data.",
        examples=["[{name: sentiment}]"],
    )
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Sampling.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Algorithm.")
    anchor: AnchorConfig = Field(default_factory=AnchorConfig, description="Pull to the original model.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Optimisation and bookkeeping.")
    compare: CompareConfig = Field(default_factory=CompareConfig, description="Settings of tea-rl compare.")
    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def base_dir(self) -> Path:
        """Folder against which relative paths were resolved: that of the YAML file."""
        return self._base_dir

    @property
    def offline(self) -> bool:
        """Whether it learns from labelled rows or stored states instead of generating."""
        return self.data.dataset is not None or self.data.store is not None

    @model_validator(mode="after")
    def _settings_agree(self) -> Recipe:
        sources = [name for name in ("prompts", "dataset", "store") if getattr(self.data, name) is not None]
        sources = [f"data.{name}" for name in sources] + (["env.id"] if self.env.id is not None else [])
        if len(sources) != 1:
            raise TeaError(
                "a recipe needs one of data.prompts (to generate from), data.dataset (labelled rows), data.store (stored states) "
                f"or env.id (an environment), got {' and '.join(sources) or 'none'}; set exactly one."
            )
        self._environment_agrees()
        if not self.offline and self.objective.name in OFFLINE_OBJECTIVES:
            raise TeaError(
                f"objective.name {self.objective.name} learns from labelled data and needs data.dataset or data.store, got "
                f"{sources[0]}; choose grpo, rloo, reinforce or ppo, or give labelled data."
            )
        if self.data.prompts is not None and not self.rewards:
            raise TeaError(
                "rewards must hold at least one term when data.prompts is given; add one, such as sentiment."
            )
        if self.head.train_reference and self.anchor.conservativity > 0:
            raise TeaError(
                "head.train_reference needs anchor.conservativity 0 (the anchor would hold on to a moving reference), got "
                f"{self.anchor.conservativity:g}; set one of them."
            )
        if self.head.return_conditioning and not self.offline:
            raise TeaError(
                f"head.return_conditioning learns from stored completions of all qualities and needs data.store or data.dataset, got "
                f"{sources[0]}; store some with tea-rl rollout and train on them, or set it to false."
            )
        if self.objective.top_entropy_quantile < 1 and self.offline:
            raise TeaError(
                "objective.top_entropy_quantile picks tokens by the entropy of the policy that wrote them and needs data.prompts or env.id, "
                f"got {sources[0]}, where it is not known; set it to 1."
            )
        if self.objective.token_credit > 0 and (
            not self.offline or self.objective.name not in TOKEN_CREDIT_OBJECTIVES
        ):
            raise TeaError(
                f"objective.token_credit is for stored completions and {', '.join(TOKEN_CREDIT_OBJECTIVES)}, got objective.name "
                f"{self.objective.name}{'' if self.offline else ' online'}; set one of these with labelled data, or "
                "token_credit: 0."
            )
        for name in ("expected_gradient", "counterfactuals"):
            if getattr(self.objective, name) > 0 and (
                self.data.prompts is None or not isinstance(self.head.shortlist_size, int)
            ):
                raise TeaError(
                    f"objective.{name} needs data.prompts and a number as head.shortlist_size, got "
                    f"{sources[0]} and {self.head.shortlist_size}; set them, or {name}: 0."
                )
        if self.objective.counterfactuals > 0 and self.head.shortlist_size == 1:
            raise TeaError(
                "objective.counterfactuals replaces tokens by others of the shortlist and needs head.shortlist_size of at least 2, got 1; "
                "raise it, or set counterfactuals: 0."
            )
        if self.objective.expected_gradient > 0 and self.rollout.num_generations == 1:
            raise TeaError(
                "objective.expected_gradient compares the completions of a prompt and needs rollout.num_generations of at least 2, "
                "got 1; raise it, or set expected_gradient: 0."
            )
        if self.rollout.dynamic_sampling > 0 and (
            self.objective.name not in ("grpo", "rloo") or self.objective.scale_rewards == "batch"
        ):
            raise TeaError(
                "rollout.dynamic_sampling leaves prompts out, so completions must be compared within their prompt: it needs "
                f"objective.name grpo or rloo and scale_rewards group or none, got {self.objective.name} and "
                f"{self.objective.scale_rewards}; set them, or dynamic_sampling: 0."
            )
        if self.anchor.dataset is not None and (not self.offline or self.anchor.conservativity == 0):
            lacks = "data.dataset or data.store" if not self.offline else "anchor.conservativity above 0"
            raise TeaError(
                f"anchor.dataset is text to stay close to the original model on while learning offline and needs {lacks}, got "
                f"{'data.prompts' if not self.offline else '0'}; set that or delete anchor.dataset."
            )
        if self.rollout.num_generations == 1 and self.objective.name in ("grpo", "rloo"):
            raise TeaError(
                f"objective.name {self.objective.name} compares the completions of a prompt and needs "
                "rollout.num_generations of at least 2, got 1; raise it or use reinforce."
            )
        if self.rollout.reward_timeout is not None and self.rollout.reward_workers == 0:
            raise TeaError(
                "rollout.reward_timeout stops a process that computes rewards and needs rollout.reward_workers of at least 1, "
                "got 0; raise it, or delete reward_timeout."
            )
        for (group, name), silent in FOR_PROMPTS.items():
            if getattr(getattr(self, group), name) != silent and self.data.prompts is None:
                raise TeaError(
                    f"{group}.{name} is for completions of prompts and needs data.prompts, got {sources[0]}; set {name}: {silent}."
                )
        if self.rollout.top_p < 1 or self.rollout.top_k > 0:
            raise TeaError(
                "training needs rollout.top_p 1 and rollout.top_k 0, got "
                f"{self.rollout.top_p:g} and {self.rollout.top_k}: a truncating sampler draws from another distribution "
                "than the one whose log-probabilities are stored; sharpen with rollout.temperature instead."
            )
        if self.data.system is not None and self.data.format == "plain":
            raise TeaError(
                "data.system needs data.format chat, got plain; set format: chat or delete system."
            )
        return self

    def _environment_agrees(self) -> None:
        if self.env.id is None:
            return
        if self.rewards:
            raise TeaError(
                f"rewards belong to prompts; {self.env.id} pays its own, got {len(self.rewards)} more; delete them, or weigh the "
                "environment's terms with the wrapper reward_terms."
            )
        for name, default in (("guidance", 1.0), ("dagger_rounds", 0)):
            value = getattr(self.env.expert, name)
            if value != default and not self.env.scores_choices:
                raise TeaError(
                    f"env.expert.{name} is for answers that the environment lists, got {value:g} without env.choose_admissible; "
                    f"set choose_admissible: true, or delete {name}."
                )
            if value != default and not self.env.expert.episodes:
                raise TeaError(
                    f"env.expert.{name} is {value:g}, but no episode is imitated; set env.expert.episodes, or delete {name}."
                )
        if self.env.expert.episodes > self.env.num_starts:
            raise TeaError(
                f"env.expert.episodes is {self.env.expert.episodes}, but only {self.env.num_starts} starts are for training "
                "(env.num_starts) and those behind them are held out; lower the one or raise the other."
            )
        if self.env.system is not None and self.env.format == "chat" and not self.env.system.strip():
            raise TeaError("env.system is blank; write a message or delete it.")

    def to_yaml(self) -> str:
        """The recipe with every default written out; loading it gives an equal recipe."""
        return dump_yaml(self.model_dump())


def _parse_override(override: str, option: str) -> tuple[tuple[Any, ...], Any]:
    key, equals, text = override.partition("=")
    parts = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    if not equals or "" in parts:
        raise TeaError(f'{option} "{override}": expected KEY=VALUE such as train.max_steps=50.')
    value = parse_yaml(text, f"{option} {override}")
    _, field, _ = field_at(Recipe, parts)
    if (
        field is not None
        and field.annotation in (str, str | None)
        and not isinstance(value, (str, type(None)))
    ):
        value = text.strip()  # a text setting: 007 or true are meant as they are typed
    return parts, value


def _apply_override(raw: dict[str, Any], path: tuple[Any, ...], value: Any, origin: str) -> None:
    here: Any = raw
    for position, part in enumerate(path):
        seen = dotted(path[:position])
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise TeaError(
                    f"{origin}: {seen} is a list of {len(here)}; expected a position from 0 to {len(here) - 1} "
                    f'after it, got "{part}".'
                )
        elif not isinstance(here, dict):
            raise TeaError(f'{origin}: "{seen}" is {shown(here)}, which has nothing called "{part}" in it.')
        if position == len(path) - 1:
            here[part] = value
        else:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[part]


def parse_recipe(
    raw: Mapping[str, Any],
    source: str = "recipe",
    base_dir: Path | None = None,
    overrides: Sequence[str] = (),
    option: str = "--set",
) -> Recipe:
    """Validate a mapping as read from YAML.

    Paths inside it are relative to ``base_dir`` (default: the current folder); those in ``overrides`` are relative to the
    current folder, as a shell user expects; errors name the command-line ``option`` that gave them.

    Raises:
        TeaError: the first mistake, in one line that starts with ``source`` or with the override at fault.
    """
    base_dir = (base_dir or Path.cwd()).resolve()
    settings = deepcopy(dict(raw))
    resolve_paths(settings, base_dir)
    applied: list[tuple[tuple[Any, ...], str]] = []
    for override in overrides:
        path, value = _parse_override(override, option)
        _apply_override(settings, path, value, f"{option} {override}")
        applied.append((path, override))
    resolve_paths(settings, Path.cwd())
    try:
        recipe = validate(Recipe, settings)
    except SchemaProblem as problem:
        where = problem.path
        blame = [text for path, text in applied if path[: len(where)] == where or where[: len(path)] == path]
        origin = f"{option} {blame[-1]}" if blame and where else source
        raise TeaError(f"{origin}: {problem}") from None
    except TeaError as error:
        raise TeaError(f"{source}: {error}") from None
    recipe._base_dir = base_dir
    return recipe


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or any recipe by the path of its YAML file.

    Args:
        name_or_path: ``"quickstart"`` or ``"my_run.yaml"``.
        overrides: settings such as ``"train.max_steps=50"`` or ``"rewards.0.weight=2"``; values are YAML.

    Raises:
        TeaError: for anything wrong with name, file, syntax or settings, in one line.
    """
    path = find_recipe_file(os.fspath(name_or_path))
    source = path.name if path.name == str(name_or_path) else str(name_or_path)
    raw = read_recipe_file(path, source)
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "recipe")
    return parse_recipe(raw, source, path.resolve().parent, overrides)


def describe_schema() -> list[SchemaRow]:
    """Every setting of a recipe: key, what it expects, default (``None`` = required) and meaning."""
    return schema_rows(Recipe)


def schema_markdown() -> str:
    """The recipe reference as Markdown, one table a group."""
    return markdown_tables(Recipe)
