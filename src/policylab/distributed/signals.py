"""The signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType

#: Signals that ask a process to stop after its iteration. SLURM sends one of the last two before the time limit if the
#: job asks for it (submitit asks for SIGUSR2).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: The one that a launcher sends to its processes. They ignore the others, which a terminal, SLURM or systemd sends to
#: all processes at once. By default it does nothing, so a process without a handler yet survives it.
PASSED_ON = signal.SIGURG
#: Seconds within which a second signal counts as the first one: torchrun, for one, forwards it.
ECHO = 1.0
#: Exit codes. 75 is EX_TEMPFAIL of sysexits.h: nothing is lost, run the same command again.
INTERRUPTED, AGAIN = 130, 75


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has stopped; its checkpoints are whole.

    Args:
        signum: the signal that asked.
        together: whether all processes stopped after the same iteration, rather than this one at once.
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
    """In the first seconds, before a run sets its own handlers, a signal ends the process with the same exit codes."""
    if can_listen():
        for number in SIGNALS:
            signal.signal(number, stop_at_once)


def stop_at_once(signum: int, _: FrameType | None) -> None:
    """A signal handler."""
    raise Interrupted(signum)
