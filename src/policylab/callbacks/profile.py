"""Profiles iterations with torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from policylab.callbacks.tables import console
from policylab.errors import UserError, counted
from policylab.user_code import short_path


class Profile(Callback):
    """Profiles some iterations; writes ``profile/operators.txt`` and ``profile/trace.json`` (chrome://tracing).

    Args:
        run_dir: folder of the run.
        skip: warm-up iterations before the profile.
        iterations: iterations to profile.
        rows: operators in the table.
    """

    def __init__(self, run_dir: str, skip: int, iterations: int, rows: int) -> None:
        self.folder = Path(run_dir) / "profile"
        self.skip = skip
        self.iterations = iterations
        self.rows = rows
        self.profiler: torch.profiler.profile | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses a run that is shorter than the profile."""
        if pl_module.progress.iterations < self.skip + self.iterations:
            raise UserError(
                f"callbacks.profile skips {counted(self.skip, 'iteration')} and profiles {self.iterations}, but the "
                f"run has {pl_module.progress.iterations}; give iterations={self.skip + self.iterations} or more"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts after the warm-up."""
        if batch_idx == self.skip:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops, and writes the profile."""
        if self.profiler is None or batch_idx + 1 < self.skip + self.iterations:
            return
        self.profiler.stop()
        self.folder.mkdir(exist_ok=True)
        order = "self_cuda_time_total" if pl_module.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=order, row_limit=self.rows)
        (self.folder / "operators.txt").write_text(table, encoding="utf-8")
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        self.profiler = None
        console().print(f"profile of {counted(self.iterations, 'iteration')}: {short_path(self.folder)}")
