"""One way to shuffle, the same on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np


def permutation(size: int, *key: int) -> list[int]:
    """The numbers 0 to ``size - 1`` in an order that is a pure function of the key.

    Sorts raw bits instead of asking numpy for a permutation: numpy promises that the bits of a generator stay
    the same in later versions, but not what is made of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable").tolist()
