"""Online reinforcement learning of a TEA head: roll out, reward, advantage, update.

The backbone runs only to generate. What a rollout computed on the way - hidden states, shortlists, log-probabilities -
is all that the update reads (DESIGN section 1).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tea_rl.backbone import Backbone
from tea_rl.data.prompts import data_digest, load_prompts, tokenize_prompts
from tea_rl.errors import TeaError
from tea_rl.evaluation.evaluate import PromptSet, evaluate, reward_inputs, score, score_texts
from tea_rl.evaluation.metrics import mean
from tea_rl.objectives.forking import forking_tokens
from tea_rl.recipe import Recipe, load_recipe
from tea_rl.rewards import PendingRewards, RewardBatch, RewardWorkers, load_rewards
from tea_rl.rollout import DecodeSettings, Rollout, generate
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.counterfactuals import Counterfactuals, ask
from tea_rl.training.drawn import Credited, Drawn, credit
from tea_rl.training.generating import GeneratingLoop
from tea_rl.training.learner import UpdateReport
from tea_rl.training.loop import TrainingLoop, TrainResult
from tea_rl.training.progress import Listener
from tea_rl.training.replay import Replay
from tea_rl.training.run_directory import RunDirectory
from tea_rl.training.seeding import generator_of, other_prompts, prompts_of_step, seed_step
from tea_rl.training.token_value import TokenValue

#: States of a step on which member disagreement is measured.
_DISAGREEMENT_STATES = 64


def train(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    profile: bool = False,
) -> TrainResult:
    """Train a TEA head as a recipe says, into a run directory: from prompts, in an environment, or offline from labelled rows
    or stored states.

    Args:
        recipe: a recipe, the name of a shipped one, or a YAML path.
        output: run directory.
        resume: continue from the newest complete checkpoint in it.
        listener: hears of progress.
        should_stop: asked after every step; True saves a checkpoint and ends the run.
        profile: measure where the time goes, for ``profile.json`` and the report; slows a GPU down.

    Raises:
        TeaError: for every mistake a user can mend.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    listener = listener or Listener()
    with RunDirectory.create(Path(output), resume=resume) as run:
        trainer = _trainer_class(recipe)(recipe, run, listener, resume)
        if profile:
            trainer.clock.start()
        return trainer.run_to_end(should_stop)


def _trainer_class(recipe: Recipe) -> Callable[[Recipe, RunDirectory, Listener, bool], TrainingLoop]:
    """What runs a recipe; only what is needed is imported."""
    if recipe.offline:
        from tea_rl.training.offline import OfflineTrainer

        return OfflineTrainer
    if recipe.env.id is not None:
        from tea_rl.training.episodes import EpisodeTrainer

        return EpisodeTrainer
    return OnlineTrainer


def decode_settings(recipe: Recipe, num_generations: int) -> DecodeSettings:
    """How a recipe samples."""
    return DecodeSettings(
        num_generations=num_generations,
        max_new_tokens=recipe.rollout.max_completion_length,
        temperature=recipe.rollout.temperature,
        stop=tuple(recipe.rollout.stop),
    )


def prepare_prompts(recipe: Recipe, backbone: Backbone) -> tuple[PromptSet, PromptSet]:
    """A recipe's training and held-out prompts, tokenised; refuses those that leave no room for the completion."""
    room = backbone.max_length - recipe.rollout.max_completion_length
    splits = load_prompts(recipe.data, backbone.tokenizer)
    training, held_out = (
        PromptSet(part, tokenize_prompts(part, backbone.tokenizer, room)) for part in splits
    )
    return training, held_out


