"""How the C library gives memory back to the kernel."""

from __future__ import annotations

import ctypes
import sys

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
