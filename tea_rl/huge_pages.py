"""Room on the heap in huge pages, for a process that reads all of its weights for every token.

Where the kernel gives huge pages only on request (``madvise``, the default of many distributions), a model of 300 MB lies in 80,000
pages of 4 KB, and finding them cost a rollout a tenth of its time on the virtual machine that it was measured on. glibc's own switch
(``glibc.malloc.hugetlb``) also asks for large blocks that live for one operation, which must then be cleared two megabytes at a time;
``generate`` of transformers ran slower with it. So only the heap is asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Addresses, not memory: what nobody writes to is never there.
_ROOM = 1 << 30
#: From here on glibc maps a block by itself and gives it back when freed; the most to which it raises that limit by itself.
_OWN_MAPPING = 32 << 20
#: How much more the heap takes at once when the room is used up.
_MORE = 1 << 26
#: Numbers of ``mallopt`` (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1
#: Advice to put existing memory into huge pages now (Linux 6.1; `mmap` does not know it).
_COLLAPSE = 25
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
#: Whoever sets one of these has decided about memory already, or has another allocator.
_DECIDED = ("LD_PRELOAD", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def use_huge_pages() -> int:
    """Make room on the C heap of this process and ask the kernel for huge pages there; call it before models are loaded.

    Linux with glibc only. Elsewhere, where the kernel never gives huge pages, and where the environment configures malloc (or
    preloads another), nothing is changed.

    Returns:
        Bytes for which huge pages were asked; 0 if nothing was changed.
    """
    if not _wanted():
        return 0
    libc = _c_library()
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # Setting one of them ends glibc's own adjusting of all. The heap must never shrink: what is added to it later is not asked for.
    libc.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_TOP_PAD, _ROOM)
    libc.free(libc.malloc(_OWN_MAPPING // 2))  # grows the heap by the room as well
    libc.mallopt(_TOP_PAD, _MORE)
    asked = 0
    for start, end in _heap():
        first, length = _whole_pages(start, end)
        if length and libc.madvise(first, length, mmap.MADV_HUGEPAGE) == 0:
            asked += length
    return asked


def move_to_huge_pages(tensor: Tensor) -> None:
    """Put a large tensor that is there already into huge pages, for rows of it that are read here and there; what cannot be is left.

    Args:
        tensor: contiguous, on a CPU. Its address and its numbers stay.
    """
    if not _wanted():
        return
    first, length = _whole_pages(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    if length:
        libc = _c_library()
        libc.madvise(first, length, mmap.MADV_HUGEPAGE)
        libc.madvise(first, length, _COLLAPSE)  # an older kernel refuses


def _c_library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    """Where the first huge page between two addresses begins, and how many bytes the whole ones have."""
    size = int(_SIZE.read_text())
    first = -(-start // size) * size
    return first, max(0, end // size * size - first)


def _wanted() -> bool:
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _DECIDED):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        return "[never]" not in _SWITCH.read_text() and _SIZE.exists()
    except OSError:
        return False


def _heap() -> list[tuple[int, int]]:
    """First address and end of every part of the heap."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
