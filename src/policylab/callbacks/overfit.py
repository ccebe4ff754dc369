"""A test of the training loop: can it overfit a few prompts?"""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer

from policylab.errors import check_range


class Overfit(Callback):
    """Trains on the first prompts only.

    Args:
        prompts: how many.
    """

    def __init__(self, prompts: int) -> None:
        check_range("callbacks.overfit.prompts", prompts, 1)
        self.prompts = prompts

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Shortens the training data before its loader is created."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.train = data.train[: self.prompts]
