"""Jobs of a sweep on a cluster, by submitit: each is a SLURM job, which is requeued at its time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from policylab.distributed.signals import AGAIN, SWEEP
from policylab.errors import UserError
from policylab.runs.status import INTERRUPTED, read_status
from policylab.sweeps.jobs import Job
from policylab.sweeps.process import JobLog, JobProcess

#: Most times that a job is requeued at its time limit.
REQUEUES = 1000
#: Seconds between two checks of a process.
LOOK = 0.5
#: Folder of submitit's own files, in that of the sweep.
FOLDER = ".submitit"
#: submitit's class of a job, for each cluster.
HANDLES = {"slurm": "SlurmJob", "local": "LocalJob"}


def submitit() -> Any:
    """The library.

    Raises:
        UserError: when it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError('hydra.launcher.cluster needs submitit; pip install -e ".[slurm]"') from None
    return submitit


class Task:
    """Runs ``train.py`` in each task of a cluster job. The output of rank 0 goes to the job's ``train.log``.

    Args:
        command: arguments of the command line.
        environment: variables in addition to those of the cluster.
    """

    def __init__(self, job: Job, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.job = job
        self.command = list(command)
        self.variables = dict(environment)

    def __call__(self) -> int:
        """Runs the command and returns its exit code."""
        if submitit().JobEnvironment().global_rank == 0:
            self.process = JobProcess(self.job, self.command, self.variables).process
        else:
            own = {**os.environ, **self.variables, SWEEP: str(os.getpid())}
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, env=own)
        while self.process.poll() is None:  # not wait(): it holds a lock that `checkpoint` would wait for
            time.sleep(LOOK)
        return self.process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit's signal handler before the time limit, on rank 0: stops the run, which saves its state.

        Returns:
            The task to requeue.
        """
        with suppress(ProcessLookupError, ChildProcessError):
            self.process.send_signal(signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit().helpers.DelayedSubmission(Task(self.job, self.command, self.variables))


class Cluster:
    """Submits jobs.

    Args:
        name: "slurm", or "local" for submitit's processes on this machine.
        folder: folder of the sweep.
        parameters: parameters of submitit's AutoExecutor; None omits one.

    Raises:
        UserError: if there is no such cluster here, or submitit refuses a parameter.
    """

    def __init__(self, name: str, folder: Path, parameters: Mapping[str, Any]) -> None:
        if name not in HANDLES:
            raise UserError(f"hydra.launcher.cluster={name} is not one of {', '.join(HANDLES)}")
        self.handle = getattr(submitit(), HANDLES[name])
        self.folder = folder / FOLDER
        given = {key: value for key, value in parameters.items() if value is not None}
        try:
            requeues = {f"{name}_max_num_timeout": REQUEUES}
            self.executor = submitit().AutoExecutor(self.folder, cluster=name, **requeues)
            self.executor.update_parameters(**given)
        except (RuntimeError, NameError, AssertionError, TypeError, ValueError) as error:
            raise UserError(f"hydra.launcher.cluster={name}: {' '.join(str(error).split())}") from None

    def submit(self, job: Job, command: Sequence[str], environment: Mapping[str, str]) -> ClusterJob:
        """Submits a job."""
        return ClusterJob(job, self.executor.submit(Task(job, command, environment)))

    def is_alive(self, number: str) -> bool:
        """Whether a job that an earlier session has submitted is pending or running."""
        return not self.handle(folder=self.folder, job_id=number).done()


class ClusterJob:
    """A submitted job, with the methods of `JobProcess`."""

    def __init__(self, job: Job, handle: Any) -> None:
        self.job = job
        self.handle = handle
        self.log = JobLog(job.folder)

    def code(self) -> int | None:
        """The exit code; None while it is pending or running."""
        if not self.handle.done():
            return None
        try:
            return max(self.handle.results(), key=abs)
        except Exception as error:  # of submitit: it was cancelled, its node failed
            self.log.last_lines.append(str(error).strip().splitlines()[-1])
            return AGAIN if read_status(self.job.folder).get("status") == INTERRUPTED else 1

    def stop(self) -> None:
        """Cancels the job: its processes get SIGTERM and save their state."""
        self.handle.cancel()

    kill = stop
