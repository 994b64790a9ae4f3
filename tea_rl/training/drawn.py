"""A rollout on its way to the learner: which prompts it answers, its place in a checkpoint, and what its tokens earned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tea_rl.objectives.advantages import known_advantages
from tea_rl.recipe import ObjectiveConfig
from tea_rl.rollout import Rollout
from tea_rl.rollout.trajectory import TokenBatch

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
        groups: prompts whose completions earn different rewards.
        drawn: prompts.
    """

    tokens: TokenBatch
    advantages: Tensor
    rewards: Tensor
    groups: int
    drawn: int


def credit(drawn: Drawn, total: Sequence[float], objective: ObjectiveConfig, only_unequal: bool) -> Credited:
    """Advantage of every token of a draw.

    Args:
        drawn: the completions.
        total: their rewards, NaN where unknown.
        objective: says how they are compared.
        only_unequal: leave out the tokens of prompts whose completions earn the same, unless all do.
    """
    rewards, tokens = torch.tensor(total, dtype=torch.float32), drawn.rollout.tokens
    grouped = rewards.view(len(drawn.chosen), -1)
    advantage, unequal = known_advantages(objective.name, grouped, objective.scale_rewards)
    of_token = advantage.flatten().to(tokens.rows.device)[tokens.rows]
    if only_unequal and bool(unequal.any()):
        useful = unequal.repeat_interleave(grouped.shape[1]).to(tokens.rows.device)[tokens.rows]
        index = useful.nonzero().squeeze(1)
        tokens, of_token = tokens.select(index), of_token[index]
    return Credited(tokens, of_token, rewards, int(unequal.sum()), len(drawn.chosen))
