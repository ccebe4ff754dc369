"""What the signals mean that ask a run to stop."""

from __future__ import annotations

import signal
import threading

#: Asks a process to stop after its iteration, whoever sends it. SLURM sends it before the time limit if it is told to.
ASK = signal.SIGUSR1
#: All that ask.
SIGNALS = (signal.SIGINT, signal.SIGTERM, ASK)
#: Exit codes. 75 is the system's EX_TEMPFAIL: nothing is wrong and nothing lost, run the same command again.
INTERRUPTED, AGAIN = 130, 75


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has stopped; what it had saved is whole."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = INTERRUPTED if signum == signal.SIGINT else AGAIN


def can_listen() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
