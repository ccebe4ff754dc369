"""Logging: warnings on the console, except for known noise, and all messages in ``train.log``."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from policylab.distributed.signals import in_sweep
from policylab.distributed.world import world
from policylab.runs.redaction import redact_text

#: Parts of useless messages that Lightning and torch log in every run. All other messages are shown.
NOISE = (
    "litlogger",
    "litmodels",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "LeafSpec",
    "log_every_n_steps",
    "your dataloader is not resumable",  # the data module is: it knows the iteration
    "in eval mode at the start of training",  # dropout is off on purpose
    r"FSDPPolicy\) returned a view",  # the view is never written to
)


#: ``log.error(..., extra=FILE_ONLY)`` writes to ``train.log``, not to the console.
FILE_ONLY = {"file_only": True}


class ConsoleHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, so that lines appear above a live progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        # All ranks write train.log. Only rank 0 writes to the console, which is that same file in a job of a sweep.
        self.addFilter(
            lambda record: world().main and not in_sweep() and not getattr(record, "file_only", False)
        )

    @property
    def stream(self) -> TextIO:
        """The current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignored: logging assigns it at its set-up."""


class Formatter(logging.Formatter):
    """Hides secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        return redact_text(super().format(record))


class LogFile(logging.FileHandler):
    """A log file that tolerates a full disk: lines that cannot be written are dropped, and the first is reported."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging when a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            cause = error.strerror or error
            print(f"could not write {self.baseFilename}: {cause}; the run continues", file=sys.stderr)


class NoiseFilter(logging.Filter):
    """Drops log records with a message of ``NOISE``."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for noise."""
        message = record.getMessage()
        return not any(noise in message for noise in NOISE)


def escape_unprintable() -> None:
    """Prints a character that the terminal cannot show as its code instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_noise() -> None:
    """Drops messages of ``NOISE``. Lightning's other messages go to ``train.log``. Call after importing Lightning."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()  # its own handler prints everything on the console
        logger.propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(NoiseFilter())
    if not world().main:
        warnings.simplefilter("ignore")
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=f"(?s).*{noise}")


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Appends log messages to a file, and prints warnings: for commands whose logging Hydra does not set up."""
    file, console, root = (
        LogFile(path, encoding="utf-8", delay=True),
        ConsoleHandler(),
        logging.root,
    )
    file.setFormatter(Formatter("[%(asctime)s %(levelname)s %(name)s] %(message)s"))
    console.setFormatter(Formatter("%(message)s"))
    console.setLevel(logging.WARNING)
    before = root.level
    root.setLevel(logging.INFO)
    for handler in (file, console):
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in (file, console):
            root.removeHandler(handler)
        file.close()
