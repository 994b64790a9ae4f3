"""What a comparison finds: the schema of ``results.json`` and of every job's ``result.json``.

Numbers that are not finite are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, so that the files are
strict JSON; reading them back gives the numbers again. A field that was not measured is ``null``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tea_rl.errors import TeaError
from tea_rl.recipe_compare import Guards

#: Raised when a field changes its meaning.
VERSION = 1
RESULTS_NAME, RESULT_NAME = "results.json", "result.json"

#: done: measured. failed: an error. time, memory: stopped by the budget. skipped: not started.
Status = Literal["done", "failed", "time", "memory", "skipped"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class KlEstimate(_Strict):
    """KL divergence from the policy to the base model in nats a token, at the sampling temperature."""

    value: float = Field(description="mean over the sampled tokens")
    kind: Literal["exact", "monte-carlo", "bound"] = Field(
        description="exact: whole vocabulary summed in every sampled state; monte-carlo: mean log-probability gain of the "
        "sampled tokens; bound: log n - (n-1)/n nats a completion for the best of n samples, divided by its length"
    )
    monte_carlo: float | None = Field(
        None, description="the Monte-Carlo estimate from the same samples, as a cross-check"
    )


class Forgetting(_Strict):
    """Perplexities, a token, on text that was not trained on."""

    english_perplexity: float = Field(description="Python's language reference (`pydoc_data.topics`)")
    tasks: dict[str, float] = Field(
        default_factory=dict,
        description="reasoning-gym questions with their answers, by task; empty where the package is missing",
    )


class Metrics(_Strict):
    """Figures of one trained model on the held-out prompts."""

    reward_sampled: list[float] = Field(description="mean over the sampled completions, one number a prompt")
    reward_greedy: list[float] = Field(description="one number a prompt")
    terms: dict[str, float] = Field(
        default_factory=dict, description="mean of each reward term, unweighted, sampled"
    )
    independent: dict[str, float] = Field(
        default_factory=dict,
        description="metrics that no reward term computes; less is better of those in `LOWER_IS_BETTER`, more of the others",
    )
    kl: KlEstimate | None = None
    surprise: float = Field(description="of the samples under the base model at temperature 1, nats a token")
    distinct_1: float = Field(description="distinct words over all words of all samples")
    distinct_2: float = Field(description="distinct bigrams over all bigrams of all samples")
    self_repetition: float = Field(
        description="share of a completion's words that occurred in it before, mean"
    )
    length: float = Field(description="tokens a completion, mean")
    forgetting: Forgetting | None = None
    disagreement: float | None = Field(
        None, description="spread of the members' corrections over the size of the ensemble's, ours only"
    )


#: Independent metrics of which less is better.
LOWER_IS_BETTER = ("surprise", "self_repetition")


class Sample(_Strict):
    """One sampled completion."""

    prompt: str
    completion: str
    reward: float
    terms: dict[str, float | None] = Field(
        default_factory=dict, description="unweighted; null where a term does not apply"
    )
    tokens: list[str] = Field(default_factory=list, description="the completion, token by token")
    gains: list[float] = Field(
        default_factory=list,
        description="of each token: log-probability minus that under the base model, nats",
    )


class CurvePoint(_Strict):
    """A small held-out evaluation during training."""

    seconds: float = Field(description="of training so far; loading and evaluation do not count")
    step: int
    reward_calls: int = Field(description="completions scored for training so far; evaluation does not count")
    reward: float


class FrontierPoint(_Strict):
    """Reward and KL at one strength of the head, nothing retrained."""

    strength: float
    reward: float
    kl: float


class SeedResult(_Strict):
    """One run of a method: training, then measuring."""

    seed: int
    train_seconds: float = Field(description="wall-clock, without loading and evaluation")
    peak_memory_bytes: int | None = Field(
        None, description="largest resident size of the job's process while it trained"
    )
    trainable_parameters: int = 0
    size_on_disk_bytes: int | None = Field(
        None, description="of what training leaves behind, without the base model"
    )
    reward_calls: int = Field(0, description="completions scored for training")
    generation_tokens_per_second: float | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    metrics: Metrics
    samples: list[Sample] = Field(default_factory=list)
    frontier: list[FrontierPoint] = Field(default_factory=list)


class JobResult(_Strict):
    """``result.json`` of a job: one method, one learning rate, one seed."""

    method: str
    learning_rate: float | None = None
    seed: int
    status: Status
    reason: str | None = Field(None, description="one line, where the status is not done")
    result: SeedResult | None = None


class Tried(_Strict):
    """One learning rate of a method's grid."""

    learning_rate: float | None
    reward: float | None = Field(None, description="held-out, sampled, mean over prompts and finished seeds")
    seconds: float | None = None
    status: Status
    reason: str | None = None
    passed_over: str | None = Field(
        None, description="what speaks against it, where it is not the one that is shown"
    )


class MethodResult(_Strict):
    """A row of the comparison: the method at the best of the learning rates that were tried."""

    name: str
    status: Status = Field(description="done when at least one seed finished")
    reason: str | None = Field(
        None, description="one line: why it did not finish, or which of its seeds did not"
    )
    adapter: str | None = Field(
        None, description="what is trained: tea, lora, ia3, ..., full; null for nothing"
    )
    uses_reward_at_inference: bool = Field(False, description="best-of-n: not comparable as a policy")
    learning_rate: float | None = None
    tried: list[Tried] = Field(default_factory=list)
    seeds: list[SeedResult] = Field(default_factory=list)


class Results(_Strict):
    """A whole comparison: ``results.json``."""

    version: Literal[1] = 1
    recipe: str
    created: str = Field(description="ISO 8601, with time zone")
    command: str = Field(description="the command line that made it")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the resolved recipe and the options of the command"
    )
    versions: dict[str, Any] = Field(default_factory=dict, description="of Python and the packages")
    machine: dict[str, Any] = Field(default_factory=dict)
    levels: list[float] = Field(
        default_factory=list, description="reward levels whose time is looked up on the curves"
    )
    guards: Guards = Field(default_factory=Guards)
    methods: list[MethodResult] = Field(default_factory=list)


ModelT = TypeVar("ModelT", bound=BaseModel)


def write_json(value: BaseModel, path: str | Path) -> None:
    """Write a result, replacing the file in one step.

    Raises:
        TeaError: if the disk refuses.
    """
    from tea_rl.training.files import atomic_write_text, disk_errors

    with disk_errors(f"write {path}"):
        atomic_write_text(Path(path), value.model_dump_json(indent=1) + "\n")


def read_json(model: type[ModelT], path: str | Path) -> ModelT:
    """Read a result.

    Raises:
        TeaError: if the file is missing, or is not what ``model`` describes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TeaError(f"{path} cannot be read ({error}); run `tea-rl compare` again to write it") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise TeaError(
            f"{path} is not a result of this version of tea-rl ({where}: {first['msg']}); run `tea-rl compare` again"
        ) from error


def read_results(folder: str | Path) -> Results:
    """``results.json`` of a comparison's folder; see `read_json`."""
    return read_json(Results, Path(folder) / RESULTS_NAME)
