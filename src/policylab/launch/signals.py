"""Ctrl-C and SIGTERM end a run between two iterations, where its state can be saved whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from lightning import Callback, Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has saved its state and stopped."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # the shell's convention


class StopOnSignal(Callback):
    """Stops a run when it is asked to.

    The first signal lets the iteration end; the checkpoint is written, validation left out. The second one, or
    one outside training, stops at once. Stand it before the checkpoint callback.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.stopped = False  #: training was ended by the signal
        self.training = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        at_once = self.signum is not None or not self.training
        self.signum = signum
        if at_once:
            raise KeyboardInterrupt
        print("stopping after this iteration; Ctrl-C again stops at once", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on an iteration is under way."""
        self.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two iterations: stop here if asked to."""
        if self.signum is not None:
            self.stopped = True
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """No iteration is under way any more."""
        self.training = False
