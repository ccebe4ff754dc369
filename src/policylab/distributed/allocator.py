"""Main memory: its size, and how malloc returns it to the kernel."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

#: Parameter numbers of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
#: Blocks up to this size come from the heap (glibc allows no more), and this many free bytes stay in it.
LARGEST_ON_HEAP, KEPT = 2**25, 2**30


def keep_freed_memory() -> None:
    """Makes malloc keep freed blocks for later tensors; does nothing without glibc.

    By default malloc requests new memory from the kernel for each tensor of a few megabytes, and the kernel zeroes it
    page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(TRIM_THRESHOLD, KEPT)


def main_memory() -> int:
    """Bytes of main memory of this machine, or of the container if that has less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(pages, int(text)) if text.isdigit() else pages
