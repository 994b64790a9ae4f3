"""The recipe: everything a run is made of, in one YAML file.

A recipe is validated here, once; the rest of the library trusts it. Field descriptions are the only help text: the
command line and the README print them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from tea_rl.errors import TeaError
from tea_rl.head.config import HeadConfig
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
    "AnchorConfig", "DataConfig", "HeadConfig", "ModelConfig", "ObjectiveConfig", "Recipe", "RewardSpec",
    "RolloutConfig", "TrainConfig", "describe_schema", "load_recipe", "parse_recipe", "schema_markdown",
    "shipped_recipes",
]  # fmt: skip


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


class ModelConfig(_Group):
    """The frozen backbone."""

    name_or_path: str = Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct", min_length=1, description="Hub id, local folder or .gguf file."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the backbone; auto picks the fastest safe one for the device."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="Load the backbone's weights in 8 or 4 bits (bitsandbytes)."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the backbone runs.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")


class DataConfig(_Group):
    """Prompts to generate from, or labelled rows or stored states to learn from, and which of them are held out."""

    prompts: str | list[str] | None = Field(
        None,
        description="Online: a list of prompts; a .txt (one a line), .jsonl, .json, .csv or .parquet file; a datasets "
        "folder or Hub id; or reasoning_gym/NAME.",
        examples=["prompts.txt"],
    )
    dataset: str | None = Field(
        None,
        min_length=1,
        description="Offline: labelled rows (see tea-rl data check): a .jsonl, .json, .csv, .parquet or .txt file, a "
        "datasets folder or Hub id.",
    )
    store: str | None = Field(
        None, min_length=1, description="Offline: a state store made by tea-rl embed or tea-rl rollout."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names of the dataset's columns where they differ: {completion: text, reward: stars}.",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest dataset row in tokens, prompt included; longer ones are cut and counted.",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the source: a reasoning_gym generator's own, or name, split, data_dir, revision of a "
        "dataset.",
    )
    size: int = Field(
        512, ge=1, description="How many questions a reasoning_gym generator writes (repeats are dropped)."
    )
    exclude: list[str] = Field(
        default_factory=list, description="Prompts to leave out, such as the worked examples of the template."
    )
    format: Literal["plain", "chat"] = Field(
        "plain",
        description="plain = the model continues the text; chat = one user turn in the model's chat template.",
    )
    template: str = Field("{prompt}", description="Text around each prompt; {prompt} stands for it.")
    system: str | None = Field(None, description="System message (format chat).")
    eval_prompts: str | list[str] | None = Field(
        None, description="Held-out prompts from their own source, given like prompts; none is trained on."
    )
    eval_fraction: float = Field(
        0.25,
        ge=0.0,
        lt=1.0,
        description="Share of distinct prompts held out; unused when eval_prompts is given.",
    )
    eval_size: int | None = Field(None, ge=1, description="Most held-out prompts an evaluation uses.")
    split_seed: int = Field(0, ge=0, description="Seed of the split, and of a reasoning_gym generator.")

    @field_validator("prompts", "eval_prompts")
    @classmethod
    def _not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and (
            not value or not all(item.strip() for item in ([value] if isinstance(value, str) else value))
        ):
            raise ValueError("must hold at least one prompt, and no blank one")
        return value

    @field_validator("template")
    @classmethod
    def _has_placeholder(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("must contain {prompt}, or every prompt would read the same")
        return value


class RewardSpec(_Group):
    """One term of the reward."""

    name: str = Field(
        min_length=1, description="A built-in reward, or path/to/file.py:function.", examples=["sentiment"]
    )
    weight: float = Field(1.0, description="Factor of this term in the sum; negative punishes.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings passed to the reward.")


class RolloutConfig(_Group):
    """How completions are sampled in training."""

    prompts_per_step: int = Field(8, ge=1, description="Distinct prompts in a step.")
    num_generations: int = Field(8, ge=1, description="Completions of each prompt; they form a group.")
    max_completion_length: int = Field(32, ge=1, description="Most new tokens of a completion.")
    temperature: float = Field(
        1.0, gt=0.0, description="Divides the logits; the policy is defined at this temperature."
    )
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Nucleus sampling; training needs 1 (off).")
    top_k: int = Field(0, ge=0, description="Top-k sampling; training needs 0 (off).")
    stop: list[str] = Field(
        default_factory=list,
        description='A completion ends with the first token whose text contains one of these ("\\n").',
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("must hold no empty text, which every token contains")
        if "\\n" in value:
            raise ValueError('holds a backslash and an n; for a line break write "\\n" in double quotes')
        return value


#: Objectives that learn from labels alone; the others need rollouts (stored ones will do).
OFFLINE_OBJECTIVES = ("cross_entropy", "reward_weighted", "awr", "dpo", "ipo", "kto")


class ObjectiveConfig(_Group):
    """What a step optimises, and how far it may go."""

    name: Literal[
        "grpo", "rloo", "reinforce", "ppo",
        "cross_entropy", "reward_weighted", "awr", "dpo", "ipo", "kto",
    ] = Field("grpo", description="Algorithm; the last six learn from data alone.")  # fmt: skip
    beta: float = Field(
        0.1,
        gt=0.0,
        description="dpo, ipo, kto: weight of the log-ratio to the original model; awr: temperature of the advantage.",
    )
    negative_bound: float = Field(
        2.0,
        gt=0.0,
        description="reward_weighted: how much surprise (nats) a negative reward may buy, softly.",
    )
    clip_range: float = Field(
        0.2, gt=0.0, lt=1.0, description="PPO clip: largest change of a token's probability ratio."
    )
    clip_range_high: float | None = Field(
        None, gt=0.0, description="Upper clip when it differs from clip_range."
    )
    inner_epochs: int = Field(6, ge=1, description="Most passes over one rollout.")
    minibatch_tokens: int = Field(512, ge=1, description="Tokens in one optimizer step, about.")
    target_kl: float | None = Field(
        0.05,
        gt=0.0,
        description="Trust region: the passes end once KL(behaviour || policy) exceeds it; null = off.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="What grpo divides advantages by: standard deviation of the group, of the batch, or nothing.",
    )


class AnchorConfig(_Group):
    """The pull back to the original model."""

    conservativity: float = Field(
        0.05, ge=0.0, description="Strength of the anchor; useful up to about 2, 0 = off."
    )
    divergence: Literal["reverse_kl", "forward_kl", "logit_l1"] = Field(
        "reverse_kl", description="Distance to the original model, computed exactly."
    )
    dataset: str | None = Field(
        None,
        min_length=1,
        description="Offline: ordinary text on which the policy is held to the original model, instead of on the rows it learns "
        "from; any source that data.dataset takes.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings of that source.")
    size: int | None = Field(None, ge=2, description="Rows of it to use, the first ones; null = all.")
    minibatch_tokens: int = Field(256, ge=1, description="Tokens of it in each optimizer step, about.")


class TrainConfig(_Group):
    """Optimizer, schedule and bookkeeping."""

    learning_rate: float = Field(3e-4, gt=0.0, description="Peak learning rate.")
    warmup_steps: int = Field(5, ge=0, description="Steps over which the learning rate rises from 0.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = Field("constant_with_warmup", description="Schedule, by its name in transformers.")
    max_steps: int = Field(24, ge=1, description="Steps of training; each is one rollout and its update.")
    optim: Literal["adamw", "ademamix", "sgd"] = Field("adamw", description="Optimizer.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="First moment's decay.")
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Second moment's decay.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are clipped to this norm.")
    save_steps: int = Field(10, ge=1, description="Steps between checkpoints.")
    save_total_limit: int | None = Field(3, ge=1, description="Checkpoints kept; null = all.")
    eval_steps: int = Field(10, ge=1, description="Steps between evaluations on the held-out prompts.")
    eval_generations: int = Field(
        1, ge=1, description="Sampled completions per held-out prompt at an evaluation."
    )
    sample_prompts: int = Field(
        8, ge=0, description="Held-out prompts whose completions go to samples.jsonl."
    )
    seed: int = Field(0, ge=0, description="Seed of everything random in training.")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="Experiment tracker."
    )
    num_train_epochs: float | None = Field(
        None, gt=0.0, description="Offline: passes over the data; null = max_steps decides."
    )
    metric_for_best_model: str | None = Field(
        None,
        description="Offline: held-out metric whose best head is kept, such as eval_loss or eval_accuracy; null = the last "
        "head.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Offline: evaluations without a better metric_for_best_model before the run ends.",
    )
    token_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Offline: share of tokens left out of each update, drawn anew."
    )
    state_noise: float = Field(
        0.0, ge=0.0, description="Offline: noise added to states, as a share of their standard deviation."
    )
    short_answer_damping: float = Field(
        0.0,
        ge=0.0,
        description="Offline: rows shorter than this many tokens weigh length / this; 0 = all weigh the same.",
    )
    max_skipped_steps: int = Field(
        5, ge=1, description="Steps in a row with non-finite numbers before the run stops."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch; null = torch's choice.")


class Recipe(_Group):
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
        description="Prompts, labelled rows or stored states.", examples=["{prompts: prompts.txt}"]
    )
    rewards: list[RewardSpec] = Field(
        default_factory=list,
        description="Terms whose weighted sum is the reward; offline they replace the labels of the data.",
        examples=["[{name: sentiment}]"],
    )
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Sampling.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Algorithm.")
    anchor: AnchorConfig = Field(default_factory=AnchorConfig, description="Pull to the original model.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Optimisation and bookkeeping.")
    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def base_dir(self) -> Path:
        """Folder against which relative paths were resolved: that of the YAML file."""
        return self._base_dir

    @property
    def offline(self) -> bool:
        """Whether it learns from labelled rows or stored states instead of generating."""
        return self.data.prompts is None

    @model_validator(mode="after")
    def _settings_agree(self) -> Recipe:
        sources = [name for name in ("prompts", "dataset", "store") if getattr(self.data, name) is not None]
        if len(sources) != 1:
            raise TeaError(
                "data needs one of prompts (to generate from), dataset (labelled rows) or store (stored states), got "
                f"{' and '.join(sources) or 'none'}; set exactly one."
            )
        if not self.offline and self.objective.name in OFFLINE_OBJECTIVES:
            raise TeaError(
                f"objective.name {self.objective.name} learns from labelled data and needs data.dataset or data.store, got "
                "data.prompts; choose grpo, rloo, reinforce or ppo, or give labelled data."
            )
        if not self.offline and not self.rewards:
            raise TeaError(
                "rewards must hold at least one term when data.prompts is given; add one, such as sentiment."
            )
        if self.head.train_reference and self.anchor.conservativity > 0:
            raise TeaError(
                "head.train_reference needs anchor.conservativity 0 (the anchor would hold on to a moving reference), got "
                f"{self.anchor.conservativity:g}; set one of them."
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
