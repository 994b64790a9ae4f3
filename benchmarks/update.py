"""One update (2,000 tokens, one pass) against the same ensemble through naive full-vocabulary readouts and losses.

    python benchmarks/update.py [--repeats 3]

Three learners share the members, the optimizer, the minibatches and the loss (clipped surrogate plus reverse KL):
``tea_rl``; ``naive_tied``, whose correction passes through the whole frozen output matrix with explicit softmaxes over
the vocabulary; and ``naive_readout``, the original form, whose members end in a trained vocabulary projection.
"""

from __future__ import annotations

import argparse

from common import alternate, median, peak_memory_gb, report, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()

    import torch
    from torch.nn import functional as F

    from tea_rl import TeaHead, load_backbone
    from tea_rl.objectives.anchor import anchored_loss
    from tea_rl.objectives.policy_gradient import clipped_surrogate
    from tea_rl.recipe import AnchorConfig, ObjectiveConfig, TrainConfig
    from tea_rl.rollout.decode import choose_tokens
    from tea_rl.training.learner import Learner

    torch.manual_seed(0)
    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    weight, minibatch = backbone.reference.weight, ObjectiveConfig().minibatch_tokens
    head = TeaHead.for_backbone(backbone)
    states = torch.randn(args.tokens, backbone.hidden_size, dtype=backbone.dtype)
    states *= 20 / weight.float().std() / backbone.hidden_size  # logits about as spread as a language model's
    with torch.no_grad():
        parts = [
            choose_tokens(
                head,
                part,
                torch.arange(len(part)),
                torch.rand(len(part), 2, dtype=torch.float64),
                torch.zeros(len(part), dtype=torch.bool),
                1.0,
            )
            for part in states.split(64)
        ]
        tokens = type(parts[0]).cat(parts)
    advantage = torch.randn(args.tokens)
    objective = ObjectiveConfig(name="grpo", inner_epochs=1)
    train = TrainConfig(learning_rate=1e-5)
    learner = Learner(head, objective, AnchorConfig(), train, 1.0, 10**6)
    generator = torch.Generator().manual_seed(0)

    naive_head = TeaHead.for_backbone(backbone)
    width = naive_head.members.readout.shape[1]
    projection = torch.nn.Parameter(torch.zeros(backbone.vocab_size, width))
    members = [p for p in naive_head.members.parameters() if p is not naive_head.members.readout]
    tied_optimizer = torch.optim.AdamW(naive_head.trainable_parameters(), lr=1e-5, fused=True)
    readout_optimizer = torch.optim.AdamW([*members, projection], lr=1e-5, fused=True)

    def naive(own_readout: bool) -> None:
        optimizer = readout_optimizer if own_readout else tied_optimizer
        for index in torch.randperm(args.tokens, generator=generator).split(minibatch):
            h = tokens.states[index].float()
            base = F.linear(h, weight.float())
            if own_readout:
                features = naive_head.members.features(h).transpose(0, 1).flatten(1)
                logits = base + features @ projection.t()
            else:
                logits = base + F.linear(naive_head.members(h)[0], weight.float())
            logps, base_logps = logits.log_softmax(-1), base.log_softmax(-1)
            chosen = logps.gather(1, tokens.actions[index].unsqueeze(1)).squeeze(1)
            kl = (logps.exp() * (logps - base_logps)).sum(-1).mean()
            task = clipped_surrogate(chosen, tokens.logps[index], advantage[index], 0.2).mean()
            optimizer.zero_grad(set_to_none=True)
            anchored_loss(task, kl, 0.05).backward()
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], 1.0
            )
            optimizer.step()

    figures = alternate(
        {
            "tea_rl": lambda: seconds(lambda: learner.update(tokens, advantage, generator)),
            "naive_tied": lambda: seconds(lambda: naive(False)),
            "naive_readout": lambda: seconds(lambda: naive(True)),
        },
        args.repeats,
    )
    medians = {name: median(values) for name, values in figures.items()}
    report(
        "update",
        {
            "tokens": args.tokens,
            "seconds": medians,
            "ratio_naive_tied": round(medians["naive_tied"] / medians["tea_rl"], 1),
            "ratio_naive_readout": round(medians["naive_readout"] / medians["tea_rl"], 1),
            "trainable": {
                "tea_rl": sum(p.numel() for p in head.trainable_parameters()),
                "naive_readout": sum(p.numel() for p in members) + projection.numel(),
            },
            "all": {name: [round(v, 3) for v in values] for name, values in figures.items()},
            "peak_memory_gb": round(peak_memory_gb(), 2),
        },
    )


if __name__ == "__main__":
    main()
