"""A rollout on its way to the learner: which prompts it answers, and its place in a checkpoint while it waits for rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
        rewards: of every completion, unknown ones replaced, ``(B,)``.
        groups: prompts whose completions earn different rewards.
        drawn: prompts.
    """

    tokens: TokenBatch
    advantages: Tensor
    rewards: Tensor
    groups: int
    drawn: int
