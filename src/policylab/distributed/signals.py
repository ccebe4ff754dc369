"""The signals that ask a run to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

#: Signals that ask a process to stop after its iteration. SLURM sends one of the last two before the time limit if the
#: job asks for it (submitit asks for SIGUSR2).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: The signal that a launcher sends to its processes. They ignore the others, which a terminal, SLURM or systemd sends
#: to all processes at once. Its default action is to do nothing, so it does not end a process without a handler.
PASSED_ON = signal.SIGURG
#: A second signal within this many seconds counts as the first one: torchrun, for example, forwards signals.
ECHO = 1.0
#: Exit codes. 75 is EX_TEMPFAIL of sysexits.h: nothing is lost, run the same command again.
INTERRUPTED, AGAIN = 130, 75
#: In the environment of a job of a sweep: the id of the process that runs the sweep, until the job has read it.
SWEEP = "POLICYLAB_SWEEP"
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has stopped; its checkpoints are whole.

    Args:
        signum: the signal.
        together: whether all processes stopped after the same iteration; otherwise this one stopped at once.
    """

    def __init__(self, signum: int, *, together: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.together = together
        self.exit_code = INTERRUPTED if signum == signal.SIGINT else AGAIN


def can_listen() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def stop_on_signals() -> None:
    """Sets handlers for the time before a run sets its own: a signal ends the process with the same exit codes."""
    if can_listen():
        for number in SIGNALS:
            signal.signal(number, stop_at_once)


def stop_at_once(signum: int, _: FrameType | None) -> None:
    """A signal handler."""
    raise Interrupted(signum)


def end_with(parent: int, signum: int) -> None:
    """Has the system send a signal to this process when its parent ends, even by ``kill -9``. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signum)


def stop_with_sweep() -> None:
    """In a job of a sweep: stops as after SIGTERM when the process that runs the sweep ends.

    Call it after `stop_on_signals`. Processes that this one starts are not stopped by it.
    """
    parent = os.environ.get(SWEEP, "")
    if parent.isdigit():
        os.environ[SWEEP] = "joined"
        end_with(int(parent), signal.SIGTERM)


def in_sweep() -> bool:
    """Whether this is a job of a sweep: what it prints goes to its ``train.log``."""
    return SWEEP in os.environ
