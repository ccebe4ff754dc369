"""The files that Hydra writes of a job, without secrets."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from policylab.launch.redaction import redact_file


class Redacted(Callback):
    """Hides secrets in ``multirun.yaml``, and in Hydra's own folder of a job where ``hydra.output_subdir`` names one.

    Hydra writes them as they were given. They are written anew as soon as the first job starts, or at the end of the
    process where none could.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before Hydra writes the file of a multirun."""
        atexit.register(redact_file, sweep_file(config))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """After it, and after it has written those of a job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            redact_file(sweep_file(config))
        if config.hydra.output_subdir is not None:
            folder = Path(config.hydra.runtime.output_dir, config.hydra.output_subdir)
            for file in folder.glob("*.yaml"):
                redact_file(file)


def sweep_file(config: DictConfig) -> Path:
    """Hydra's file of a multirun."""
    return Path(config.hydra.sweep.dir).absolute() / "multirun.yaml"
