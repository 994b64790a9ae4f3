"""Rollout throughput against ``model.generate(do_sample=True)``: batches 1 to 256, short prompts and prompts of 512 tokens.

``generate`` is called as a user would (its default top-k of 50 and all) and, at batch 64 of a full run, with the truncation off
as well, which is the distribution that we sample. Ours keeps states, shortlists and log-probabilities; ``generate`` keeps
nothing. Tokens count up to and including the first that ends a completion. At batches 1 and 64 a full run on a CPU also measures
ours with the backbone loaded otherwise (`common.VARIANTS`), in the same rounds.

Limit: every distinct prompt once through the transformer, then weights and cache once a step for the completions that still
grow, and the head's correction for every token (`limits.ModelWork`, `limits.HeadWork`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from common import OURS, VARIANTS, Figure, Setting, alternate, seconds
from limits import HeadWork, ModelWork
from torch import Tensor

import tea_rl
from tea_rl import Backbone, DecodeSettings, TeaHead

#: Prompts and generations of each, for a batch.
_BATCHES = {1: (1, 1), 8: (1, 8), 64: (8, 8), 256: (32, 8)}
_LONG = 512
#: Those that a quick run has time for.
_QUICK_BATCHES = (1, 64)
#: Those at which `common.VARIANTS` are measured as well.
_VARIED_BATCHES = (1, 64)


def run(setting: Setting) -> Iterator[Figure]:
    """Measure the stage."""
    head = correcting_head(setting.backbone)
    for batch, (prompts, generations) in _BATCHES.items():
        if setting.quick and batch not in _QUICK_BATCHES:
            continue
        tokens = setting.pick(16, 16 if batch > 64 else 32)
        repeats = setting.pick(1, {1: 9, 8: 3, 64: 2, 256: 1}[batch])  # a short call swings by a third
        found = _compare(
            setting,
            head,
            setting.short_prompts(prompts),
            generations,
            tokens,
            repeats,
            untruncated=batch == 64 and not setting.quick,
            varied=batch in _VARIED_BATCHES,
        )
        yield from _named(found, f"batch {batch}")
    prompts = setting.pick(1, 2)
    long = setting.long_prompts(prompts, _LONG)
    found = _compare(setting, head, long, 8, setting.pick(8, 16), setting.pick(1, 2))
    yield from _named(found, f"{_LONG}-token prompts, 8 generations each")


def correcting_head(backbone: Backbone) -> TeaHead:
    """A head that corrects, as during training."""
    head = TeaHead.for_backbone(backbone).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(head.members.readout, std=1e-3)
    return head


def generate_batch(backbone: Backbone, prompts: list[list[int]]) -> dict[str, Tensor]:
    """What ``generate`` takes: ids and mask, padded on the left."""
    longest = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), longest), backbone.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids.to(backbone.device), "attention_mask": mask.to(backbone.device)}


def tokens_until_end(backbone: Backbone, new: Tensor) -> int:
    """New tokens of all rows, up to and including the first end; what follows is padding."""
    ends = torch.isin(new, torch.tensor(backbone.eos_token_ids, device=new.device)).int()
    return int(((ends.cumsum(1) - ends) == 0).sum())


def rollout_speed(
    backbone: Backbone, head: TeaHead, prompts: list[list[int]], generations: int, tokens: int
) -> tuple[float, Tensor]:
    """Tokens a second of one rollout, and how long its completions are."""
    options = DecodeSettings(num_generations=generations, max_new_tokens=tokens)
    result: dict[str, Any] = {}
    elapsed = seconds(lambda: result.update(out=tea_rl.generate(backbone, head, prompts, options)))
    lengths = result["out"].lengths
    return int(lengths.sum()) / elapsed, lengths


def generate_speed(
    backbone: Backbone, prompts: list[list[int]], generations: int, tokens: int, **options: Any
) -> float:
    """Tokens a second of one call of ``generate``."""
    batch, result = generate_batch(backbone, prompts), {}
    call = {
        "do_sample": True,
        "max_new_tokens": tokens,
        "num_return_sequences": generations,
        "pad_token_id": backbone.pad_token_id,
        **options,
    }
    elapsed = seconds(lambda: result.update(out=backbone.model.generate(**batch, **call)))
    return tokens_until_end(backbone, result["out"][:, batch["input_ids"].shape[1] :]) / elapsed


def _compare(
    setting: Setting,
    head: TeaHead,
    prompts: list[list[int]],
    generations: int,
    tokens: int,
    repeats: int,
    untruncated: bool = False,
    varied: bool = False,
) -> Figure:
    backbone, seen = setting.backbone, []

    def ours(ids: list[list[int]] = prompts, length: int = tokens) -> float:
        speed, lengths = rollout_speed(backbone, head, ids, generations, length)
        if length == tokens:
            seen.append(lengths)
        return speed

    def generate(ids: list[list[int]] = prompts, length: int = tokens, **options: Any) -> float:
        return generate_speed(setting.plain_backbone, ids, generations, length, **options)

    runs: dict[str, Any] = {OURS: ours, "generate": generate}
    warm_ups = {name: lambda call=call: call(prompts[:1], 2) for name, call in runs.items()}
    for name, other in setting.variant_backbones.items() if varied else ():
        shape = (other, correcting_head(other), prompts, generations)
        runs[name] = lambda shape=shape: rollout_speed(*shape, tokens)[0]
        warm_ups[name] = lambda shape=shape: rollout_speed(*shape, 4)
    if untruncated:
        runs["generate_untruncated"] = lambda: generate(top_k=0)
    values = alternate(runs, repeats, warm_ups)
    model, lengths = ModelWork(backbone), seen[-1]
    sizes = [len(ids) for ids in prompts]
    work = [
        *model.prefill(sizes),
        *model.decode(sizes, lengths),
        *HeadWork(head).decode(lengths),
    ]
    limit = int(lengths.sum()) / setting.limits.seconds(work)
    facts = {"prompts": len(prompts), "generations": generations, "new_tokens": tokens}
    return Figure("", "tokens/s", values, limit, facts)


def _named(figure: Figure, name: str) -> Iterator[Figure]:
    """The figure under its name, and those of the variants that were measured."""
    varied = {variant: figure.values.pop(variant) for variant in VARIANTS if variant in figure.values}
    figure.name = name
    yield figure
    for variant, values in varied.items():
        yield figure.variant(variant, values)
