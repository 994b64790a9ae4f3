"""Randomness derived from (seed, step): nothing to save, and a resumed run draws what the uninterrupted one drew."""

from __future__ import annotations

import random

import numpy as np
import torch

# Streams keep the draws of one seed apart.
_STEP, _ORDER, _MORE, _EDITS = 1, 2, 3, 4


def seed_step(seed: int, step: int) -> torch.Generator:
    """Seed Python, NumPy and torch for a step and return a generator of its own for the minibatch order."""
    state = np.random.SeedSequence([seed, _STEP, step]).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
    return torch.Generator().manual_seed(int(state[3]))


def generator_of(key: tuple[int, ...]) -> torch.Generator:
    """What draws the changed completions of a rollout, from the rollout's key; on the CPU."""
    state = np.random.SeedSequence([_EDITS, *key]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def prompts_of_step(seed: int, step: int, num_prompts: int, per_step: int) -> list[int]:
    """Indices of a step's prompts: an endless row of permutations, cut into pieces of ``per_step``.

    Every prompt comes once before any comes twice. ``step`` counts from 1.
    """
    places = range((step - 1) * per_step, step * per_step)
    orders = {
        epoch: np.random.default_rng([seed, _ORDER, epoch]).permutation(num_prompts)
        for epoch in {place // num_prompts for place in places}
    }
    return [int(orders[place // num_prompts][place % num_prompts]) for place in places]


def other_prompts(
    seed: int, step: int, number: int, num_prompts: int, used: set[int], wanted: int
) -> list[int]:
    """At most ``wanted`` prompts that a step has not used yet, drawn anew for each ``number`` (from 1)."""
    rest = np.array([index for index in range(num_prompts) if index not in used], dtype=np.int64)
    order = np.random.default_rng([seed, _MORE, step, number]).permutation(len(rest))
    return [int(index) for index in rest[order[: max(0, wanted)]]]
