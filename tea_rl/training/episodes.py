"""Online reinforcement learning in text environments: play, credit every turn, update.

As in `tea_rl.training.online` the transformer runs only to play; what it computed on the way is all that an update reads.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tea_rl.errors import TeaError
from tea_rl.evaluation.episodes import (
    EpisodeSample,
    evaluate_episodes,
    mean_return,
    rollout_metrics,
    scores_without_skill,
)
from tea_rl.evaluation.evaluate import Sample
from tea_rl.objectives.credit import discounted_returns, gae, turn_advantages
from tea_rl.objectives.forking import forking_tokens
from tea_rl.recipe import EnvConfig, Recipe
from tea_rl.rollout.conversation import ConversationFormat
from tea_rl.rollout.episode_batch import EpisodeBatch, EpisodeSettings, EpisodeStart
from tea_rl.rollout.episodes import run_episodes
from tea_rl.training.critic import Critic
from tea_rl.training.generating import GeneratingLoop
from tea_rl.training.imitation import check_expert, imitate
from tea_rl.training.learner import UpdateReport
from tea_rl.training.progress import Listener
from tea_rl.training.run_directory import RunDirectory
from tea_rl.training.seeding import prompts_of_step, seed_step
from tea_rl.training.turn_learner import TurnLearner

if TYPE_CHECKING:
    import gymnasium


def environment_maker(env: EnvConfig) -> Any:
    """A function that makes a recipe's environment; it is made once here, so that a mistake shows at once.

    Raises:
        TeaError: unknown id, settings or wrappers it refuses, or a package that is missing.
    """
    from tea_rl.envs import make_env
    from tea_rl.rollout.environments import close, make_seat

    assert env.id is not None
    name, kwargs = env.id, env.kwargs
    wrappers = [wrapper.model_dump() for wrapper in env.wrappers]

    def make() -> gymnasium.Env[str, str]:
        return make_env(name, kwargs, wrappers)

    seat = make_seat(make)  # with an end to the patience, as later
    if isinstance(seat, str):
        raise TeaError(f"{name}: {seat}; mend it")
    close([seat], env.step_timeout)
    return make


def held_out_starts(env: EnvConfig) -> list[int]:
    """Indices of the held-out starts: those behind the ones trained on, for environments count theirs round."""
    return list(range(env.num_starts, env.num_starts + env.eval_starts))


def starts_of_step(recipe: Recipe, step: int) -> list[EpisodeStart]:
    """The episodes of a step (from 1): every training start comes once before any comes twice."""
    rollout = recipe.rollout
    per_step = min(rollout.prompts_per_step, recipe.env.num_starts)
    chosen = prompts_of_step(recipe.train.seed, step, recipe.env.num_starts, per_step)
    return [EpisodeStart(index, number) for index in chosen for number in range(rollout.num_generations)]


def nothing_played(batch: EpisodeBatch, recipe: Recipe) -> TeaError:
    """Why a whole step left nothing to learn from."""
    failures = [episode.failed for episode in batch.episodes if episode.failed is not None]
    return TeaError(
        f"every episode of {recipe.env.id} failed ({failures[0]}); mend the environment"
        if failures
        else f"no first turn of {recipe.env.id} fits into the context; raise env.max_context, or lower "
        "rollout.max_completion_length"
    )


def episode_settings(recipe: Recipe) -> EpisodeSettings:
    """How a recipe plays."""
    env = recipe.env
    return EpisodeSettings(
        num_parallel=env.num_parallel,
        max_new_tokens=recipe.rollout.max_completion_length,
        max_turns=env.max_turns,
        max_context=env.max_context,
        temperature=recipe.rollout.temperature,
        stop=tuple(recipe.rollout.stop),
        conversation=ConversationFormat(
            env.format, env.system, env.user, env.assistant_end, env.choice_prefix
        ),
        choose_admissible=env.scores_choices,
        step_timeout=env.step_timeout,
    )


class EpisodeTrainer(GeneratingLoop):
    """A run in an environment; `tea_rl.training.online.train` is the usual way in."""

    learner: TurnLearner
    learner_class = TurnLearner

    def __init__(self, recipe: Recipe, run: RunDirectory, listener: Listener, resume: bool) -> None:
        super().__init__(recipe, run, listener, resume)
        self.make_env = environment_maker(recipe.env)
        self.settings = episode_settings(recipe)
        if recipe.rollout.prompts_per_step > recipe.env.num_starts:
            raise TeaError(
                f"rollout.prompts_per_step is {recipe.rollout.prompts_per_step}, but env.num_starts only "
                f"{recipe.env.num_starts}; lower the one or raise the other"
            )
        if recipe.env.expert.episodes:
            check_expert(self.make_env, self.settings, recipe.env)
        self._load_backbone()
        self._measured_base = False
        digest = hashlib.sha256(
            json.dumps(recipe.env.model_dump(exclude_defaults=True), sort_keys=True).encode()
        ).hexdigest()
        self._begin_learning(digest)
        uses_critic = recipe.objective.name == "ppo"
        self.critic = (
            Critic(self.head, recipe.train.seed, recipe.objective.inner_epochs) if uses_critic else None
        )

    def _begin(self) -> int:
        first = super()._begin()
        with self.clock.stage("evaluation"):
            self._evaluate(0)  # of the original model, before the expert is imitated
        expert = self.recipe.env.expert
        if expert.episodes:
            self.listener.on_note(f"imitating {expert.episodes} expert episodes")
            seed_step(self.recipe.train.seed, 0)
            notify = self.listener.on_note
            with self.clock.stage("imitation"):
                loss = imitate(self.backbone, self.head, self.make_env, self.settings, self.recipe, notify)
            notify(f"imitated: cross-entropy {loss:.3f} nats in the last pass")
            with self.clock.stage("evaluation"):
                self._evaluate(0, imitated=True)
        return first

    def _step(self, step: int) -> None:
        """Play, credit, update."""
        recipe, started = self.recipe, time.perf_counter()
        generator = seed_step(recipe.train.seed, step)
        starts = starts_of_step(recipe, step)
        with self.clock.stage("play"):
            batch = run_episodes(
                self.backbone, self.head, self.make_env, starts, self.settings, (recipe.train.seed, step)
            )
        with self.clock.stage("update"):
            advantage, figures = self._credit(batch, generator)
            report = self._update(batch, advantage, generator)
        row = {
            "step": step,
            "reward": mean_return(batch.episodes),
            **rollout_metrics(batch),
            **figures,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "inner_epochs": report.inner_epochs,
            "skipped_steps": report.skipped_steps,
            "tokens_per_second": (len(batch.tokens) + len(batch.choices or ())) / batch.seconds,
            "environment_share": batch.environment_seconds / batch.seconds,
            "seconds": time.perf_counter() - started,
        }
        self._log(step, row)
        self.listener.on_step(row)

    def _credit(self, batch: EpisodeBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Advantage of every turn, ``(T,)``, 0 in failed episodes; and what the value head says."""
        objective, env = self.recipe.objective, self.recipe.env
        sound = [n for n, turn in enumerate(batch.turns) if batch.episodes[turn.episode].failed is None]
        advantage = torch.zeros(len(batch.turns))
        if not sound:
            return advantage, {}
        turns = [batch.turns[n] for n in sound]
        rewards = torch.tensor([turn.reward for turn in turns])
        episode_of_turn = torch.tensor([turn.episode for turn in turns])
        if self.critic is None:
            groups = torch.tensor([episode.start.index for episode in batch.episodes])
            returns = discounted_returns(rewards, episode_of_turn, env.discount)
            advantage[sound] = turn_advantages(
                objective.name, returns, groups, episode_of_turn, objective.scale_rewards
            )
            return advantage, {}
        states = turn_states(batch)[sound]
        estimate = self.critic(states)
        final = self._final_values(batch)
        ended = torch.tensor([episode.terminated for episode in batch.episodes])
        credit = gae(
            rewards, estimate.mean.cpu(), final, ended, episode_of_turn, env.discount, env.gae_lambda
        )
        spread = credit.advantages.std() if len(sound) > 1 else torch.zeros(())
        advantage[sound] = (credit.advantages - credit.advantages.mean()) / (spread + 1e-4)
        loss = self.critic.update(states, credit.value_targets.to(states.device), generator)
        return advantage, {"value_loss": loss, "value_spread": estimate.spread.mean().item()}

    def _final_values(self, batch: EpisodeBatch) -> Tensor:
        """Value of the state each cut episode was left in, ``(E,)``; 0 for the others."""
        assert self.critic is not None
        values = torch.zeros(len(batch.episodes))
        cut = [n for n, episode in enumerate(batch.episodes) if episode.final_state is not None]
        if cut:
            states = torch.stack([batch.episodes[n].final_state for n in cut])  # type: ignore[misc]
            values[cut] = self.critic(states).mean.cpu()
        return values

    def _update(self, batch: EpisodeBatch, advantage: Tensor, generator: torch.Generator) -> UpdateReport:
        advantage = advantage.to(self.backbone.device)
        played = len(batch.tokens) > 0 or batch.choices is not None
        if played and not bool(advantage.any()):
            # All episodes of each start did equally well. The anchor alone would undo what has been learnt.
            return self.learner.skip()
        if not played:
            raise nothing_played(batch, self.recipe)
        tokens, share = batch.tokens, self.recipe.objective.top_entropy_quantile
        if share < 1 and len(tokens):
            tokens = tokens.select(forking_tokens(tokens.entropy, share))
        return self.learner.update_turns(tokens, batch.choices, advantage, generator)

    def _evaluate(self, step: int, record: bool = True, imitated: bool = False) -> None:
        """Held-out starts; at step 0 of the original model, then of the head that has imitated the expert."""
        recipe = self.recipe
        if not recipe.env.eval_starts or (step == 0 and self._measured_base and not imitated):
            return
        seed_step(recipe.train.seed, step)
        starts = held_out_starts(recipe.env)
        result = evaluate_episodes(
            self.backbone,
            self.head,
            self.make_env,
            starts,
            self.settings,
            recipe.train.eval_generations,
            recipe.train.seed,
        )
        self.last_evaluation = result
        row: dict[str, Any] = {"step": step, **result.metrics}
        if imitated:
            row["imitated"] = True
        elif step == 0:
            self._measured_base = True
            self.base_samples = result.samples[: recipe.train.sample_prompts]
            row.update(scores_without_skill(self.make_env, starts, self.listener.on_note, self.settings))
        if record:
            self._record(step, row, result)
        self.listener.on_evaluation(row)

    def _write_state(self, folder: Path) -> dict[str, Any]:
        if self.critic is not None:
            self.critic.save(folder / "value")
        return super()._write_state(folder)

    def _load_state(self, state: dict[str, Any], folder: Path) -> None:
        super()._load_state(state, folder)
        if self.critic is not None:
            self.critic.load(folder / "value")

    def _more_of_samples(self, base: Sample, trained: Sample) -> dict[str, Any]:
        sides = (("base", base), ("trained", trained))
        return {f"{name}_episode": side.episode for name, side in sides if isinstance(side, EpisodeSample)}

    def _stored_base_sample(self, row: dict[str, Any]) -> Sample:
        sample = super()._stored_base_sample(row)
        return EpisodeSample(**vars(sample), episode=row["base_episode"]) if "base_episode" in row else sample

    def _finish(self) -> None:
        super()._finish()
        if self.critic is not None:
            self.critic.value.save(self.run.path / "value")


def turn_states(batch: EpisodeBatch) -> Tensor:
    """The state in which the first token (or choice) of every turn was chosen, ``(T, W)``; 0 for turns that left none."""
    like = batch.tokens.states if batch.choices is None else batch.choices.tokens.states
    states = like.new_zeros(len(batch.turns), like.shape[-1])
    first = batch.tokens.positions == 0
    states[batch.tokens.rows[first]] = batch.tokens.states[first]
    if batch.choices is not None:
        choices = batch.choices
        first = choices.tokens.positions == 0
        turn = choices.turns[choices.decision_of_choice[choices.tokens.rows[first]]]
        states[turn] = choices.tokens.states[first]
    return states
