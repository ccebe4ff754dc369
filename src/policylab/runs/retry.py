"""Training goes on while a file cannot be written."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

#: Seconds in which a full disk may get room again before a write is given up, and between two attempts.
ROOM, PAUSE = 30.0, 0.1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def wait_for_room(write: Callable[[], None]) -> None:
    """Calls ``write`` until there is room on the disk for what it writes, for ``ROOM`` seconds at most.

    Raises:
        OSError: when there is still no room; any other one at once.
    """
    deadline = time.monotonic() + ROOM
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in NO_ROOM or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE)


class Patience:
    """Around each attempt to write a file: the first that fails is told, and the first that works again.

    Example::

        with self.patience:
            self.path.write_text(text)
    """

    def __init__(self, path: Path, meanwhile: str) -> None:
        """
        Args:
            path: the file.
            meanwhile: what becomes of its content.
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
            log.warning("could not write %s: %s; the run goes on, and %s", self.path, cause, self.meanwhile)
        elif was and error is None:
            log.warning("%s can be written again", self.path)
        return True
