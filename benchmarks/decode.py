"""Rollout throughput against ``model.generate(do_sample=True)`` in one process, 64 sequences of 32 new tokens.

    python benchmarks/decode.py [--repeats 5]

``generate`` is called as a user would (its default top-k of 50 and all) and with the truncation off, which is the
distribution that we sample. Ours keeps states, shortlists and log-probabilities; ``generate`` keeps nothing.
"""

from __future__ import annotations

import argparse

from common import alternate, median, peak_memory_gb, report, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    import torch

    import tea_rl
    from tea_rl import DecodeSettings, TeaHead, load_backbone, load_recipe
    from tea_rl.training.online import prepare_prompts

    backbone = load_backbone("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=args.dtype)
    prompts, _ = prepare_prompts(load_recipe("quickstart"), backbone)
    ids = prompts.token_ids[: args.prompts]
    head = TeaHead.for_backbone(backbone)
    torch.nn.init.normal_(head.members.readout, std=1e-3)  # a head that corrects, as during training
    settings = DecodeSettings(num_generations=args.generations, max_new_tokens=args.tokens)
    texts = [prompt.rendered for prompt in prompts.prompts[: args.prompts]]
    batch = backbone.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")

    def ours() -> float:
        result = {}
        elapsed = seconds(lambda: result.update(out=tea_rl.generate(backbone, head, ids, settings)))
        return len(result["out"].tokens) / elapsed

    def generate(**options: object) -> float:
        result = {}
        call = {
            "do_sample": True,
            "max_new_tokens": args.tokens,
            "num_return_sequences": args.generations,
            "pad_token_id": backbone.pad_token_id,
            **options,
        }
        elapsed = seconds(lambda: result.update(out=backbone.model.generate(**batch, **call)))
        new = result["out"][:, batch["input_ids"].shape[1] :]
        # Tokens up to and including the first end of sequence; what follows is padding.
        ended = (new == backbone.eos_token_ids[0]).int().cumsum(1)
        return int((ended - (new == backbone.eos_token_ids[0]).int() == 0).sum()) / elapsed

    figures = alternate(
        {"tea_rl": ours, "generate": generate, "generate_untruncated": lambda: generate(top_k=0)},
        args.repeats,
    )
    medians = {name: median(values) for name, values in figures.items()}
    report(
        "decode",
        {
            "batch": args.prompts * args.generations,
            "new_tokens": args.tokens,
            "dtype": str(backbone.dtype),
            "tokens_per_second": medians,
            "ratio": round(medians["tea_rl"] / medians["generate"], 2),
            "ratio_untruncated": round(medians["tea_rl"] / medians["generate_untruncated"], 2),
            "all": {name: [round(v, 1) for v in values] for name, values in figures.items()},
            "peak_memory_gb": round(peak_memory_gb(), 2),
        },
    )


if __name__ == "__main__":
    main()
