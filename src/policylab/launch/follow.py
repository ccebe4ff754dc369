"""Tells the status of a run how far it is."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer

from policylab.launch.status import RunStatus


class FollowStatus(Callback):
    """Writes the iteration and the tokens sampled into ``status.json``."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One iteration further."""
        if trainer.is_global_zero:
            self.status.write(iteration=pl_module.iteration, tokens_sampled=pl_module.tokens_sampled)
