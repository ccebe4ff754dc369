"""What the signals mean that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType

#: All that ask a process to stop after its iteration. SLURM sends one of the last two before the time limit if it is
#: told to (submitit tells it to send SIGUSR2).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: How a launcher hands it to its processes, which are deaf to the others: a terminal, SLURM or systemd sends those to
#: all of them at once. One that does not listen yet is not ended by it.
PASSED_ON = signal.SIGURG
#: Seconds within which a second signal is the first one, come by another way, as from torchrun.
ECHO = 1.0
#: Exit codes. 75 is the system's EX_TEMPFAIL: nothing is wrong and nothing lost, run the same command again.
INTERRUPTED, AGAIN = 130, 75


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has stopped; what it had saved is whole.

    Args:
        signum: the signal that asked.
        together: all processes stopped after the same iteration; else this one did so at once.
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
    """Until a run listens, in its first seconds, a signal ends the process at once, with the same exit codes."""
    if can_listen():
        for number in SIGNALS:
            signal.signal(number, stop_at_once)


def stop_at_once(signum: int, _: FrameType | None) -> None:
    """A signal handler."""
    raise Interrupted(signum)
