"""Records an iteration while it runs: means over tokens and sequences, and the time of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from policylab.training.means import Means, Total
from policylab.training.metrics import Numbers, means_of, on_host
from policylab.training.run_state import Progress
from policylab.training.runtime import Runtime


class Recorder:
    """Collects the means and times of the current iteration.

    Attributes:
        means: means of the iteration so far.
        added: means that the last `merge` added.
        seconds: time of each phase.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.means = self.added = self._before = Means()
        self.seconds: dict[str, float] = {}

    def add(self, name: str, x: Tensor, mask: Tensor | None = None) -> None:
        """As `Means.add`."""
        self.means.add(name, x, mask)

    @contextmanager
    def aside(self) -> Iterator[Means]:
        """While active, added values go into separate means: for work that may fail, or that does not count."""
        outer, self.means = self.means, Means()
        try:
            yield self.means
        finally:
            self.means = outer

    def merge(self, added: Means) -> None:
        """Adds the means of a piece of work that has succeeded."""
        self._before, self.added = self.means.copy(), added
        self.means.merge(added)

    def undo(self) -> None:
        """Removes what the last `merge` added."""
        self.means = self._before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``perf/<name>_s``."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def totals(self, means: Means) -> dict[str, Total]:
        """Totals over all processes, including names that some of them have not added to."""
        names = set().union(*self.runtime.gather(set(means.names)))
        return means.reduce(self.runtime.all_sum, names)

    def finish(self, metrics: Numbers, started: float, progress: Progress, skipped: int) -> dict[str, float]:
        """Ends the iteration, and counts it.

        Args:
            metrics: those that are not means, and ``tokens`` for the speed.
            started: ``time.perf_counter()`` at the start of the iteration.
            skipped: number of updates that were skipped.

        Returns:
            All metrics of the iteration.
        """
        totals, seconds = self.totals(self.means), self.seconds
        self.means, self.seconds = Means(), {}
        numbers = on_host(metrics)
        generated, elapsed = numbers.pop("tokens"), time.perf_counter() - started
        progress.count(totals)
        counts = {"train/skipped_updates": skipped, "train/tokens": progress.tokens_sampled}
        return {
            **means_of(totals),
            **numbers,
            **{name: float(count) for name, count in counts.items() if count},
            **{f"perf/{name}_s": value for name, value in seconds.items()},
            "perf/tokens_per_s": generated / elapsed,
            "perf/iteration_s": elapsed,
        }

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
