"""A job as a process: ``train.py`` with the job's overrides, with its output in its own ``train.log``."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from policylab.distributed.signals import SWEEP
from policylab.runs.status import running_process
from policylab.sweeps.jobs import Job

LOG = "train.log"
#: Lines of the log: a warning, which the console shows, and the error that ended the command.
WARNING = re.compile(r"\[\S+ \S+ WARNING \S+\] (.*)")
ERROR = re.compile(r"error(?: on rank \d+)?: (.*)")
#: Number of last lines that are searched for the reason of a failure.
LAST_LINES = 50


class JobLog:
    """New lines in a job's ``train.log``. They can be read even after the job removes its folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch()
        self.file = (folder / LOG).open("rb")
        self.file.seek(0, os.SEEK_END)
        self.last_lines = deque[str](maxlen=LAST_LINES)
        self.torn = b""

    def warnings(self) -> list[str]:
        """Warnings in the lines since the last call."""
        *whole, self.torn = (self.torn + self.file.read()).split(b"\n")
        texts = [line.decode(errors="replace") for line in whole]
        self.last_lines.extend(text for text in texts if text.strip())
        return [match[1] for text in texts if (match := WARNING.match(text))]

    def reason(self, code: int) -> str:
        """The reason why a command with this exit code failed, in one line. Call `warnings` before."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"ended by {name}" + (
                ", which the system sends when memory runs out" if name == "SIGKILL" else ""
            )
        said = [match[1] for line in self.last_lines if (match := ERROR.match(line))] or list(self.last_lines)
        return said[-1].strip() if said else f"exit code {code}, without an error message"


class JobProcess:
    """A running job. Its ``train.log`` is locked while the job, or any process that it starts, has the file as output.

    Args:
        job: a job without live processes (`is_alive`).
        command: arguments of the command line.
        environment: variables in addition to those of this process.
    """

    def __init__(self, job: Job, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.job = job
        self.log = JobLog(job.folder)
        with (job.folder / LOG).open("ab") as output:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, SWEEP: str(os.getpid())},
                start_new_session=True,  # its own process group, for `kill`
            )

    def code(self) -> int | None:
        """The exit code; None while it runs. At its end, remaining processes of the job are killed."""
        if self.process.poll() is not None:
            self.kill()
        return self.process.returncode

    def stop(self) -> None:
        """Asks the job to stop after its iteration."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends all processes of the job at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def is_alive(folder: Path) -> bool:
    """Whether a process of another session works in the folder of a job."""
    log = folder / LOG
    if log.exists():
        with log.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return running_process(folder) is not None
