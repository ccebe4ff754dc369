"""Hides secrets in the files that Hydra writes, and prints a line for each failed job of a multirun."""

from __future__ import annotations

import atexit
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from policylab.cli.messages import one_line
from policylab.runs.find import SWEEP_FILE
from policylab.runs.redaction import redact_file, redact_text, redact_words


class Redacted(Callback):
    """Hides secrets in ``multirun.yaml``, and in Hydra's own folder of a job if ``hydra.output_subdir`` names one.

    Hydra writes these files with secrets. They are rewritten when the first job starts, or at the end of the process if
    no job starts.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before Hydra writes the file of a multirun."""
        atexit.register(tidy, sweep_file(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Called after Hydra has written the files of the multirun and of the job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            redact_file(sweep_file(config))
        if config.hydra.output_subdir is not None:
            folder = Path(config.hydra.runtime.output_dir, config.hydra.output_subdir)
            for file in folder.glob("*.yaml"):
                redact_file(file)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Called before Hydra prints the command of the first failed job; this prints a line for every failed job."""
        job_return.overrides = redact_words(job_return.overrides or [])
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            reason = redact_text(one_line(error) or f"{type(error).__name__}: {error}")
            print(
                f"job {config.hydra.job.num} ({' '.join(job_return.overrides)}) failed: {reason}",
                file=sys.stderr,
            )


def tidy(file: Path) -> None:
    """At the end of a multirun: hides secrets in its file, and removes its folder if it has no job folders."""
    redact_file(file)
    if file.parent.is_dir() and {path.name for path in file.parent.iterdir()} <= {file.name, SWEEP_FILE}:
        shutil.rmtree(file.parent)


def sweep_file(config: DictConfig) -> Path:
    """Hydra's file of a multirun."""
    return Path(config.hydra.sweep.dir).absolute() / "multirun.yaml"
