"""The benchmark suite: how fast each stage is beside its peer, and how far from what this machine allows.

    python benchmarks/suite.py [--quick] [--stages decode,update] [--output bench.json] [--compare benchmarks/results.json]

Ours and the peer run in turns in one process (or in paired processes: load, scaling); medians are reported. A ratio above 1
says that ours is faster. The machine's limit is measured first; how much of it a stage needs at the least is said in its
file and in `limits`. A stage that fails is reported, the others run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from common import OURS, Figure, Setting, machine
from lora import MODEL

#: Stages by name, in the order they run, and the module of each.
STAGES = {
    "decode": "stage_decode",
    "update": "stage_update",
    "online_step": "stage_online",
    "offline_epoch": "stage_offline",
    "inference": "stage_inference",
    "load": "stage_load",
    "scaling": "stage_scaling",
}
COMMITTED = Path(__file__).with_name("results.json")
#: Facts that belong beside a figure, and how they read.
_SHOWN_FACTS = {
    "update_share": "update {:.1%} of the step",
    "first_epoch_ratio": "{:g}x with the embedding counted",
    "peak_memory_gb": "peak {:g} GB",
}
_OUTPUT = Path("runs") / "bench.json"


def main() -> None:
    """Parse, measure, print, write."""
    from tea_rl import TeaError
    from tea_rl.huge_pages import use_huge_pages

    args = _arguments()
    use_huge_pages()  # as the command line does; the peers have them as well
    try:
        names = chosen_stages(args.stages)
        before = committed(args.compare)
        if args.output.is_dir():
            raise TeaError(f"--output takes a file, got the folder {args.output}; name a file in it")
        results = measure(names, args)
    except TeaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if before is not None:
        print("\n".join(["", f"now / {args.compare or COMMITTED}", *comparison(results, before)]))
    print(f"\nwritten: {args.output}")
    raise SystemExit(1 if any("error" in stage for stage in results["stages"].values()) else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats and smaller sizes: under 3 minutes"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="names separated by commas (default: all)")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help=f"JSON file (default {_OUTPUT})")
    parser.add_argument(
        "--compare", type=Path, help="earlier results (default benchmarks/results.json if it exists)"
    )
    parser.add_argument("--model", default=MODEL, help="Hub id or folder")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--huge", action="store_true", help="scaling: also 1e7 tokens (35 GB in float32)")
    return parser.parse_args()


def chosen_stages(text: str) -> list[str]:
    """Names of stages from ``"a,b"``.

    Raises:
        TeaError: for a name that is none.
    """
    from tea_rl.errors import TeaError, did_you_mean

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            hint = did_you_mean(name, STAGES)
            raise TeaError(f'--stages takes some of {", ".join(STAGES)}, got "{name}".{hint}')
    if not names:
        raise TeaError(f"--stages takes some of {', '.join(STAGES)}, got none; name one")
    return names


def committed(path: Path | None) -> dict[str, Any] | None:
    """Earlier results to compare with; None if none are named and none are committed.

    Raises:
        TeaError: if the file named is missing, or holds something else.
    """
    from tea_rl.errors import TeaError

    if path is None and not COMMITTED.exists():
        return None
    path = path or COMMITTED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TeaError(f"--compare takes a JSON file that this suite wrote, got {path}: {reason}") from error
    if not isinstance(found, dict) or not {"stages", "limits", "settings"} <= found.keys():
        raise TeaError(
            f"--compare takes a JSON file that this suite wrote, got {path} without stages; see --output"
        )
    return found


def measure(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages; the file is written after each, so that nothing is lost."""
    import transformers
    from limits import measure_limits

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves
    limits = measure_limits()
    print(f"limits of this machine: {limits}", flush=True)
    results: dict[str, Any] = {
        "settings": {"quick": args.quick, "model": args.model, "dtype": args.dtype},
        "machine": machine(),
        "limits": limits.as_dict(),
        "stages": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.quick, args.model, args.dtype, limits, Path(folder), args.huge)
        results["settings"]["dtype"] = str(setting.backbone.dtype).removeprefix("torch.")
        for name in names:
            results["stages"][name] = run_stage(name, setting)
            _write(args.output, results)
    return results


def run_stage(name: str, setting: Setting) -> dict[str, Any]:
    """Figures of one stage, printed as they come; ``error`` where it failed."""
    print(f"\n{name}  (limits: {setting.limits})", flush=True)
    started, figures = time.perf_counter(), {}
    try:
        for figure in importlib.import_module(STAGES[name]).run(setting):
            figures[figure.name] = figure.as_dict()
            print("  " + describe(figure), flush=True)
    except Exception as error:  # a peer that is not installed, say
        traceback.print_exc()
        print(f"  failed: {error}", flush=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"error": reason, "figures": figures}
    spent = round(time.perf_counter() - started, 1)
    print(f"  ({spent:g} s)", flush=True)
    return {"seconds": spent, "figures": figures}


def describe(figure: Figure) -> str:
    """One line for people."""
    found = figure.as_dict()
    parts = [f"{figure.name}: {OURS} {found[OURS]:g} {figure.unit}"]
    parts += [f"{name} {value:g} ({found['ratios'][name]:g}x)" for name, value in found["peers"].items()]
    if figure.limit is not None:
        parts.append(f"limit {found['limit']:g}, reached {found['limit_share']:.0%}")
    parts += [text.format(found[name]) for name, text in _SHOWN_FACTS.items() if name in found]
    return " | ".join(parts)


def comparison(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A line for every figure that both have: values and ratios to the peers, each now / before."""
    lines = []
    for key in ("quick", "model", "dtype"):
        ours, theirs = now["settings"].get(key), before["settings"].get(key)
        if ours != theirs:
            lines.append(f"note: {key} is {ours} now and was {theirs}; figures are of different sizes")
    for name, value in now["limits"].items():
        if before["limits"].get(name):
            lines.append(
                f"{name}: {value:g} / {before['limits'][name]:g} = {value / before['limits'][name]:.2f}"
            )
    for stage, found in now["stages"].items():
        earlier = before["stages"].get(stage, {}).get("figures", {})
        for name, figure in found.get("figures", {}).items():
            title = f"{stage}, {name}"
            if name not in earlier:
                lines.append(f"{title}: not in the earlier results")
                continue
            lines.append(f"{title}: {_beside(figure, earlier[name])}")
    return lines


def _beside(figure: dict[str, Any], earlier: dict[str, Any]) -> str:
    better = "higher" if figure["unit"].endswith("/s") else "lower"
    ratio = figure[OURS] / earlier[OURS]
    parts = [f"{figure[OURS]:g} / {earlier[OURS]:g} {figure['unit']} = {ratio:.2f} ({better} is better)"]
    for name, value in figure["ratios"].items():
        if name in earlier["ratios"]:
            parts.append(f"against {name} {value:g}x / {earlier['ratios'][name]:g}x")
    return " | ".join(parts)


def _write(path: Path, results: dict[str, Any]) -> None:
    from tea_rl.training.files import atomic_write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
