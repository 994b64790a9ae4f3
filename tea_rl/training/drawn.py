"""A rollout on its way to the learner: which prompts it answers, and its place in a checkpoint while it waits for rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tea_rl.rollout import Rollout

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
        tensors = {name: value.contiguous() for name, value in self.rollout.tensors().items()}
        save_file(tensors, folder / _TENSORS)
        facts = {
            "step": self.step,
            "chosen": self.chosen,
            "texts": self.rollout.texts,
            "seconds": self.seconds,
        }
        (folder / _TEXTS).write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Drawn | None:
        """What `save` wrote; None where nothing was."""
        if not (folder / _TEXTS).is_file():
            return None
        facts = json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
        rollout = Rollout.from_tensors(load_file(folder / _TENSORS, device=str(device)), facts["texts"])
        # What counts completions lives on the CPU, as `generate` leaves it.
        rollout.prompt_index = rollout.prompt_index.cpu()
        return cls(facts["step"], facts["chosen"], rollout, facts["seconds"])
