"""Metrics as (sum, count) pairs, reduced over all processes once an iteration."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.masks import AllSum


class Means:
    """Collects values; gives their means over micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"] | None = None) -> None:
        """Counts every element, or those where ``mask`` is true."""
        x = x.detach().double()
        if mask is not None:
            x = x[mask]
        pair = torch.stack([x.sum(), torch.tensor(float(x.numel()), dtype=torch.double, device=x.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def copy(self) -> Means:
        """As it is now."""
        twin = Means()
        twin._sums = dict(self._sums)
        return twin

    def not_finite(self) -> list[str]:
        """Names of what came to a NaN or an infinity on this process."""
        if not self._sums:
            return []
        finite = torch.stack([pair[0].to(self._device) for pair in self._sums.values()]).isfinite().tolist()
        return [name for name, fine in zip(self._sums, finite, strict=True) if not fine]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._sums.values())).device

    def merge(self, other: Means) -> None:
        """Counts all that ``other`` has counted."""
        for name, pair in other._sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    @property
    def names(self) -> Set[str]:
        """Of what this process has counted."""
        return self._sums.keys()

    def mean(self, name: str, all_sum: AllSum) -> float:
        """The mean of one name over all processes, some of which may not have added to it; NaN without a value."""
        total, count = all_sum(self._pair(name)).tolist()
        return total / count if count else float("nan")

    def reduce(self, all_sum: AllSum, names: Iterable[str]) -> dict[str, float]:
        """Means by name; a name without a single value is left out.

        Args:
            names: of what any process has counted, the same on all.
        """
        names = sorted(names)
        if not names:
            return {}
        table = all_sum(torch.stack([self._pair(name).cpu() for name in names])).tolist()
        return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}

    def _pair(self, name: str) -> Tensor:
        return self._sums.get(name, torch.zeros(2, dtype=torch.double))
