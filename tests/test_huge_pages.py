"""Memory that is asked for after `use_huge_pages` lies in huge pages, and a process that has decided otherwise is left alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tea_rl import huge_pages

_BLOCK = 16 << 20
#: What the kernel grants at once depends on what it has free.
_ATTEMPTS = 5
#: Prints what was asked for and, once a block of the heap has been written, what is mapped.
_PROGRAM = f"""
import ctypes
from tea_rl.huge_pages import use_huge_pages
asked = use_huge_pages()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
block = libc.malloc({_BLOCK})
ctypes.memset(block, 1, {_BLOCK})
print(asked)
print(open("/proc/self/smaps").read())
"""


def run(**environment: str) -> tuple[int, str]:
    """What the program asked for, and its mappings."""
    clean = {k: v for k, v in os.environ.items() if k not in (*huge_pages._DECIDED, "GLIBC_TUNABLES")}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    asked, smaps = result.stdout.split("\n", maxsplit=1)
    return int(asked), smaps


def mappings(smaps: str) -> list[tuple[int, int, str]]:
    """First address, end and description of what a process has mapped."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]
    ranges = [part.split(maxsplit=1)[0].split("-") for part in parts]
    return [(int(start, 16), int(end, 16), part) for (start, end), part in zip(ranges, parts, strict=True)]


@pytest.mark.skipif(not huge_pages._wanted(), reason="no glibc, or a kernel without huge pages")
def test_the_heap_is_in_huge_pages():
    there = []
    for _ in range(_ATTEMPTS):
        asked, smaps = run()
        assert asked >= huge_pages._ROOM
        parts = [mapping for mapping in mappings(smaps) if "[heap]" in mapping[2]]
        advised = [
            end - start for start, end, part in parts if re.search(r"^VmFlags:.* hg", part, re.MULTILINE)
        ]
        assert sum(advised) >= huge_pages._ROOM - (2 << 20)
        granted = [re.findall(r"^AnonHugePages: +(\d+) kB", part, re.MULTILINE) for *_, part in parts]
        there.append(sum(1024 * int(number) for numbers in granted for number in numbers))
        if there[-1] >= _BLOCK - (2 << 20):
            return
    pytest.fail(f"of {_BLOCK} bytes {there} were in huge pages")


@pytest.mark.skipif(not huge_pages._wanted(), reason="no glibc, or a kernel without huge pages")
def test_a_tensor_is_moved_and_stays_what_it_is():
    tensor = torch.arange(12_000_000)  # 96 MB, a mapping of its own
    before, address = tensor.clone(), tensor.data_ptr()
    huge_pages.move_to_huge_pages(tensor)
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, before)
    mapped = mappings(Path("/proc/self/smaps").read_text())
    inside = [part for start, end, part in mapped if start < address + tensor.nbytes and end > address]
    asked = re.compile(r"^VmFlags:.* hg", re.MULTILINE)
    assert any(asked.search(part) for part in inside)
    huge_pages.move_to_huge_pages(torch.arange(3))  # smaller than a page: nothing to do


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "decided", [{"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}]
)
def test_whoever_has_configured_malloc_is_left_alone(decided):
    asked, _ = run(**decided)
    assert asked == 0


@pytest.mark.parametrize("switch", ["always madvise [never]", None])
def test_without_huge_pages_nothing_is_changed(monkeypatch, tmp_path, switch):
    file = tmp_path / "enabled"
    if switch is not None:
        file.write_text(switch)
    monkeypatch.setattr(huge_pages, "_SWITCH", file)
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda *_, **__: pytest.fail("the C library was asked"))
    assert huge_pages.use_huge_pages() == 0
