"""A job on several processes of this machine: torch's elastic launcher, inside the Hydra job.

Hydra composes the config once, in the launcher; each process gets the settled config and the run folder, and calls the
same ``train``. So each job of a multirun has one folder, and leaves nothing behind for the next one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.distributed.machine import cores
from policylab.distributed.signals import PASSED_ON, SIGNALS, Interrupted, can_listen
from policylab.launch.failures import first_error, read_error
from policylab.launch.worker import STOP, Job, Outcome, Train, work
from policylab.runs.saved_config import self_contained
from policylab.runs.status import FAILED, INTERRUPTED, finish_status, now

log = logging.getLogger(__name__)

#: Seconds that the other processes get to end by themselves after one has failed.
GRACE = 3


def launch(
    train: Train, config: DictConfig, job_logging: Any, run_dir: Path, overrides: list[str]
) -> float | None:
    """Runs ``train(config, run_dir, overrides, signals=...)`` on ``hardware.devices`` processes.

    Returns:
        What rank 0 returns.

    Raises:
        UserError: bad input that a process reports.
        ProcessFailed: with the traceback of the process that failed first.
        Interrupted: after a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the failure is reported below, once
    devices = int(config.hardware.devices)
    if config.hardware.accelerator == "cpu" and devices > cores():
        log.warning("hardware.devices=%d on %d cores: %d would be faster", devices, cores(), cores())
    with (
        tempfile.TemporaryDirectory(prefix="policylab_") as errors,
        environment(config),
        SignalForwarder(Path(errors) / STOP) as forwarder,
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
            signals_to_handle=PASSED_ON.name,  # never sent to this process: torch must not handle our signals
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
            if forwarder.signum is not None:
                finish_status(run_dir, began, INTERRUPTED)
                raise Interrupted(forwarder.signum) from None
            error = first_error(Path(errors), failed.failures, run_dir)
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            finish_status(run_dir, began, FAILED, reason)
            raise error from None
        except KeyboardInterrupt:
            finish_status(run_dir, began, INTERRUPTED)
            raise
        outcome = outcomes[0]
        if outcome.signum is not None:
            raise Interrupted(forwarder.signum or outcome.signum)
        if outcome.cannot_recover and (error_before := read_error(Path(errors))) is not None:
            raise error_before
        return outcome.value


class SignalForwarder:
    """Forwards signals to the processes: the first asks them to stop after the iteration, the second ends them.

    A context manager that restores the earlier handlers, also the one that torch's launcher replaces.

    Args:
        marker: file to create after a signal; processes that start later then exit at once.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self.signum: int | None = None  #: the signal, if one came
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> SignalForwarder:
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
        self.marker.touch()
        if at_once:
            raise Interrupted(signum)
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, PASSED_ON)


@contextmanager
def environment(config: DictConfig) -> Iterator[None]:
    """Sets environment variables for the processes, and restores the earlier ones.

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
