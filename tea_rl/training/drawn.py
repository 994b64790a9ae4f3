"""A rollout on its way to the learner: which prompts it answers, its place in a checkpoint, and what its tokens earned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.objectives.advantages import known_advantages, reward_unit
from tea_rl.recipe import ObjectiveConfig
from tea_rl.rollout import Rollout
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.counterfactuals import Counterfactuals, own_credit

#: What a rollout says of its completions.
_COUNTS = ("lengths", "finished", "prompt_index")
_TENSORS, _TEXTS = "ahead.safetensors", "ahead.json"


@dataclass
class Drawn:
    """Completions of a step.

    Attributes:
        step: whose they are.
        chosen: numbers of the training prompts, ``(P,)``.
        rollout: their completions, those of a prompt side by side.
        seconds: what generating took.
    """

    step: int
    chosen: list[int]
    rollout: Rollout
    seconds: float

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder: a resumed run could not generate it again, its head is gone."""
        rollout = self.rollout
        counts = {name: getattr(rollout, name).contiguous() for name in _COUNTS}
        save_file(rollout.tokens.tensors() | counts, folder / _TENSORS)
        facts = {
            "step": self.step,
            "chosen": self.chosen,
            "texts": rollout.texts,
            "seconds": self.seconds,
        }
        (folder / _TEXTS).write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Drawn | None:
        """What `save` wrote; None where nothing was."""
        if not (folder / _TEXTS).is_file():
            return None
        facts = json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS, device=str(device))
        rollout = Rollout(
            TokenBatch.from_tensors(tensors), facts["texts"], **{name: tensors[name] for name in _COUNTS}
        )
        rollout.prompt_index = rollout.prompt_index.cpu()  # where `generate` leaves it
        return cls(facts["step"], facts["chosen"], rollout, facts["seconds"])


@dataclass
class Credited:
    """What a learner takes of drawn completions.

    Attributes:
        tokens: those that are worth learning from.
        advantages: of each of them, ``(N,)``.
        rewards: of every completion, NaN where unknown, ``(B,)``.
        groups: prompts that teach something: their completions earn different rewards, or would with another token.
        drawn: prompts.
        edits: what was asked with ``objective.counterfactuals``, of the tokens as drawn.
        unit: reward that an advantage of 1 stands for.
    """

    tokens: TokenBatch
    advantages: Tensor
    rewards: Tensor
    groups: int
    drawn: int
    edits: Counterfactuals | None = None
    unit: float = 1.0


def credit(
    drawn: Drawn,
    total: Sequence[float],
    objective: ObjectiveConfig,
    only_unequal: bool,
    edits: Counterfactuals | None = None,
) -> Credited:
    """Advantage of every token of a draw.

    Args:
        drawn: the completions.
        total: their rewards, NaN where unknown.
        objective: says how they are compared.
        only_unequal: leave out the tokens of prompts that teach nothing, unless none does.
        edits: what they would have earned with other tokens.
    """
    rewards, tokens = torch.tensor(total, dtype=torch.float32), drawn.rollout.tokens
    grouped = rewards.view(len(drawn.chosen), -1)
    advantage, teaches = known_advantages(objective.name, grouped, objective.scale_rewards)
    unit = reward_unit(objective.name, grouped, objective.scale_rewards)
    device = tokens.rows.device
    of_token = advantage.flatten().to(device)[tokens.rows]
    group = (tokens.rows // grouped.shape[1]).cpu()
    if edits is not None and len(edits.changes):
        # Where all completions earn the same, what is lost or won by a token is the only measure.
        unit = unit or float(edits.changes.square().mean().sqrt())
        teaches = (
            teaches | torch.zeros(len(teaches)).index_add_(0, group[edits.at], edits.changes.abs()).bool()
        )
        own, asked = own_credit(edits, len(tokens))
        # A token that was not asked for keeps its completion's advantage.
        mixed = torch.lerp(of_token, own.to(device) / (unit or 1.0), objective.counterfactual_credit)
        of_token = torch.where(asked.to(device), mixed, of_token)
    if only_unequal and bool(teaches.any()):
        index = teaches[group].nonzero().squeeze(1).to(device)
        tokens, of_token = tokens.select(index), of_token[index]
    return Credited(tokens, of_token, rewards, int(teaches.sum()), len(drawn.chosen), edits, unit)
