"""Main memory: how much there is, and how the C library gives it back to the kernel."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

#: Parameters of glibc's mallopt, by their numbers in malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
#: Blocks up to here come from the heap (glibc allows no more), of which this much may lie free.
LARGEST_ON_HEAP, KEPT = 2**25, 2**30


def keep_freed_memory() -> None:
    """Keeps freed blocks for the next tensor of that size.

    By default each tensor of a few megabytes is new memory from the kernel, which clears it page by page. Without
    glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(TRIM_THRESHOLD, KEPT)


def main_memory() -> int:
    """Bytes of this machine, or of the container that this process may fill."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(pages, int(text)) if text.isdigit() else pages
