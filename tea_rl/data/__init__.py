"""Data: where prompts come from."""

from tea_rl.data.prompts import Prompt, data_digest, load_prompts, tokenize_prompts

__all__ = ["Prompt", "data_digest", "load_prompts", "tokenize_prompts"]
