"""One pass of updates against the same ensemble over the whole vocabulary, and against LoRA's step on the same tokens.

Three learners share the members, the optimizer, the minibatches and the loss (clipped surrogate plus reverse KL): ``tea_rl``;
``naive_tied``, whose correction passes through the whole frozen output matrix with explicit softmaxes over the vocabulary; and
``naive_readout``, the original form, whose members end in a trained vocabulary projection. ``lora`` is the cheapest step that
PEFT's LoRA (r = 16, all linear layers) can make of as many tokens: one forward pass, one log-softmax, one backward pass. A full run on
a CPU also measures ours compiled (``train.compile``).

Limit: `limits.HeadWork.update`, for the update alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import OURS, VARIANTS, Figure, Setting, alternate, seconds
from limits import HeadWork
from lora import lora_model
from torch.nn import functional as F

from tea_rl import Backbone, DecodeSettings, TeaHead, generate
from tea_rl.objectives.anchor import anchored_loss
from tea_rl.objectives.policy_gradient import clipped_surrogate
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.training.learner import Learner

_ROW_TOKENS, _PROMPTS, _SPARE_ROWS = 32, 8, 16
_PASSES = 8


def run(setting: Setting) -> list[Figure]:
    """Measure the stage."""
    count = setting.pick(512, 2048)
    torch.manual_seed(0)
    head = TeaHead.for_backbone(setting.backbone)
    tokens, advantage = sampled_tokens(setting, head, count), torch.randn(count)
    generator = torch.Generator().manual_seed(0)
    objective = ObjectiveConfig(name="grpo", inner_epochs=1)
    learner = Learner(head, objective, AnchorConfig(), TrainConfig(learning_rate=1e-5), 1.0, 10**6)
    size = objective.minibatch_tokens
    if setting.variants:
        head.use_compiler()

    def ours(few: int, compiled: bool = False) -> object:
        head.uses_compiler = head.compiles_terms = compiled
        return learner.update(tokens.select(torch.arange(few)), advantage[:few], generator)

    steps: dict[str, Callable[[int], object]] = {
        OURS: ours,
        **{name: partial(ours, compiled=True) for name in ("compiled",) if name in setting.variants},
        "naive_tied": naive_update(setting.backbone, tokens, advantage, size, own_readout=False),
        "naive_readout": naive_update(setting.backbone, tokens, advantage, size, own_readout=True),
        "lora": lora_step(setting, count),
    }
    # Ours takes a tenth of a second, too short to be measured by itself: an inner epoch seldom comes alone either.
    passes = {name: _PASSES if name in (OURS, *VARIANTS) else 1 for name in steps}
    runs = {name: lambda name=name: _speed(steps[name], count, passes[name]) for name in steps}
    # A few tokens make every optimizer's state, and choose the products' kernels.
    warm_ups = {name: lambda step=step: step(2 * _ROW_TOKENS) for name, step in steps.items()}
    values = alternate(runs, setting.pick(1, 3), warm_ups)
    work = HeadWork(head).update(len(tokens.state_ids.unique()), -(-count // size))
    trainable = sum(parameter.numel() for parameter in head.trainable_parameters())
    limit = count / setting.limits.seconds(work)
    varied = {name: values.pop(name) for name in VARIANTS if name in values}
    figure = Figure("one pass", "tokens/s", values, limit, {"tokens": count, "trainable": trainable})
    return [figure, *(figure.variant(name, found) for name, found in varied.items())]


def _speed(step: Callable[[int], object], count: int, passes: int) -> float:
    """Tokens a second of so many passes in a row."""
    return passes * count / seconds(lambda: [step(count) for _ in range(passes)])


def sampled_tokens(setting: Setting, head: TeaHead, count: int) -> TokenBatch:
    """Tokens of a rollout: which words are listed, and how often the same ones, decides how long an update takes."""
    prompts = setting.short_prompts(_PROMPTS)
    rows = -(-count // _ROW_TOKENS) + _SPARE_ROWS  # some end early
    settings = DecodeSettings(num_generations=-(-rows // _PROMPTS), max_new_tokens=_ROW_TOKENS)
    tokens = generate(setting.backbone, head, prompts, settings).tokens.select(torch.arange(count))
    tokens.state_ids = torch.arange(count)  # equal ids would share their work
    return tokens


def naive_update(
    backbone: Backbone, tokens: TokenBatch, advantage: torch.Tensor, size: int, own_readout: bool
) -> Callable[[int], None]:
    """The same pass over the first so many tokens, with explicit softmaxes over the vocabulary."""
    weight, head = backbone.reference.weight, TeaHead.for_backbone(backbone)
    parameters = head.trainable_parameters()
    if own_readout:
        projection = torch.nn.Parameter(torch.zeros(backbone.vocab_size, head.members.readout.shape[1]))
        parameters = [p for p in parameters if p is not head.members.readout] + [projection]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def update(few: int) -> None:
        for index in torch.randperm(few).split(size):
            h = tokens.states[index].float()
            base = F.linear(h, weight.float())
            if own_readout:
                logits = base + head.members.features(h).transpose(0, 1).flatten(1) @ projection.t()
            else:
                logits = base + F.linear(head.members(h)[0], weight.float())
            logps, base_logps = logits.log_softmax(-1), base.log_softmax(-1)
            chosen = logps.gather(1, tokens.actions[index].unsqueeze(1)).squeeze(1)
            kl = (logps.exp() * (logps - base_logps)).sum(-1).mean()
            task = clipped_surrogate(chosen, tokens.logps[index], advantage[index], 0.2).mean()
            optimizer.zero_grad(set_to_none=True)
            anchored_loss(task, kl, 0.05).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return update


def lora_step(setting: Setting, count: int) -> Callable[[int], None]:
    """One forward and backward pass of LoRA over the first so many of ``count`` tokens, and its optimizer's step."""
    model, _ = lora_model(model=setting.model, dtype=setting.dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    ids = torch.randint(setting.backbone.vocab_size, (count // _ROW_TOKENS, _ROW_TOKENS))

    def step(few: int) -> None:
        model.train()
        read = ids[: few // _ROW_TOKENS]
        logits = model(input_ids=read).logits
        logps = logits.float().log_softmax(-1).gather(2, read.unsqueeze(2))
        optimizer.zero_grad(set_to_none=True)
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step
