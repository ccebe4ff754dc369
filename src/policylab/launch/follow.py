"""Keeps ``status.json`` and ``logs/latest`` up to date during training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from policylab.runs.find import LATEST
from policylab.runs.folder import point_latest
from policylab.runs.status import RunStatus
from policylab.runs.writing import BackgroundWriter


class FollowStatus(Callback):
    """Writes the iteration and the tokens sampled into ``status.json``."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes them after each iteration."""
        if trainer.is_global_zero:
            self.status.write(iteration=pl_module.iteration, tokens_sampled=pl_module.progress.tokens_sampled)


class BecomeLatest(Callback):
    """Points ``logs/latest`` at a run as soon as its first checkpoint is written, so that `latest` can be evaluated.

    Place it after the checkpoint callback: writes are queued in that order.
    """

    def __init__(self, run_dir: Path, logs: Path) -> None:
        self.run_dir = run_dir
        self.logs = logs

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Queues the link after the first checkpoint."""
        writer = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and isinstance(writer, BackgroundWriter):
            writer.submit(self.logs / LATEST, partial(point_latest, self.run_dir, self.logs))
