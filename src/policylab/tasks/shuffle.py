"""Shuffles in the same way on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np


def permutation(size: int, *key: int) -> list[int]:
    """The numbers 0 to ``size - 1`` in an order that depends only on the key.

    It sorts raw bits: numpy guarantees that later versions give the same bits, but not the same permutation.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable").tolist()
