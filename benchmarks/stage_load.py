"""From the start of a process to its first token, ours (a head installed) against plain transformers, in turns.

    python benchmarks/stage_load.py ours|transformers FOLDER DTYPE      # one child; the suite starts them

Both children load the same dense model, import only what they need, and print once the token is there; the parent's clock
runs from before the process exists. The model's files are in the system's cache from the first round on, which
counts with ``--quick`` only.

Limit: the weights copied once, and the prompt once through the model.
"""

from __future__ import annotations

import json
import sys

_PROMPT = "The weather today is"


def run(setting):  # noqa: ANN001, ANN201 - types would import torch in the children
    """Measure the stage: `Setting` to a list of `Figure`."""
    from common import OURS, Figure, alternate, run_child, seconds
    from limits import ModelWork, Work

    from tea_rl.model_source import find_model

    source = find_model(setting.model)
    dtype = str(setting.backbone.dtype).removeprefix("torch.")
    found: dict[str, dict] = {}

    def start(side: str) -> float:
        return seconds(lambda: found.update({side: run_child("stage_load.py", side, source.path, dtype)}))

    runs = {OURS: lambda: start("ours"), "transformers": lambda: start("transformers")}
    warm_ups = {} if setting.quick else None
    values = alternate(runs, setting.pick(1, 2), warm_ups)
    model = ModelWork(setting.backbone)
    work = [
        Work(0, 2 * model.num_bytes),
        *model.prefill([len(setting.backbone.tokenizer(_PROMPT).input_ids)]),
    ]
    return [Figure("first token", "s", values, setting.limits.seconds(work), {"children": found})]


def ours(folder: str, dtype: str) -> list[int]:
    """Load the backbone, put a head in, decode one token."""
    from tea_rl import DecodeSettings, TeaHead, generate, load_backbone

    backbone = load_backbone(folder, dtype=dtype)
    prompt = backbone.tokenizer(_PROMPT).input_ids
    out = generate(backbone, TeaHead.for_backbone(backbone), [prompt], DecodeSettings(1, 1, greedy=True))
    return out.tokens.actions.tolist()


def transformers(folder: str, dtype: str) -> list[int]:
    """The same with the plain model and ``generate``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    batch = tokenizer(_PROMPT, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=1, do_sample=False)
    return out[0, batch["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    side, folder, dtype = sys.argv[1:]
    token = {"ours": ours, "transformers": transformers}[side](folder, dtype)
    print(json.dumps({"token": token}))
