"""What Hydra writes of a job, without secrets."""

from __future__ import annotations

import atexit
import shutil
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from policylab.runs.redaction import redact_file, redact_words


class Redacted(Callback):
    """Hides secrets in ``multirun.yaml``, and in Hydra's own folder of a job where ``hydra.output_subdir`` names one.

    Hydra writes them as they were given. They are written anew as soon as the first job starts, or at the end of the
    process where none could.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before Hydra writes the file of a multirun."""
        atexit.register(tidy, sweep_file(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """After it, and after it has written those of a job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            redact_file(sweep_file(config))
        if config.hydra.output_subdir is not None:
            folder = Path(config.hydra.runtime.output_dir, config.hydra.output_subdir)
            for file in folder.glob("*.yaml"):
                redact_file(file)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Before Hydra names the command of a job that has failed."""
        job_return.overrides = redact_words(job_return.overrides or [])


def tidy(file: Path) -> None:
    """At the end of a multirun: its file without secrets, and no folder where no job has left one."""
    redact_file(file)
    if file.is_file() and list(file.parent.iterdir()) == [file]:
        shutil.rmtree(file.parent)


def sweep_file(config: DictConfig) -> Path:
    """Hydra's file of a multirun."""
    return Path(config.hydra.sweep.dir).absolute() / "multirun.yaml"
