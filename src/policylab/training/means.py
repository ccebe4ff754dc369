"""Metrics as (sum, count) pairs, reduced over all processes once an iteration."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.masks import AllSum

#: Token counters, kept out of the metrics.
SAMPLED, TRAINED = "tokens sampled", "tokens trained"


class Total(NamedTuple):
    """A sum over all processes."""

    sum: float
    values: float  #: how many values were summed


class Means:
    """Collects values and gives their means over micro-batches and processes. Adding values never synchronizes with the
    accelerator; `reduce` does so once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"] | None = None) -> None:
        """Counts every element, or those where ``mask`` is true."""
        x = x.detach().double()
        if mask is None:
            total, count = x.sum(), x.new_full((), x.numel())
        else:
            total, count = x.masked_fill(~mask, 0.0).sum(), mask.sum().double()
        pair = torch.stack([total, count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def copy(self) -> Means:
        """An independent copy."""
        twin = Means()
        twin._sums = dict(self._sums)
        return twin

    def not_finite(self) -> list[str]:
        """Names whose sum is not finite on this process."""
        if not self._sums:
            return []
        finite = torch.stack([pair[0] for pair in self._sums.values()]).isfinite().tolist()
        return [name for name, fine in zip(self._sums, finite, strict=True) if not fine]

    def losses(self) -> list[Float[Tensor, ""]]:
        """Sums of all losses on this process."""
        return [pair[0] for name, pair in self._sums.items() if name.endswith("loss")]

    def merge(self, other: Means) -> None:
        """Counts all that ``other`` has counted."""
        for name, pair in other._sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    @property
    def names(self) -> Set[str]:
        """Names that this process has added to."""
        return self._sums.keys()

    def mean(self, name: str, all_sum: AllSum) -> float:
        """The mean of one metric over all processes; a process need not have added to it. NaN without any value."""
        total, count = all_sum(self._pair(name)).tolist()
        return total / count if count else float("nan")

    def reduce(self, all_sum: AllSum, names: Iterable[str]) -> dict[str, Total]:
        """Sums and counts by name; a name without a single value is left out.

        Args:
            names: all names that some process has added to; must be the same on all processes.
        """
        names = sorted(names)
        if not names:
            return {}
        table = all_sum(torch.stack([self._pair(name) for name in names])).tolist()
        return {name: Total(*pair) for name, pair in zip(names, table, strict=True) if pair[1]}

    def _pair(self, name: str) -> Tensor:
        some = next(iter(self._sums.values()), torch.zeros(2, dtype=torch.double))  # for its device
        return self._sums[name] if name in self._sums else torch.zeros_like(some)
