"""The groups of a recipe. Field descriptions are the only help text: the command line and the README print them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Group(BaseModel):
    """Settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


class ModelConfig(Group):
    """The frozen backbone."""

    name_or_path: str = Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct", min_length=1, description="Hub id, local folder or .gguf file."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the backbone; auto picks the fastest safe one for the device."
    )
    quantization: Literal["none", "int8", "nf4", "w8a8"] = Field(
        "none",
        description="Load the backbone's weights in 8 or 4 bits (int8, nf4: bitsandbytes; less memory), or in 8 bits with 8-bit "
        "inputs (w8a8: CPUs only; faster; slightly another model).",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the backbone runs.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    compile: bool = Field(
        False,
        description="Compile what stands between the products of a step by one token, its attention and the head's products with "
        "shortlists (torch.compile's compiler; needs a C++ compiler): ten seconds at the start, a few of them the next time; rollouts "
        "are then 1.0 to 1.3 times as fast, with w8a8 1.1 to 1.4. The same numbers up to rounding. On a GPU, where nobody has run it, "
        "whole layers, and not with head.context.",
    )


class DataConfig(Group):
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


class WrapperSpec(Group):
    """A wrapper around the environment."""

    name: str = Field(
        min_length=1,
        description="reward_terms, step_penalty, parse_action, admissible_actions, time_limit or worked_examples.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings of the wrapper.")


class ExpertConfig(Group):
    """Imitation of the environment's expert before reinforcement learning begins."""

    episodes: int = Field(0, ge=0, description="Expert episodes to imitate; 0 = none.")
    guidance: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="With listed answers: share of these episodes' turns in which the expert's answer is taken. In the others the "
        "head's own is, and the expert says what would have been right: so it learns the way back, too.",
    )
    dagger_rounds: int = Field(
        0,
        ge=0,
        description="With listed answers: rounds in which the head then plays by itself, and learns from all episodes so far what "
        "the expert would have answered (DAgger).",
    )
    dagger_episodes: int = Field(64, ge=1, description="Episodes of such a round.")
    num_train_epochs: float = Field(8.0, gt=0.0, description="Passes over their turns (in each round).")
    learning_rate: float = Field(1e-3, gt=0.0, description="Of this phase.")


class EnvConfig(Group):
    """A text environment to play in, and how its turns become text."""

    id: str | None = Field(
        None, min_length=1, description="Any gymnasium id with text (see tea-rl envs); null = no environment."
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings of the environment.")
    wrappers: list[WrapperSpec] = Field(default_factory=list, description="Wrappers, innermost first.")
    num_starts: int = Field(256, ge=1, description="Different starts to train on: indices 0, 1, ...")
    eval_starts: int = Field(64, ge=0, description="Held-out starts: the indices behind those.")
    format: Literal["plain", "chat"] = Field(
        "plain", description="plain = a transcript; chat = turns of the model's chat template."
    )
    system: str | None = Field(None, description="System message; a plain transcript begins with it.")
    user: str = Field(
        "{observation}", description="Plain: text of the environment's turn; {observation} stands for it."
    )
    assistant_end: str = Field("\n", description="Plain: text behind the model's turn.")
    choice_prefix: str = Field(" ", description="Text before a listed choice and an expert's answer.")
    choose_admissible: bool = Field(
        False, description="Score the answers that the environment lists instead of writing freely."
    )
    max_turns: int = Field(32, ge=1, description="Turns after which an episode is cut.")
    max_context: int | None = Field(
        None, ge=2, description="Most tokens of a conversation; null = what the model reads."
    )
    num_parallel: int = Field(64, ge=1, description="Episodes played together.")
    step_timeout: float = Field(60.0, gt=0.0, description="Seconds an environment may take to answer.")
    discount: float = Field(1.0, ge=0.0, le=1.0, description="Weight of a reward one turn later.")
    gae_lambda: float = Field(
        0.95, ge=0.0, le=1.0, description="ppo: 0 trusts the value head, 1 the rewards."
    )
    expert: ExpertConfig = Field(default_factory=ExpertConfig, description="Supervised start.")

    @property
    def scores_choices(self) -> bool:
        """Whether listed answers are scored: it is set, or the wrapper that is made for it says so."""
        return self.choose_admissible or any(
            wrapper.name == "admissible_actions" for wrapper in self.wrappers
        )

    @field_validator("user")
    @classmethod
    def _has_observation(cls, value: str) -> str:
        if "{observation}" not in value:
            raise ValueError("must contain {observation}, or the model would not see the environment")
        return value


class RewardSpec(Group):
    """One term of the reward."""

    name: str = Field(
        min_length=1, description="A built-in reward, or path/to/file.py:function.", examples=["sentiment"]
    )
    weight: float = Field(1.0, description="Factor of this term in the sum; negative punishes.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings passed to the reward.")


class RolloutConfig(Group):
    """How completions are sampled in training."""

    prompts_per_step: int = Field(8, ge=1, description="Distinct prompts in a step.")
    num_generations: int = Field(8, ge=1, description="Completions of each prompt; they form a group.")
    max_completion_length: int = Field(32, ge=1, description="Most new tokens of a completion.")
    early_steps: int = Field(
        0,
        ge=0,
        description="Steps of training, the first ones, whose completions end after early_completion_length tokens: they take less "
        "time, and a reward says more of fewer tokens. Evaluations always go the whole length. 0 = none. For prompts.",
    )
    early_completion_length: int = Field(
        16, ge=1, description="Most new tokens of a completion in these steps, where that is fewer."
    )
    temperature: float = Field(
        1.0, gt=0.0, description="Divides the logits; the policy is defined at this temperature."
    )
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Nucleus sampling; training needs 1 (off).")
    top_k: int = Field(0, ge=0, description="Top-k sampling; training needs 0 (off).")
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="Learn only from prompts whose completions earn different rewards (if any do), and draw others for the rest, at "
        "most so many times a step (DAPO); 0 = off. For prompts, with grpo or rloo.",
    )
    reward_workers: int = Field(
        0,
        ge=0,
        description="In training: processes that compute the rewards while the next batch is generated, one update behind; for slow rewards. "
        "Each sees some of a batch's prompts (echo compares those only). 0 = none: rewards come between generating and learning.",
    )
    reward_timeout: float | None = Field(
        None,
        gt=0.0,
        description="With reward_workers: seconds that a call of the rewards may take; its completions are left out otherwise. "
        "null = any time.",
    )
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


