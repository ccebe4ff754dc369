"""Shows training on the console: a progress bar in a terminal, single lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lightning import Callback, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from policylab.callbacks.tables import console
from policylab.errors import counted
from policylab.runs.figures import duration, headlines, number


class Console(Callback):
    """Shows the iterations and validations of a run.

    Args:
        show: metrics beside the bar; metrics that a run does not have are left out.
        plain_seconds: outside a terminal, seconds between two lines, ...
        plain_lines: ... and about how many lines the whole run prints.
    """

    def __init__(self, show: Sequence[str], plain_seconds: float, plain_lines: int) -> None:
        self.show = list(show)
        self.plain_seconds = plain_seconds
        self.plain_lines = plain_lines
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.last_line = 0.0
        self.expected_told = False

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Announces the validation before training, which takes a while."""
        if not trainer.sanity_checking and pl_module.iteration == 0 and trainer.is_global_zero:
            console().print("validating before training ...", style="dim")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints one line for each validation."""
        if trainer.is_global_zero:
            when = "before training" if pl_module.iteration == 0 else f"iteration {pl_module.iteration}"
            metrics = pl_module.val_metrics
            shown = "  ".join(
                f"{name.removeprefix('val/')} {number(metrics[name])}" for name in headlines(metrics)
            )
            count = counted(round(metrics["val/prompts"]), "prompt")
            line = Text.assemble(("validation", "bold"), f" {when} ({count}):  {shown}")
            console().print(line, soft_wrap=True)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Sets up the bar."""
        self.last_line = time.monotonic()
        if not trainer.is_global_zero or not console().is_terminal or console().quiet:
            return
        self.progress = Progress(
            TextColumn("iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console(),
            expand=True,
        )
        total, done = pl_module.progress.last_iteration, pl_module.iteration
        self.task = self.progress.add_task("", total=total, completed=done, metrics="")
        self.progress.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prints the expected time, once it is known."""
        if not self.expected_told and pl_module.expected_seconds is not None and trainer.is_global_zero:
            left = pl_module.progress.last_iteration - pl_module.iteration
            about = "about " if pl_module.progress.last_iteration < pl_module.progress.iterations else ""
            console().print(
                f"expected time: {duration(pl_module.expected_seconds)} for {about}{counted(left, 'iteration')}"
            )
        self.expected_told = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the bar, or prints a line."""
        if not trainer.is_global_zero:
            return
        metrics = "  ".join(
            f"{name.split('/', 1)[1].replace('_per_s', '/s')} {number(pl_module.metrics[name])}"
            for name in self.show
            if name in pl_module.metrics
        )
        done, last = pl_module.iteration, pl_module.progress.last_iteration
        if self.progress is not None:
            self.progress.update(self.task, completed=done, total=last, metrics=metrics)
        if self._line_is_due(done, last):
            self.last_line = time.monotonic()
            # with a budget of tokens, the last iteration is an estimate
            about = "~" if done < last < pl_module.progress.iterations else ""
            # under a bar, for the log only
            show = console().print if self.progress is None else console().note
            show(f"iteration {done}/{about}{last}  {metrics}", soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Removes the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Removes the bar."""
        self._stop()

    def _line_is_due(self, iteration: int, iterations: int) -> bool:
        step = max(1, iterations // self.plain_lines)
        waited = time.monotonic() - self.last_line >= self.plain_seconds
        return waited or iteration % step == 0 or iteration in (1, iterations)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
