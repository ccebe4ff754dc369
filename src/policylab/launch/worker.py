"""One process of a group that the launcher has started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from omegaconf import DictConfig, OmegaConf

from policylab.cli.logs import escape_unprintable
from policylab.distributed.signals import AGAIN, PASSED_ON, SIGNALS, Interrupted, end_with, stop_at_once
from policylab.errors import RunError, UserError
from policylab.launch.failures import read_error, write_error
from policylab.runs.saved_config import learn_secrets

Train = Callable[..., float | None]

#: A file beside those with errors: processes that start later exit at once.
STOP = "stop"


@dataclass(frozen=True)
class Job:
    """What the launcher passes to each process."""

    train: Train
    config: str  #: settled; resolved except for references to the environment; as YAML
    logging: str  #: Hydra's ``job_logging``, resolved, as YAML
    run_dir: str
    overrides: list[str]
    errors: str  #: folder to which a failed process writes its error
    launcher: int  #: process id


@dataclass(frozen=True)
class Outcome:
    """How a process ended without an error."""

    value: float | None = None  #: what ``train`` returned
    signum: int | None = None  #: the signal that ended it
    cannot_recover: bool = False  #: restarted after an error that a restart cannot fix


def work(job: Job) -> Outcome:
    """Trains as one process of the group, with the config that the launcher has settled."""
    from hydra.core.utils import configure_log

    escape_unprintable()
    end_with(job.launcher, signal.SIGKILL)
    end_on_sigterm_of(job.launcher)
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    try:
        signal.signal(PASSED_ON, stop_at_once)
        if (Path(job.errors) / STOP).exists():  # the signal came before the handler was set
            raise Interrupted(PASSED_ON)
        if isinstance(read_error(Path(job.errors)), UserError | RunError):
            return Outcome(cannot_recover=True)
        configure_log(from_yaml(job.logging))
        config = from_yaml(job.config)
        learn_secrets(config)
        return Outcome(job.train(config, Path(job.run_dir), job.overrides, signals=[PASSED_ON]))
    except Interrupted as stopped:
        if stopped.together:
            return Outcome(signum=stopped.signum)
        sys.exit(AGAIN)  # other processes may wait for this one; the launcher ends them
    except Exception as error:
        write_error(error, Path(job.errors))
        raise


def from_yaml(text: str) -> DictConfig:
    """A config from its YAML."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def end_on_sigterm_of(launcher: int) -> None:
    """Exits at once on SIGTERM from torch's launcher, which sends it when another process has failed.

    SIGTERM from another sender is ignored, because the launcher gets it too. On systems other than Linux the sender is
    unknown, and any SIGTERM ends the process.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # new threads inherit it

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != launcher:
            pass
        os._exit(1)

    Thread(target=listen, daemon=True).start()
