"""The signals that ask a run to stop."""

from __future__ import annotations

import signal
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
