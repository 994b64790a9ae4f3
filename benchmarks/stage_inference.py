"""``model.generate`` with the head installed against the same call on the plain model.

Both decode greedily and are made to generate the same number of tokens, so that neither sampling nor early ends blur the
difference. The peer's column is the plain model; a ratio of 0.95 says that the head costs a twentieth.

Limit: that of the decode stage for the same prompts and tokens, with the head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import OURS, Figure, Setting, alternate, seconds
from limits import HeadWork, ModelWork
from stage_decode import correcting_head, generate_batch


def run(setting: Setting) -> Iterator[Figure]:
    """Measure the stage."""
    backbone, head = setting.backbone, correcting_head(setting.backbone)
    tokens = setting.pick(12, 32)
    for count in (1, 64):
        prompts = setting.short_prompts(count)
        batch = generate_batch(backbone, prompts)

        def generate(installed: bool, length: int = tokens, batch: dict = batch, count: int = count) -> float:
            options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            if installed:
                backbone.install(head)
            try:
                elapsed = seconds(
                    lambda: backbone.model.generate(**batch, **options, pad_token_id=backbone.pad_token_id)
                )
            finally:
                backbone.uninstall()
            return count * length / elapsed

        runs = {OURS: lambda: generate(True), "plain": lambda: generate(False)}
        warm_ups = {OURS: lambda: generate(True, 2), "plain": lambda: generate(False, 2)}
        values = alternate(runs, setting.pick(1, 15 if count == 1 else 2), warm_ups)
        sizes, lengths = [len(ids) for ids in prompts], torch.full((count,), tokens)
        model = ModelWork(backbone)
        work = [
            *model.prefill(sizes),
            *model.decode(sizes, lengths),
            *HeadWork(head).decode(lengths),
        ]
        limit = count * tokens / setting.limits.seconds(work)
        yield Figure(f"batch {count}", "tokens/s", values, limit, {"new_tokens": tokens})
