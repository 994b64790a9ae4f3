"""Checkpoints that are whole or not there: temporary name, sync, digests, rename. No pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tea_rl.errors import TeaError
from tea_rl.training.files import atomic_write_text, fsync_dir, fsync_file

if TYPE_CHECKING:
    import torch

CHECKPOINTS_NAME = "checkpoints"
COMPLETE_NAME = "COMPLETE.json"
_TENSORS_NAME, _STRUCTURE_NAME = "optimizer.safetensors", "optimizer.json"
#: ``step-20``, or ``step-20.old`` where a crash fell between the two renames that replace a folder.
_STEP_FOLDER = re.compile(r"step-(\d+)(\.old)?")


def save_checkpoint(
    run_path: str | Path, step: int, write: Callable[[Path], None], keep: int | None = None
) -> Path:
    """Write ``checkpoints/step-<step>`` in full or not at all, then drop old ones.

    Killed at any moment, or out of disk, the checkpoints that were complete before still are.

    Args:
        run_path: the run's folder, held by this process.
        step: number of steps done.
        write: fills the folder it is given.
        keep: how many checkpoints stay, the new one included; None for all.

    Raises:
        TeaError: if the disk refuses (full, read-only); says which checkpoint survives. What ``write`` raises passes.
    """
    root = Path(run_path) / CHECKPOINTS_NAME
    target = root / f"step-{step}"

    def write_and_seal(folder: Path) -> None:
        write(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        complete = {"step": step, "files": {name: _digest(folder / name) for name in names}}
        atomic_write_text(folder / COMPLETE_NAME, json.dumps(complete, indent=2) + "\n")

    try:
        root.mkdir(exist_ok=True)
        _remove_stale(root)
        _replace(target, write_and_seal)
    except (OSError, SafetensorError) as error:
        _remove_stale(root)
        raise TeaError(_refusal(f"the checkpoint {target}", error) + _survivor(run_path)) from error
    with suppress(OSError):  # an old checkpoint too many does no harm
        _prune(root, step, keep)
    return target


def newest_checkpoint(run_path: str | Path) -> tuple[Path, int, list[str]] | None:
    """Find the newest checkpoint whose files are all there with the digests they were written with.

    Returns:
        its folder, its step, and a warning for each newer checkpoint that was passed over, naming the damaged file;
        None if the run has no checkpoint yet.

    Raises:
        TeaError: if there are checkpoints and all are damaged.
    """
    warnings: list[str] = []
    for step, path in reversed(_checkpoints(Path(run_path) / CHECKPOINTS_NAME)):
        damage = _damage(path, step)
        if damage is None:
            return path, step, warnings
        warnings.append(f"checkpoint {path} is damaged and was passed over: {damage}")
    if warnings:
        raise TeaError(f"no usable checkpoint in {run_path}: {warnings[0]}; start afresh in another folder")
    return None


def replace_directory(target: str | Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by what ``write`` puts into the empty folder it is given.

    A crash leaves the old folder, the new one, or, between two renames, the old one under ``<name>.old``, which the
    next call puts back. Never a part of the new one.

    Raises:
        TeaError: if the disk refuses; the old folder is untouched. What ``write`` raises passes.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, write)
    except (OSError, SafetensorError) as error:
        raise TeaError(_refusal(str(target), error)) from error


def save_optimizer(path: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """Write an optimizer's state into the folder ``path`` as safetensors and JSON; exact to the bit."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(optimizer.state_dict(), tensors)
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(path) / _TENSORS_NAME)
    (Path(path) / _STRUCTURE_NAME).write_text(json.dumps(structure), encoding="utf-8")


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer over the same parameters the state that :func:`save_optimizer` wrote.

    Raises:
        TeaError: if the files are missing or damaged, or belong to other parameters.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(Path(path) / _TENSORS_NAME)
        structure = json.loads((Path(path) / _STRUCTURE_NAME).read_text(encoding="utf-8"))
        optimizer.load_state_dict(_unpack(structure, tensors))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TeaError(
            f"{path} does not hold the state of this optimizer ({first}); resume with the recipe of the run"
        ) from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON form of a state dictionary. Tensors go to ``tensors``; what JSON cannot tell apart is tagged."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A clone: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state holds a {type(value).__name__}, which cannot be written without pickle")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    temporary, aside = target.with_name(f".tmp-{target.name}"), target.with_name(f"{target.name}.old")
    if aside.exists() and not target.exists():
        os.rename(aside, target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        _sync_tree(temporary)
        if target.exists():
            _remove(aside)
            os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            if aside.exists():
                os.rename(aside, target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(target.parent)
    with suppress(OSError):
        _remove(aside)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_dir(path)
        else:
            fsync_file(path)
    fsync_dir(folder)


def _remove(folder: Path) -> None:
    """Remove a folder; killed half-way, what is left has a temporary name."""
    if folder.exists():
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, oldest first; of one step, the set-aside one comes before the other."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found)]


def _prune(root: Path, current: int, keep: int | None) -> None:
    if keep is None:
        return
    # Steps beyond the current one were damaged when the run resumed, so they are the first to go.
    order = sorted(_checkpoints(root), key=lambda item: (item[0] <= current, item[0]))
    for _, path in order[: max(0, len(order) - max(1, keep))]:
        _remove(path)


def _damage(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        complete = json.loads((path / COMPLETE_NAME).read_text(encoding="utf-8"))
        if complete["step"] != step:
            return f"{COMPLETE_NAME} belongs to step {complete['step']}"
        for name, digest in complete["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != digest:
                return f"{name} does not have the digest it was written with"
    except FileNotFoundError:
        return f"{COMPLETE_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE_NAME} cannot be read ({error})"
    return None


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def _refusal(what: str, error: OSError | SafetensorError) -> str:
    # safetensors wraps the system's error into its own and keeps only the text.
    reason = getattr(error, "strerror", None) or str(error)
    full = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in reason
    )
    advice = "free some space" if full else "mend that"
    return f"could not write {what}: {reason}; {advice} and continue with --resume"


def _survivor(run_path: str | Path) -> str:
    try:
        found = newest_checkpoint(run_path)
    except (TeaError, OSError):
        found = None
    return f" from step {found[1]}, whose checkpoint is intact" if found else " (no earlier checkpoint)"
