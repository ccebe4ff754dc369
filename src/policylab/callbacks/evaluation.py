"""Shows the progress and the remaining time of an evaluation."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, Trainer

from policylab.callbacks.tables import console
from policylab.runs.figures import duration


class EvaluationProgress(Callback):
    """Prints a line every few seconds.

    Args:
        seconds: seconds between two lines; a shorter evaluation prints none.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = self.last_line = 0.0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Records the start time, after the preflight."""
        self.began = self.last_line = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the number of finished prompts and the expected time of the others."""
        validator, now = pl_module.validator, time.monotonic()
        done, total = len(validator.samples) // validator.completions, len(validator.prompts)
        if done < total and now - self.last_line >= self.seconds:
            self.last_line = now
            left = (now - self.began) / done * (total - done)
            console().print(f"{done} of {total} prompts, about {duration(left)} left", style="dim")
