"""Ctrl-C and SIGTERM stop a run between two iterations, where its state can be saved whole."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import torch
from lightning import Callback, Trainer

from policylab.distributed.signals import ECHO, SIGNALS, Interrupted, can_listen
from policylab.distributed.world import world

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Stops a run after a signal.

    After the first signal the iteration ends and the checkpoint is written; validation is skipped. A second signal, or
    one outside training, stops at once. All processes stop after the same iteration, even if only one got the signal.
    Place it before the checkpoint callback.

    Args:
        signals: those that stop the run.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = signals
        self.signum: int | None = None
        self.asked_at = 0.0
        self.stopped = False  #: training was ended by the signal
        self.training = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.previous = {number: signal.getsignal(number) for number in {*SIGNALS, *self.signals}}
        self.listen()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if can_listen():
            for number, handler in self.previous.items():
                signal.signal(number, handler)
        if self.signum is not None and isinstance(error, Exception):
            # a collective operation failed because the other processes have stopped
            raise Interrupted(self.signum) from error

    def listen(self) -> None:
        """Sets the handlers of ``signals``, and restores those of other signals."""
        if can_listen():
            for number, handler in self.previous.items():
                signal.signal(number, self.handle if number in self.signals else handler)

    def handle(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is not None and time.monotonic() - self.asked_at < ECHO:
            return
        at_once = self.signum is not None or not self.training
        self.signum, self.asked_at = signum, time.monotonic()
        if at_once:
            raise Interrupted(signum)
        if world().main:
            # not print(): the signal may have interrupted one
            os.write(1, b"stopping after this iteration; Ctrl-C again stops at once\n")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Replaces Lightning's handler for SIGTERM, which starts a collective operation at unsafe moments."""
        self.listen()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on a signal waits for the end of the iteration."""
        self.listen()
        self.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops all processes if one of them got a signal."""
        asked = int(pl_module.runtime.all_max(torch.tensor(self.signum or 0, device=pl_module.device)))
        if asked:
            self.signum = asked
            self.stopped = True
            if world().main:
                log.info("stopping after iteration %s: %s", pl_module.iteration, signal.Signals(asked).name)
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on a signal stops at once."""
        self.training = False
