"""Runs the jobs of a sweep, several at once."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, Self

from policylab.distributed.signals import AGAIN, ECHO, INTERRUPTED, SIGNALS, Interrupted, can_listen
from policylab.errors import counted
from policylab.runs import status
from policylab.sweeps.jobs import Job
from policylab.sweeps.process import JobLog
from policylab.sweeps.progress import is_done
from policylab.sweeps.slots import Slot, Slots
from policylab.sweeps.table import View

#: Seconds between two checks of the jobs.
LOOK = 0.2


@dataclass(frozen=True)
class Outcome:
    """The end of a job."""

    job: Job
    state: str  #: done | failed | interrupted
    reason: str = ""  #: reason of a failure


class Running(Protocol):
    """A started job: a process on this machine, or a job on a cluster."""

    job: Job
    log: JobLog

    def code(self) -> int | None:
        """The exit code; None while it runs."""

    def stop(self) -> None:
        """Asks the job to stop after its iteration."""

    def kill(self) -> None:
        """Ends the job at once."""


class Pool:
    """Runs jobs.

    Args:
        start: starts a job on its share of the machine.
        is_alive: whether a process of another session works in the folder of a job.
        slots: shares of the machine.
        view: console output.
        fail_fast: whether a failure stops the other jobs.
    """

    def __init__(
        self,
        start: Callable[[Job, Slot], Running],
        is_alive: Callable[[Job], bool],
        slots: Slots,
        view: View,
        *,
        fail_fast: bool,
    ) -> None:
        self.start = start
        self.is_alive = is_alive
        self.slots = slots
        self.view = view
        self.fail_fast = fail_fast
        self.running = dict[Running, Slot]()
        self.waiting = deque[Job]()  #: taken from the source, and no room yet
        self.elsewhere = list[Job]()  #: processes of an earlier session still run them
        self.stopping = False

    def run(self, source: Iterable[Job]) -> Iterator[Outcome]:
        """Takes a job whenever there is room for one, and yields its outcome as soon as it has ended.

        A finished job is not run again. A job that another session still runs is waited for: it stops by itself after
        its iteration, because its sweep has ended.

        Raises:
            Interrupted: after a signal, when all jobs have stopped. The second signal kills them.
        """
        jobs = iter(source)
        with Asked() as asked, self.view:
            try:
                more = True
                while more or self.running:
                    if asked.signum is not None:
                        self.stop("interrupted")
                    more = not self.stopping and (yield from self.fill(jobs))
                    yield from self.ended()
                    self.view.show()
                    time.sleep(LOOK)
            finally:
                for process in self.running:
                    process.kill()
            if asked.signum is not None:
                raise Interrupted(asked.signum)

    def fill(self, jobs: Iterator[Job]) -> Generator[Outcome, None, bool]:
        """Starts jobs while there is room.

        Returns:
            Whether there may be more.
        """
        free = [job for job in self.elsewhere if not self.is_alive(job)]
        self.elsewhere = [job for job in self.elsewhere if job not in free]
        self.waiting.extendleft(free)
        while job := self.waiting.popleft() if self.waiting else next(jobs, None):
            progress = self.view.progress(job)
            if is_done(job.folder):
                progress.state = status.DONE
                yield Outcome(job, status.DONE)
            elif self.is_alive(job):
                if progress.state != "elsewhere":
                    self.view.say(job, "was started by another session and still runs; waiting for its end")
                progress.state = "elsewhere"
                self.elsewhere.append(job)
            elif slot := self.slots.take(job):
                self.running[self.start(job, slot)] = slot
                progress.start()
                self.view.started(job, slot.gpus)
            else:
                self.waiting.appendleft(job)
                return True
        return bool(self.elsewhere)

    def ended(self) -> Iterator[Outcome]:
        """Outcomes of the jobs that have ended since the last call."""
        for process, slot in list(self.running.items()):
            for warning in process.log.warnings():
                self.view.say(process.job, f"warning: {warning}")
            if (code := process.code()) is not None:
                del self.running[process]
                self.slots.free(slot)
                process.log.warnings()
                outcome = outcome_of(process, code)
                self.view.ended(outcome.job, outcome.state, outcome.reason)
                if outcome.state == status.FAILED and self.fail_fast:
                    self.stop("a job has failed")
                yield outcome

    def stop(self, why: str) -> None:
        """Starts no more jobs, and asks the running ones to stop."""
        if not self.stopping and self.running:
            count = counted(len(self.running), "job")
            self.view.say(None, f"{why}: {count} will stop after this iteration; Ctrl-C stops at once")
        if not self.stopping:
            for process in self.running:
                process.stop()
        self.stopping = True


def outcome_of(process: Running, code: int) -> Outcome:
    """The outcome of a job with this exit code."""
    job = process.job
    if code == 0 and is_done(job.folder):
        return Outcome(job, status.DONE)
    if code in (AGAIN, INTERRUPTED):
        return Outcome(job, status.INTERRUPTED)
    return Outcome(job, status.FAILED, process.log.reason(code))


class Asked:
    """Notes the first signal that asks to stop; the second one raises. A context manager."""

    signum: int | None = None

    def __enter__(self) -> Self:
        self.previous: dict[int, Any] = {}
        self.at = 0.0
        if can_listen():
            self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is None:
            self.signum, self.at = signum, time.monotonic()
        elif time.monotonic() - self.at > ECHO:
            raise Interrupted(signum)