class OnlineTrainer(GeneratingLoop):
    """An online run: a step rolls out, rewards and updates; `train` is the usual way in.

    Attributes:
        rewards_asked: completions of training that rewards were asked for since this process began.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, listener: Listener, resume: bool) -> None:
        super().__init__(recipe, run, listener, resume)
        self.rewards = load_rewards(recipe.rewards, recipe.base_dir)
        self._ahead: Drawn | None = None
        self.replay = Replay(recipe.objective.replay_steps)
        self.rewards_asked = 0
        self._load_backbone()
        self.training_prompts, self.held_out = prepare_prompts(recipe, self.backbone)
        if len(self.training_prompts) < recipe.rollout.prompts_per_step:
            raise TeaError(
                f"rollout.prompts_per_step is {recipe.rollout.prompts_per_step}, but there are only "
                f"{len(self.training_prompts)} training prompts; lower it or add prompts"
            )
        self._begin_learning(data_digest(self.training_prompts.prompts, self.held_out.prompts))
        weighs = recipe.objective.expected_gradient > 0
        self.token_value = TokenValue(self.head.weight) if weighs else None
        self.workers = self._start_workers()  # last: whoever calls this can only close what it got

    def _start_workers(self) -> RewardWorkers | None:
        rollout = self.recipe.rollout
        if not rollout.reward_workers:
            return None
        return RewardWorkers(
            self.recipe.rewards,
            self.recipe.base_dir,
            rollout.reward_workers,
            rollout.reward_timeout,
            self.listener.on_note,
        )

    def close(self) -> None:
        """End the processes that compute rewards."""
        if self.workers is not None:
            self.workers.close()

    def _step(self, step: int) -> None:
        """Roll out, reward, advantage, update."""
        recipe = self.recipe
        started = time.perf_counter()
        generator = seed_step(recipe.train.seed, step)
        drawn, rewards = self._drawn_with_rewards(step)
        first = self._credit(drawn, rewards, (recipe.train.seed, step))
        credited = [first, *self._more(step, drawn, first)]
        report = self._update(step, drawn, credited, generator)
        generated, tokens = drawn.rollout, drawn.rollout.tokens
        unscored = sum(int(one.rewards.isnan().sum()) for one in credited)
        row = {
            "step": step,
            "reward": mean([value for value in rewards.total if not math.isnan(value)]),
            **{
                f"reward/{name}": mean([v for v in values if v is not None])
                for name, values in rewards.terms.items()
            },
            "kl": tokens.kl.mean().item(),
            "entropy": tokens.entropy.mean().item(),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "inner_epochs": report.inner_epochs,
            "skipped_steps": report.skipped_steps,
            "disagreement": self._disagreement(generated),
            **self._value_figures(step),
            "completion_length": generated.lengths.float().mean().item(),
            "finished": generated.finished.float().mean().item(),
            **({} if self.workers is None else {"unscored": unscored}),
            **self._sampling_figures(credited),
            "tokens_per_second": len(tokens) / drawn.seconds,
            "seconds": time.perf_counter() - started,
        }
        self._log(step, row)
        self.listener.on_step(row)

    def _update(
        self, step: int, drawn: Drawn, credited: list[Credited], generator: torch.Generator
    ) -> UpdateReport:
        """Learn from what was drawn, and from what is replayed."""
        if all(bool(one.rewards.isnan().all()) for one in credited):
            # Not one reward: the anchor alone would undo what has been learnt.
            return self.learner.skip()
        useful = [one for one in credited if one.groups] or credited[:1]
        tokens = TokenBatch.join([one.tokens for one in useful])
        advantages = torch.cat([one.advantages for one in useful])
        share = self.recipe.objective.top_entropy_quantile
        with self.clock.stage("update"):
            if share < 1:
                kept = forking_tokens(tokens.entropy, share)
                tokens, advantages = tokens.select(kept), advantages[kept]
            values = self._token_values(step, drawn.rollout, credited[0])
            report = self.learner.update(tokens, advantages, generator, values, self.replay.batches)
        self.replay.add(tokens, advantages)
        return report

    def _drawn_with_rewards(self, step: int) -> tuple[Drawn, RewardBatch]:
        """The completions of a step and their rewards; with workers, those of the next step are generated meanwhile."""
        drawn, seed = self._ahead or self._draw(step), (self.recipe.train.seed, step)
        if self.workers is None:
            return drawn, self._score(drawn, seed)
        pending = self._ask(self.workers, drawn, seed)
        self._ahead = self._draw(step + 1) if step < self.total_steps else None
        with self.clock.stage("reward"):
            return drawn, pending.result()

    def _score(self, drawn: Drawn, seed: tuple[int, ...]) -> RewardBatch:
        """Rewards of a draw, waited for; ``seed`` is for those of workers that draw random numbers."""
        with self.clock.stage("reward"):
            if self.workers is not None:
                return self._ask(self.workers, drawn, seed).result()
            self.rewards_asked += len(drawn.rollout.texts)
            return score(self.rewards, self.training_prompts.take(drawn.chosen).prompts, drawn.rollout)

    def _ask(self, workers: RewardWorkers, drawn: Drawn, seed: tuple[int, ...]) -> PendingRewards:
        self.rewards_asked += len(drawn.rollout.texts)
        prompts = self.training_prompts.take(drawn.chosen).prompts
        return workers.submit(*reward_inputs(prompts, drawn.rollout), seed=seed)

    def _draw(self, step: int) -> Drawn:
        """Generate a step's completions with the head as it is."""
        seed, per_step = self.recipe.train.seed, self.recipe.rollout.prompts_per_step
        chosen = prompts_of_step(seed, step, len(self.training_prompts), per_step)
        return self._generate(step, chosen, (seed, step))

    def _generate(self, step: int, chosen: list[int], seed: tuple[int, ...]) -> Drawn:
        started = time.perf_counter()
        generated = generate(
            self.backbone,
            self.head,
            self.training_prompts.take(chosen).token_ids,
            self._settings(step),
            seed=seed,
            clock=self.clock,
        )
        return Drawn(step, chosen, generated, time.perf_counter() - started)

    def _settings(self, step: int) -> DecodeSettings:
        """How a step's completions are sampled; the first ones may be shorter (lengthening in stages, as in DeepScaleR)."""
        rollout = self.recipe.rollout
        settings = decode_settings(self.recipe, rollout.num_generations)
        if step > rollout.early_steps:
            return settings
        shortest = min(rollout.early_completion_length, rollout.max_completion_length)
        return replace(settings, max_new_tokens=shortest)

    def _credit(self, drawn: Drawn, rewards: RewardBatch, seed: tuple[int, ...]) -> Credited:
        only_unequal = self.recipe.rollout.dynamic_sampling > 0
        edits = self._counterfactuals(drawn, rewards, seed)
        return credit(drawn, rewards.total, self.recipe.objective, only_unequal, edits)

    def _counterfactuals(
        self, drawn: Drawn, rewards: RewardBatch, seed: tuple[int, ...]
    ) -> Counterfactuals | None:
        """What the completions would have earned with other tokens, with ``objective.counterfactuals``."""
        count, rollout = self.recipe.objective.counterfactuals, self.recipe.rollout
        if not count:
            return None
        prompts = self.training_prompts.take(drawn.chosen).prompts
        of_texts = [prompts[answered] for answered in drawn.rollout.prompt_index.tolist()]

        rounds = itertools.count()

        def score_changed(texts: Sequence[str]) -> list[float]:
            self.rewards_asked += len(texts)
            # Workers that draw random numbers draw others in every round.
            workers = self.workers and partial(self.workers, seed=(*seed, next(rounds)))
            return score_texts(workers or self.rewards, of_texts, texts).total

        with self.clock.stage("reward"):
            return ask(
                self.backbone,
                self.head,
                drawn.rollout,
                torch.tensor(rewards.total),
                score_changed,
                count,
                rollout.temperature,
                tuple(rollout.stop),
                generator_of(seed),
            )

    def _more(self, step: int, drawn: Drawn, first: Credited) -> list[Credited]:
        """Completions of other prompts, for those of a step that teach nothing (dynamic sampling, Yu et al. 2025, section 3.2)."""
        seed, used, found = self.recipe.train.seed, set(drawn.chosen), []
        missing = first.drawn - first.groups
        for number in range(1, self.recipe.rollout.dynamic_sampling + 1):
            chosen = other_prompts(seed, step, number, len(self.training_prompts), used, missing)
            if not chosen:
                break
            used |= set(chosen)
            extra = self._generate(step, chosen, (seed, step, number))
            key = (seed, step, number)
            found.append(self._credit(extra, self._score(extra, key), key))
            missing -= found[-1].groups
        return found

    def _value_figures(self, step: int) -> dict[str, float]:
        """How well the critic of tokens is doing, as long as it is listened to."""
        if self.token_value is None or not self._value_share(step):
            return {}
        return {"value_correlation": self.token_value.correlation}

    def _sampling_figures(self, credited: Sequence[Credited]) -> dict[str, float]:
        """How many prompts were asked, and how many taught something, for each that a step has."""
        if not self.recipe.rollout.dynamic_sampling:
            return {}
        count = credited[0].drawn
        return {
            "prompts_drawn": sum(one.drawn for one in credited) / count,
            "prompts_learnt": sum(one.groups for one in credited) / count,
        }

    def _token_values(self, step: int, generated: Rollout, first: Credited) -> torch.Tensor | None:
        """What tokens are worth, with ``objective.expected_gradient``; less with every step: sampled credit has the last word."""
        share = self._value_share(step)
        if self.token_value is None or share == 0.0 or first.unit == 0.0:
            return None
        values = self.token_value.learn(generated.tokens, first.rewards, generated.prompt_index, first.edits)
        return values * (share / first.unit)

    def _value_share(self, step: int) -> float:
        """How much of ``objective.expected_gradient`` is left in a step."""
        steps = self.recipe.objective.expected_gradient_steps or self.total_steps
        return max(0.0, 1.0 - (step - 1) / steps)

    def _write_state(self, folder: Path) -> dict[str, Any]:
        if self.token_value is not None:
            self.token_value.save(folder)
        self.replay.save(folder)
        if self._ahead is not None:
            self._ahead.save(folder)
        return super()._write_state(folder)

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        super()._load_state(state, folder)
        if self.token_value is not None:
            self.token_value.load(folder)
        self.replay.load(folder, self.backbone.device)
        self._ahead = Drawn.load(folder, self.backbone.device) if self.workers is not None else None

    def _disagreement(self, generated: Rollout) -> float:
        stride = max(1, len(generated.tokens) // _DISAGREEMENT_STATES)
        return self.head.disagreement(generated.tokens.states[::stride]).mean().item()

    def _evaluate(self, step: int, record: bool = True) -> None:
        """Held-out evaluation; at step 0 it measures the original model and keeps its samples for comparison."""
        if not len(self.held_out):
            return
        seed_step(self.recipe.train.seed, step)  # for rewards that draw random numbers of their own
        settings = decode_settings(self.recipe, self.recipe.train.eval_generations)
        result = evaluate(
            self.backbone,
            self.head,
            self.held_out,
            self.workers or self.rewards,
            settings,
            self.recipe.train.seed,
        )
        self.last_evaluation = result
        if step == 0:
            self.base_samples = result.samples[: self.recipe.train.sample_prompts]
        row = {"step": step, **result.metrics}
        if record:
            self._record(step, row, result)
        self.listener.on_evaluation(row)
