"""A job on several processes of this machine: torch's elastic launcher, from inside the Hydra job.

Hydra composes once, here; each process gets the config as it stands and the folder, and calls the same ``train``. So a
multirun has one folder a job, and nothing is left behind for the next one.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.errors import ProcessFailed, UserError
from policylab.launch.messages import one_line
from policylab.launch.signals import ASK, Interrupted, can_listen
from policylab.launch.status import FAILED, INTERRUPTED, finish_status
from policylab.launch.world import world

PR_SET_PDEATHSIG = 1  # of Linux' prctl
#: Seconds between a polite and an impolite end of the processes that are left when one has failed.
GRACE = 5


@dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    config: str  #: resolved, as YAML
    logging: str  #: Hydra's ``job_logging``, resolved, as YAML
    run_dir: str
    overrides: list[str]
    errors: str  #: folder in which a process that fails leaves its reason


def launch(config: DictConfig, job_logging: Any, run_dir: Path, overrides: list[str]) -> float | None:
    """Runs ``train`` on ``hardware.devices`` processes.

    Returns:
        What rank 0 returns.

    Raises:
        UserError: what a process says of bad input.
        ProcessFailed: with the traceback of the process that failed first.
        Interrupted: after a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is told below, once
    devices = int(config.hardware.devices)
    with (
        tempfile.TemporaryDirectory(prefix="policylab_") as errors,
        environment(config),
        Forward() as forward,
    ):
        spec = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=config.hardware.max_restarts,
            signals_to_handle="SIGHUP",  # the others are ours, see Forward
            shutdown_timeout=GRACE,
        )
        job = Job(
            config=OmegaConf.to_yaml(config, resolve=True),
            logging=OmegaConf.to_yaml(job_logging, resolve=True),
            run_dir=str(run_dir),
            overrides=overrides,
            errors=errors,
        )
        try:
            outcomes: dict[int, Outcome] = elastic_launch(spec, work)(job)
        except ChildFailedError as failed:
            if forward.signum is not None:
                finish_status(run_dir, INTERRUPTED)
                raise Interrupted(forward.signum) from None
            error = first_error(Path(errors), failed.failures)
            finish_status(run_dir, FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            raise error from None
        except KeyboardInterrupt:
            finish_status(run_dir, INTERRUPTED)
            raise
    outcome = outcomes[0]
    if outcome.signum is not None:
        raise Interrupted(forward.signum or outcome.signum)
    return outcome.value


@dataclass(frozen=True)
class Outcome:
    """How a process ended that did not fail."""

    value: float | None = None  #: what ``train`` returned
    signum: int | None = None  #: the signal that ended it


def work(job: Job) -> Outcome:
    """One process of the group."""
    from hydra.core.utils import configure_log

    from policylab.launch.run import train

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher passes it on
    end_with_parent()
    configure_log(read(job.logging))
    try:
        # SIGTERM is what torch's launcher sends when another process has failed: it ends this one at once.
        return Outcome(train(read(job.config), Path(job.run_dir), job.overrides, signals=[ASK]))
    except Interrupted as stopped:
        return Outcome(signum=stopped.signum)
    except Exception as error:
        note_error(error, Path(job.errors))
        raise


def read(text: str) -> DictConfig:
    """A config from its YAML."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def end_with_parent() -> None:
    """Has the system end this process when the launcher is no more, even by ``kill -9``. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it is no more already
            os.kill(os.getpid(), signal.SIGKILL)


def note_error(error: Exception, folder: Path) -> None:
    """Leaves the reason of a failure for the launcher."""
    rank = world().rank
    content = {
        "time": time.time(),
        "rank": rank,
        "bad_input": one_line(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    (folder / f"{world().restarts}_{rank}.json").write_text(json.dumps(content))


def first_error(folder: Path, failures: dict[int, Any]) -> Exception:
    """What went wrong first: what follows on the other ranks is that nobody answers them any more.

    Args:
        failures: torch's ``ProcessFailure`` by rank.
    """
    for rank, failure in failures.items():
        if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, ASK):
            name = signal.Signals(-failure.exitcode).name
            memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return ProcessFailed(f"the process of rank {rank} was ended by {name}{memory}")
    noted = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not noted:
        rank, failure = next(iter(failures.items()))
        return ProcessFailed(
            f"the process of rank {rank} ended with code {failure.exitcode} and said nothing"
        )
    first = min(noted, key=lambda note: note["time"])
    if first["bad_input"] is not None:
        return UserError(first["bad_input"])
    return ProcessFailed(f"on rank {first['rank']}:\n{first['traceback']}")


class Forward:
    """Passes signals on to the processes: the first asks them to stop after the iteration, the second ends them.

    A context manager; the handlers that were there come back, also those that torch's launcher replaces.
    """

    def __init__(self) -> None:
        self.signum: int | None = None  #: the signal, if one came
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Forward:
        for number in (signal.SIGTERM, signal.SIGINT, ASK, signal.SIGHUP):
            self.previous[number] = signal.getsignal(number)
        if can_listen():
            for number in (signal.SIGTERM, signal.SIGINT, ASK):
                signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        if can_listen():
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        processes = multiprocessing.active_children()
        at_once = self.signum is not None or not processes
        self.signum = signum
        if at_once:
            raise Interrupted(signum)
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, ASK)


@contextmanager
def environment(config: DictConfig) -> Iterator[None]:
    """What the processes find in their environment; afterwards it is as it was.

    Processes that compute on the CPU share its cores.
    """
    before = dict(os.environ)
    if config.hardware.accelerator == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(config.hardware.devices))))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
