"""Retries writing files, so that training continues while a disk is full."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

#: Seconds for which a write to a full disk is retried, and seconds between two attempts.
TIMEOUT, PAUSE = 30.0, 0.1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def retry_while_full(write: Callable[[], None]) -> None:
    """Calls ``write`` until it succeeds; a full disk is retried for ``TIMEOUT`` seconds.

    Raises:
        OSError: when the disk is still full; any other error at once.
    """
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in DISK_FULL or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE)


class RetryLater:
    """A context for attempts to write a file that may be retried later: an OSError is logged, not raised.

    Only the first failure is logged, and the first success after it.

    Example::

        with self.retry_later:
            self.path.write_text(text)

    Attributes:
        failing: whether the last attempt failed.
    """

    def __init__(self, path: Path, meanwhile: str) -> None:
        """
        Args:
            path: the file.
            meanwhile: what happens to its content until then, for the message.
        """
        self.path = path
        self.meanwhile = meanwhile
        self.failing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        if error is not None and not isinstance(error, OSError):
            return False
        was, self.failing = self.failing, error is not None
        if isinstance(error, OSError) and not was:
            cause = error.strerror or str(error)
            log.warning("could not write %s: %s; the run continues, and %s", self.path, cause, self.meanwhile)
        elif was and error is None:
            log.warning("%s can be written again", self.path)
        return True