#: Objectives that ``token_credit`` can weigh the tokens of.
TOKEN_CREDIT_OBJECTIVES = ("reward_weighted", "reinforce", "ppo")
#: Objectives that learn from labels alone; the others need rollouts (stored ones will do).
OFFLINE_OBJECTIVES = ("cross_entropy", "reward_weighted", "awr", "dpo", "ipo", "kto")


#: What only recipes with prompts may say, and the value that says nothing.
FOR_PROMPTS: dict[tuple[str, str], int | None] = {
    ("rollout", "early_steps"): 0,
    ("rollout", "reward_workers"): 0,
    ("rollout", "reward_timeout"): None,
    ("rollout", "dynamic_sampling"): 0,
    ("objective", "replay_steps"): 0,
    ("objective", "expected_gradient"): 0,
    ("objective", "counterfactuals"): 0,
}
#: The same for recipes that generate, in environments as well: a store in their place must not hear of it.
GENERATING = {**FOR_PROMPTS, ("objective", "top_entropy_quantile"): 1}


class ObjectiveConfig(Group):
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
    token_credit: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="How much of what a stored token is weighed by is its own: by how much it changed the reward that a critic "
        "fitted to the states expects; the rest is its completion's (reward_weighted, reinforce, ppo).",
    )
    expected_gradient: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the policy gradient over all tokens of the shortlist at once, with values of tokens that are fitted "
        "to the rewards of the latest completions; 1 is as much as sampled credit; falls to 0 over expected_gradient_steps; 0 = off. "
        "For prompts, with a shortlist.",
    )
    expected_gradient_steps: int | None = Field(
        None, ge=1, description="Steps over which expected_gradient falls to 0; null = all of the run."
    )
    counterfactuals: int = Field(
        0,
        ge=0,
        description="Changed texts for each completion of a step whose rewards are asked as well: with one token replaced by another one of the "
        "shortlist. They tell what each token earned, and teach expected_gradient. For rewards that cost little; for prompts, with a "
        "shortlist; 0 = off.",
    )
    counterfactual_credit: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="With counterfactuals: how much of a token's advantage is its own, what its completion would lose without it; the rest is its "
        "completion's.",
    )
    replay_steps: int = Field(
        0,
        ge=0,
        description="With prompts: learn in each step from the rollouts of so many earlier steps as well, weighed by importance ratios; the first "
        "of the inner epochs always goes over all of them. 0 = off.",
    )
    entropy_coef: float = Field(
        0.0,
        description="Weight of the policy's entropy (nats a token), a bonus for variety; below 0 it sharpens: samples then stay likely under the "
        "original model although they move away from it.",
    )
    top_entropy_quantile: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Online: share of a rollout's tokens that is learnt from and held by the anchor, those where the policy was least sure; the update takes "
        "that much less time. 0 = one token, 1 = all.",
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


class AnchorConfig(Group):
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


class StopConfig(Group):
    """Guards against a reward that is hacked; each is looked at after every held-out evaluation of an online run."""

    kl: float | None = Field(
        None, gt=0.0, description="Largest KL to the original model, nats a token; null = off."
    )
    distinct_2: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Smallest share of distinct bigrams, against the original model's; null = off.",
    )
    base_nll: float | None = Field(
        None,
        gt=0.0,
        description="Largest rise of the samples' surprise under the original model, as a share of what it was (an independent "
        "metric that falls); null = off.",
    )


class TrainConfig(Group):
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
    compile: bool = Field(
        False,
        description="Compile the arithmetic of an update (torch.compile's compiler; CPUs only, needs a C++ compiler): some ten seconds "
        "at the first update, two the next time; updates then take 0.7 to 0.75 of their time, which pays from a thousand minibatches on. "
        "The same numbers up to rounding. Of heads with dropout, head.readout vocab, head.train_reference or head.shortlist_size all or "
        "auto, and of minibatches whose tokens share states, at most the products with shortlists are compiled.",
    )
    seed: int = Field(0, ge=0, description="Seed of everything random in training.")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="Experiment tracker."
    )
    stop_when: StopConfig = Field(
        default_factory=StopConfig, description="Online: conditions that end a run before max_steps."
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
    return_dropout: float = Field(
        0.2,
        ge=0.0,
        lt=1.0,
        description="Offline, with head.return_conditioning: share of rows whose return is hidden in an update, drawn anew, so "
        "that the head also works where no return is asked for; these rows teach the objective, the others are imitated.",
    )
    max_skipped_steps: int = Field(
        5, ge=1, description="Steps in a row with non-finite numbers before the run stops."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch; null = torch's choice.")
