"""``model.generate`` with the head installed against the same call on the plain model.

All decode greedily and are made to generate the same number of tokens, so that neither sampling nor early ends blur the
difference. ``plain`` is the model as transformers makes it; ``uninstalled`` is ours without the head, whose layers are laid out
for inference as well: a ratio of 0.95 there says that the head costs a twentieth.

Limit: that of the decode stage for the same prompts and tokens, with the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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

        def generate(model: Any, length: int, batch: dict = batch, count: int = count) -> float:
            options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            elapsed = seconds(lambda: model.generate(**batch, **options, pad_token_id=backbone.pad_token_id))
            return count * length / elapsed

        def installed(length: int = tokens, generate: Any = generate) -> float:
            backbone.install(head)
            try:
                return generate(backbone.model, length)
            finally:
                backbone.uninstall()

        def plain(length: int = tokens, generate: Any = generate) -> float:
            return generate(setting.plain_backbone.model, length)

        def uninstalled(length: int = tokens, generate: Any = generate) -> float:
            return generate(backbone.model, length)

        runs = {OURS: installed, "plain": plain, "uninstalled": uninstalled}
        warm_ups = {name: lambda run=run: run(2) for name, run in runs.items()}
        values = alternate(runs, setting.pick(1, 9 if count == 1 else 2), warm_ups)
        sizes, lengths = [len(ids) for ids in prompts], torch.full((count,), tokens)
        model = ModelWork(backbone)
        work = [
            *model.prefill(sizes),
            *model.decode(sizes, lengths),
            *HeadWork(head).decode(lengths),
        ]
        limit = count * tokens / setting.limits.seconds(work)
        yield Figure(f"batch {count}", "tokens/s", values, limit, {"new_tokens": tokens})
