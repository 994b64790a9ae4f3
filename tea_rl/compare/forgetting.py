"""What a model forgot: perplexities on text that has nothing to do with its training."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tea_rl.compare.results import Forgetting
from tea_rl.compare.sampling import answer_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Reasoning-gym tasks: none of them is in a shipped recipe.
TASKS = ("family_relationships", "spell_backward", "count_primes")
#: A model is compared with another on the very same text, so little of it tells much; it is read for every job.
_PASSAGES, _PASSAGE_CHARACTERS, _PASSAGE_TOKENS = 12, 1200, 128
_QUESTIONS, _TASK_SEED = 8, 7


def measure_forgetting(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    notify: Callable[[str], None] = lambda message: None,
) -> Forgetting:
    """Perplexity on Python's language reference, and on reasoning-gym questions with their answers.

    Args:
        tasks: names of reasoning-gym tasks.
        notify: hears that reasoning-gym is missing.
    """
    model.eval()
    english = perplexity(model, [split_passage(tokenizer, text) for text in english_passages()])
    found: dict[str, float] = {}
    if importlib.util.find_spec("reasoning_gym") is None:
        notify(
            'no reasoning-gym, so forgetting is measured on English alone: pip install "tea-rl[reasoning]"'
        )
    else:
        for name in tasks:
            pairs = [split_passage(tokenizer, text) for text in _questions(name)]
            found[name] = perplexity(model, pairs)
    return Forgetting(english_perplexity=english, tasks=found)


def english_passages() -> list[str]:
    """Passages of the Python language reference, which ships with Python."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return [topics[name][:_PASSAGE_CHARACTERS] for name in names[:: max(1, len(names) // _PASSAGES)]][
        :_PASSAGES
    ]


def split_passage(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The first token of a passage, and the rest, which is scored."""
    limit = min(_PASSAGE_TOKENS, tokenizer.model_max_length)
    ids = list(tokenizer(text).input_ids)[:limit]
    return ids[:1], ids[1:]


@torch.no_grad()
def perplexity(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Perplexity, a token, of answers given what comes before them; NaN if there are none."""
    total, count = 0.0, 0
    for pair in pairs:
        (logits,) = answer_logits(model, [pair])
        actions = torch.tensor(pair[1], device=logits.device).unsqueeze(1)
        total -= logits.float().log_softmax(-1).gather(1, actions).sum().item()
        count += len(pair[1])
    if not count:
        return math.nan
    return math.exp(min(total / count, 700.0))  # a wrecked model must not overflow


def _questions(task: str) -> list[str]:
    """Questions with their answers: an answer alone is a token or two, too little to measure."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset(task, size=_QUESTIONS, seed=_TASK_SEED)
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
