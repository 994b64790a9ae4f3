"""A recipe on a tiny model, small enough to train every method on in seconds."""

from pathlib import Path
from typing import Any

from tiny import save_tiny

from tea_rl.compare.jobs import Job, plan, read_job
from tea_rl.compare.methods import ADAPTERS, parse_methods
from tea_rl.recipe import Recipe, parse_recipe

REWARD = '''
def even(prompts, completions, **columns):
    """Share of characters with an even code point."""
    return [sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text)) for text in completions]
'''


def tiny_recipe(folder: Path, reward: str = REWARD, **groups: dict[str, Any]) -> Recipe:
    """Continue a word with even letters; ``groups`` of settings are merged into the recipe's."""
    if not (folder / "llama").exists():
        save_tiny("llama", folder)
    (folder / "reward.py").write_text(reward)
    raw: dict[str, Any] = {
        "name": "even",
        "model": {"name_or_path": str(folder / "llama"), "dtype": "float32", "device": "cpu"},
        "head": {"num_members": 2, "hidden_sizes": [8], "shortlist_size": 16},
        "data": {"prompts": [f"word {letter}" for letter in "abcdefghijkl"], "eval_fraction": 0.5},
        "rewards": [{"name": str(folder / "reward.py") + ":even"}],
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8},
        "train": {"max_steps": 2, "warmup_steps": 1},
        "compare": {
            "learning_rates": {name: [1e-2] for name in ADAPTERS},
            "seeds": [0],
            "curve_seconds": 0.001,
            "curve_prompts": 2,
            "num_train_epochs": 1,
            "strengths": [0.0, 1.0],
        },
    }
    for name, settings in groups.items():
        raw[name] = {**raw.get(name, {}), **settings}
    return parse_recipe(raw, "even", folder)


def job_of(recipe: Recipe, method: str, output: Path) -> Job:
    """The first job of a method, begun and read back as its process would."""
    job = next(job for job in plan(recipe, parse_methods(method), output) if job.method.name == method)
    job.begin()
    return read_job(job.folder)
