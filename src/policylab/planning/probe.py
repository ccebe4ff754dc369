"""Measures the speed of this machine, in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from policylab.functional.products import linear
from policylab.planning.work import Rates

SECONDS = 0.5
#: Rows and columns of the matrices that are multiplied; much larger ones are not faster.
SIDE = 1024
GPU_SIDE = 8192
#: Bytes per copy, more than any cache holds.
COPIED = 2**28


def probe(gpu: bool, dtype: torch.dtype) -> Rates:
    """Rates of one process: products of large matrices, and copies."""
    device = torch.device("cuda" if gpu else "cpu")
    side = GPU_SIDE if gpu else SIDE
    a = torch.ones(side, side, dtype=dtype, device=device)
    block = torch.ones(COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    product = repeated(lambda: linear(a, a, None), device)  # by the library that training uses
    copy = repeated(lambda: other.copy_(block), device)
    return Rates(flops=2 * side**3 / product, bandwidth=2 * COPIED / copy)


def repeated(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the minimum over half a second, so that other load on the machine matters less."""
    call()  # the first call is slower
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
