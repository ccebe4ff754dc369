"""Hydra's own files of a job without secrets, and a line for each job of a multirun that fails."""

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
from policylab.runs.redaction import redact_file, redact_text, redact_words


class Redacted(Callback):
    """Hides secrets in ``multirun.yaml``, and in Hydra's own folder of a job where ``hydra.output_subdir`` names one.

    Hydra writes them with secrets. They are rewritten when the first job starts, or at the end of the process if none
    does.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before Hydra writes the file of a multirun."""
        atexit.register(tidy, sweep_file(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """After it, and after Hydra has written the files of a job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            redact_file(sweep_file(config))
        if config.hydra.output_subdir is not None:
            folder = Path(config.hydra.runtime.output_dir, config.hydra.output_subdir)
            for file in folder.glob("*.yaml"):
                redact_file(file)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Before Hydra prints the command of the first job that failed; those after it would go unnamed."""
        job_return.overrides = redact_words(job_return.overrides or [])
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            reason = redact_text(one_line(error) or f"{type(error).__name__}: {error}")
            print(
                f"job {config.hydra.job.num} ({' '.join(job_return.overrides)}) failed: {reason}",
                file=sys.stderr,
            )


def tidy(file: Path) -> None:
    """At the end of a multirun: hides secrets in its file, and removes its folder if no job has left one there."""
    redact_file(file)
    if file.is_file() and list(file.parent.iterdir()) == [file]:
        shutil.rmtree(file.parent)


def sweep_file(config: DictConfig) -> Path:
    """Hydra's file of a multirun."""
    return Path(config.hydra.sweep.dir).absolute() / "multirun.yaml"
