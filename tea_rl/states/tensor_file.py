"""Safetensors files written in a stream and read through a memory map.

The library's own writer wants every tensor whole and makes a second copy of all of them; a shard is put together from
many small pieces, so here they go to disk one after the other and are hashed on the way. Any safetensors reader reads
the result.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Safetensors name, NumPy type of the bytes, and the torch type they stand for where NumPy has none.
_TYPES: dict[str, tuple[np.dtype[Any], torch.dtype | None]] = {
    "I64": (np.dtype(np.int64), None),
    "I32": (np.dtype(np.int32), None),
    "F32": (np.dtype(np.float32), None),
    "BF16": (np.dtype(np.uint16), torch.bfloat16),
    "F16": (np.dtype(np.float16), None),
    "I8": (np.dtype(np.int8), None),
    "BOOL": (np.dtype(np.bool_), None),
}
_NAMES = {dtype: name for name, (dtype, _) in _TYPES.items()}
_MOST_HEADER_BYTES = 1 << 20
#: Touching one number maps the pages around it as well; this much, on Linux.
_FAULT_BYTES = 1 << 16
#: Pages of a map are let go once about this much of it was touched.
_MOST_RESIDENT_BYTES = 16 << 20

#: Shards that are mapped at a time; mapping one anew costs about as much as reading a few scattered states.
MOST_MAPPED = 128


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a contiguous array on the CPU; bfloat16 as its bits (uint16)."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """What `to_numpy` took apart; shares memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def write_tensors(path: Path, pieces: Mapping[str, Sequence[np.ndarray]]) -> tuple[int, str]:
    """Write a safetensors file and make it durable; every tensor is the concatenation of its pieces.

    Returns:
        size in bytes and SHA-256 (hex) of the file.

    Raises:
        OSError: the disk's own error; what was written so far is left for the caller to remove.
    """
    # Wide types first: every tensor then starts at a multiple of its item size.
    order = sorted(pieces, key=lambda name: -pieces[name][0].dtype.itemsize)
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        first, rows = pieces[name][0], sum(len(piece) for piece in pieces[name])
        size = sum(piece.nbytes for piece in pieces[name])
        header[name] = {
            "dtype": _NAMES[first.dtype],
            "shape": [rows, *first.shape[1:]],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    sha, total = hashlib.sha256(), 0
    with open(path, "wb") as file:
        arrays = (np.ascontiguousarray(piece) for name in order for piece in pieces[name])
        parts: Iterable[bytes | memoryview] = (array.reshape(-1).view(np.uint8).data for array in arrays)
        for part in chain((len(text).to_bytes(8, "little"), text), parts):
            file.write(part)
            sha.update(part)
            total += len(part)
        file.flush()
        os.fsync(file.fileno())
    return total, sha.hexdigest()


class TensorFile:
    """Arrays of a safetensors file, in a read-only memory map.

    Pages that were read stay in the process's resident set until `release`; the system's cache keeps them either way. The
    map holds a file descriptor until the last array is gone.

    Raises:
        ValueError, KeyError, TypeError: if the file is not what `write_tensors` writes.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._map[:8], "little")
        if length > min(_MOST_HEADER_BYTES, len(self._map) - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(self._map[8 : 8 + length])
        self._arrays: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = _TYPES[entry["dtype"]][0], entry["shape"], entry["data_offsets"]
            count = int(np.prod(shape, dtype=np.int64))
            if end - start != count * dtype.itemsize or 8 + length + end > len(self._map):
                raise ValueError(f"{name} does not fit its shape")
            flat = np.frombuffer(self._map, dtype, count, 8 + length + start)
            self._arrays[name] = flat.reshape(shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def release(self) -> None:
        """Let go of the pages read so far (they stay in the system's cache)."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def gather(self, local: np.ndarray, where: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Copy entries ``local`` of each array in ``out`` to its places ``where``; keeps little of the map resident."""
        if not len(local):
            return
        # Entries that lie side by side, here and there, are copied in one go.
        starts = np.flatnonzero((np.diff(local) != 1) | (np.diff(where) != 1)) + 1
        bounds = [0, *starts.tolist(), len(local)]
        in_runs = len(bounds) * 4 < len(local)
        touched = 0
        for name, target in out.items():
            source = self._arrays[name]
            if source.ndim == 1:  # narrow: the whole array is a few pages
                target[where] = source[local]
                continue
            for start, stop in _pieces(bounds, source[:1].nbytes) if in_runs else _blocks(len(local)):
                if in_runs:
                    first, place, count = int(local[start]), int(where[start]), stop - start
                    target[place : place + count] = source[first : first + count]
                    touched += count * source[:1].nbytes + _FAULT_BYTES
                else:
                    target[where[start:stop]] = source[local[start:stop]]
                    touched += (stop - start) * _FAULT_BYTES
                if touched >= _MOST_RESIDENT_BYTES:  # a release costs as much as copying some hundred states
                    self.release()
                    touched = 0
        self.release()


class ShardFiles:
    """The shards of a store by number, a bounded number of them mapped at a time.

    A process may hold some thousand file descriptors at most, and every map holds one.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self.names = folder, names
        self._open: OrderedDict[int, TensorFile] = OrderedDict()

    def __getitem__(self, number: int) -> TensorFile:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            while len(self._open) >= MOST_MAPPED:
                self._open.popitem(last=False)
            self._open[number] = TensorFile(self._folder / self.names[number])
        return self._open[number]

    def release(self) -> None:
        """Let go of the pages of every mapped file."""
        for file in self._open.values():
            file.release()


def _pieces(bounds: Sequence[int], entry_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs between bounds, the long ones cut so that none touches too much of a map."""
    most = max(1, _MOST_RESIDENT_BYTES // max(1, entry_bytes))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        for first in range(start, stop, most):
            yield first, min(first + most, stop)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Scattered entries, so many at a time that none touches too much of a map."""
    step = _MOST_RESIDENT_BYTES // _FAULT_BYTES
    for start in range(0, count, step):
        yield start, min(start + step, count)
