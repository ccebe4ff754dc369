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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.cli.logs import escape_unprintable
from policylab.cli.messages import is_mistake, one_line
from policylab.distributed.machine import cores
from policylab.distributed.signals import AGAIN, PASSED_ON, SIGNALS, Interrupted, can_listen, stop_at_once
from policylab.distributed.world import world
from policylab.errors import ProcessFailed, RunError, UserError
from policylab.runs.saved_config import self_contained
from policylab.runs.status import FAILED, INTERRUPTED, finish_status, now

log = logging.getLogger(__name__)

Train = Callable[..., float | None]

PR_SET_PDEATHSIG = 1  # of Linux' prctl
#: Seconds in which the processes that are left when one has failed may end by themselves.
GRACE = 3
#: A file beside those with reasons of failure: whoever is started now need not begin.
STOP = "stop"


@dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    train: Train
    config: str  #: resolved but for what stands in the environment, as YAML
    logging: str  #: Hydra's ``job_logging``, resolved, as YAML
    run_dir: str
    overrides: list[str]
    errors: str  #: folder in which a process that fails leaves its reason
    launcher: int  #: its process


def launch(
    train: Train, config: DictConfig, job_logging: Any, run_dir: Path, overrides: list[str]
) -> float | None:
    """Runs ``train(config, run_dir, overrides, signals=...)`` on ``hardware.devices`` processes.

    Returns:
        What rank 0 returns.

    Raises:
        UserError: what a process says of bad input.
        ProcessFailed: with the traceback of the process that failed first.
        Interrupted: after a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told below, once
    devices = int(config.hardware.devices)
    if config.hardware.accelerator == "cpu" and devices > cores():
        log.warning("hardware.devices=%d on %d cores: %d would be faster", devices, cores(), cores())
    with (
        tempfile.TemporaryDirectory(prefix="policylab_") as errors,
        environment(config),
        Forward(Path(errors) / STOP) as forward,
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
            signals_to_handle=PASSED_ON.name,  # never comes here; the others are ours, or none of torch's business
            shutdown_timeout=GRACE,
        )
        job = Job(
            train=train,
            config=OmegaConf.to_yaml(OmegaConf.create(self_contained(config))),
            logging=OmegaConf.to_yaml(job_logging, resolve=True),
            run_dir=str(run_dir),
            overrides=overrides,
            errors=errors,
            launcher=os.getpid(),
        )
        began = now()
        try:
            outcomes: dict[int, Outcome] = elastic_launch(spec, work)(job)
        except ChildFailedError as failed:
            if forward.signum is not None:
                finish_status(run_dir, began, INTERRUPTED)
                raise Interrupted(forward.signum) from None
            error = first_error(Path(errors), failed.failures)
            finish_status(
                run_dir, began, FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            )
            raise error from None
        except KeyboardInterrupt:
            finish_status(run_dir, began, INTERRUPTED)
            raise
        outcome = outcomes[0]
        if outcome.signum is not None:
            raise Interrupted(forward.signum or outcome.signum)
        if outcome.useless and (noted := noted_error(Path(errors))) is not None:
            raise noted
        return outcome.value


@dataclass(frozen=True)
class Outcome:
    """How a process ended that did not fail."""

    value: float | None = None  #: what ``train`` returned
    signum: int | None = None  #: the signal that ended it
    useless: bool = False  #: started again after an error that would only come again


def work(job: Job) -> Outcome:
    """One process of the group."""
    from hydra.core.utils import configure_log

    escape_unprintable()
    end_with(job.launcher)
    end_at_word_of(job.launcher)
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    try:
        signal.signal(PASSED_ON, stop_at_once)
        if (Path(job.errors) / STOP).exists():  # it came before we listened
            raise Interrupted(PASSED_ON)
        if isinstance(noted_error(Path(job.errors)), UserError | RunError):
            return Outcome(useless=True)
        configure_log(read(job.logging))
        return Outcome(job.train(read(job.config), Path(job.run_dir), job.overrides, signals=[PASSED_ON]))
    except Interrupted as stopped:
        if stopped.together:
            return Outcome(signum=stopped.signum)
        sys.exit(AGAIN)  # the others may be waiting for this one: the launcher ends them
    except Exception as error:
        note_error(error, Path(job.errors))
        raise


def read(text: str) -> DictConfig:
    """A config from its YAML."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def end_with(launcher: int) -> None:
    """Has the system end this process when the launcher is no more, even by ``kill -9``. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it is no more already
            os.kill(os.getpid(), signal.SIGKILL)


def end_at_word_of(launcher: int) -> None:
    """SIGTERM ends this process at once, wherever it is, if torch's launcher sends it: another process has failed.

    From anybody else it does nothing, as the launcher hears it too. Elsewhere than on Linux it has no sender, and ends
    the process.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # also in all threads to come

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != launcher:
            pass
        os._exit(1)

    Thread(target=listen, daemon=True).start()


def note_error(error: Exception, folder: Path) -> None:
    """Leaves the reason of a failure for the launcher."""
    here = world()
    content = {
        "time": time.time(),
        "rank": here.rank,
        "restarts": here.restarts,
        "message": one_line(error),
        "mistake": is_mistake(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    (folder / f"{here.restarts}_{here.rank}.json").write_text(json.dumps(content), encoding="utf-8")


def first_error(folder: Path, failures: dict[int, Any]) -> Exception:
    """What went wrong first: what follows on the other ranks is that nobody answers them any more.

    Args:
        failures: torch's ``ProcessFailure`` by rank.
    """
    rank, failure = next(iter(failures.items()))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return ProcessFailed(f"the process of rank {rank} was ended by {name}{memory}")
    return noted_error(folder) or ProcessFailed(
        f"the process of rank {rank} ended with code {failure.exitcode} and said nothing"
    )


def noted_error(folder: Path) -> Exception | None:
    """The first error of the last group of processes that has noted any."""
    noted = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    if not noted:
        return None
    last = max(note["restarts"] for note in noted)
    first = min((note for note in noted if note["restarts"] == last), key=lambda note: note["time"])
    if first["message"] is not None:
        return (UserError if first["mistake"] else RunError)(first["message"])
    return ProcessFailed(f"on rank {first['rank']}:\n{first['traceback']}")


class Forward:
    """Passes signals on to the processes: the first asks them to stop after the iteration, the second ends them.

    A context manager; the handlers that were there come back, also the one that torch's launcher replaces.

    Args:
        note: a file to make, for processes that are started later.
    """

    def __init__(self, note: Path) -> None:
        self.note = note
        self.signum: int | None = None  #: the signal, if one came
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Forward:
        if can_listen():
            self.previous = {number: signal.getsignal(number) for number in (*SIGNALS, PASSED_ON)}
            for number in SIGNALS:
                signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        processes = multiprocessing.active_children()
        at_once = self.signum is not None or not processes
        self.signum = signum
        self.note.touch()
        if at_once:
            raise Interrupted(signum)
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, PASSED_ON)


@contextmanager
def environment(config: DictConfig) -> Iterator[None]:
    """What the processes find in their environment; afterwards it is as it was.

    Processes that compute on the CPU share its cores.
    """
    before = dict(os.environ)
    if config.hardware.accelerator == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(config.hardware.devices))))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
