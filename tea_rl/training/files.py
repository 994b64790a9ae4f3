"""Files that survive a crash: written beside their name, synced, renamed; JSON lines that may end in a torn line; locks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError


def fsync_dir(path: str | Path) -> None:
    """Make the names in a folder durable (a rename is, only once its folder is synced)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: str | Path) -> None:
    """Make a file's bytes durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets either the old content or the new one, never a part.

    Raises:
        OSError: the disk's own error; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what :func:`atomic_write_bytes` of a killed process left in ``folder``."""
    for path in folder.glob(".*.tmp-*"):
        with suppress(OSError):
            path.unlink()


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows as JSON lines and sync; NaN and infinities are written as ``NaN``, ``Infinity``.

    Raises:
        OSError: the disk's own error; the file keeps the lines it had.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:]) or 0
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def iterate_jsonl(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield ``(line, row)`` of every whole line; a torn or damaged line is passed over."""
    for line in data.splitlines(keepends=True):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and line.endswith(b"\n"):
                yield line, row


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; empty if there is no such file."""
    path = Path(path)
    return [row for _, row in iterate_jsonl(path.read_bytes())] if path.is_file() else []


def take_lock(path: Path) -> int:
    """Lock a file, made if need be, and return its handle; the system frees the lock when the process ends, however it ends.

    Raises:
        TeaError: if another process holds it; the file's folder is what it has in use.
        OSError: the disk's own error.
    """
    import fcntl  # not on Windows, where reading still works

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
                return handle
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            os.close(handle)
            who = f"process {owner}" if owner.isdigit() else "another process"
            raise TeaError(
                f"{path.parent} is in use by {who}; wait for it, or choose another folder with --output"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by its last holder between the opening and the locking


def drop_lock(path: Path, handle: int) -> None:
    """Remove a file that `take_lock` locked, and free the lock."""
    if _is_open_at(handle, path):
        with suppress(OSError):
            path.unlink()
    os.close(handle)


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def disk_errors(action: str, advice: str = "continue with --resume") -> Iterator[None]:
    """Turn an ``OSError`` inside the block into one clear line.

    Raises:
        TeaError: ``could not <action>: <the system's reason>; mend that, then <advice>``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        mend = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise TeaError(f"could not {action}: {reason}{where}; {mend}, then {advice}") from error
