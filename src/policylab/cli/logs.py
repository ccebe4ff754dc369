"""What reaches the console: warnings do, adverts and known noise do not."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import TextIO

from policylab.distributed.world import world
from policylab.runs.redaction import redact_text

#: Said by Lightning or torch in every run and of no use in any; whatever else they say is shown.
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
    r"FSDPPolicy\) returned a view",  # that nobody writes to
)


#: ``log.error(..., extra=FILE_ONLY)``: for ``train.log``, not for the console.
FILE_ONLY = {"file_only": True}


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is at that moment, so that lines appear above a live progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        # Of several processes one speaks; all write train.log.
        self.addFilter(lambda record: world().main and not getattr(record, "file_only", False))

    @property
    def stream(self) -> TextIO:
        """The current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignored: logging's own set-up assigns it."""


class Formatter(logging.Formatter):
    """Lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Logging's call."""
        return redact_text(super().format(record))


class LogFile(logging.FileHandler):
    """A file for which there may come to be no room; what it misses then is not worth a traceback a line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Logging's call when a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            cause = error.strerror or error
            print(f"could not write {self.baseFilename}: {cause}; the run goes on", file=sys.stderr)


class NoiseFilter(logging.Filter):
    """Drops log records with a message of ``NOISE``."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for noise."""
        message = record.getMessage()
        return not any(noise in message for noise in NOISE)


def escape_unprintable() -> None:
    """A character that the terminal cannot show is printed as its number: no run ends for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_noise() -> None:
    """Filters the known noise, by message. Lightning's other news goes to ``train.log``; call once it is imported."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()  # its own, which prints everything on the console
        logger.propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(NoiseFilter())
    if not world().main:
        warnings.simplefilter("ignore")
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=f"(?s).*{noise}")
