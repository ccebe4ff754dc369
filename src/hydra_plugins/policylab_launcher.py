"""Hydra's launcher plugin for `policylab.sweeps`. Hydra finds plugins in this namespace; every command imports them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Processes(Launcher):
    """Runs each job of a multirun in its own process, several at once. Settings are in ``configs/hydra/launcher``."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        from policylab.sweeps.sweep import Sweep

        self.sweep = Sweep(config, hydra_context, task_function, **self.settings)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by a sweeper: runs a batch of jobs to its end."""
        return self.sweep.launch(job_overrides)

    def each(self, job_overrides: Iterable[Sequence[str]]) -> Iterator[JobReturn]:
        """For a sweeper that chooses jobs by earlier results: takes the next job when there is room for it, and yields
        each as soon as it has ended."""
        return self.sweep.each(job_overrides)
