"""Writes large files in the background, one after another, in one thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from policylab.errors import RunError
from policylab.runs.checkpoints import LAST, PREVIOUS, link_atomically
from policylab.runs.folder import sync_folder
from policylab.runs.retry import retry_while_full

log = logging.getLogger(__name__)


class BackgroundWriter(TorchCheckpointIO):
    """Writes Lightning's checkpoints, and other files that training does not wait for.

    A state is first copied to main memory, one copy at a time, and training continues. Lightning waits for the last
    file when it ends, also after an error. A full disk is retried for a while; a file that cannot be written is logged,
    and training continues. (Lightning's ``AsyncCheckpointIO`` raises at the next save instead, copies tied weights
    twice, keeps any number of copies, and writes only checkpoints.)

    Attributes:
        failed: files whose last write has failed.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.pending: list[tuple[Path, Future[None]]] = []
        self.failed: dict[Path, OSError] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Called by Lightning with the whole state of training."""
        self.wait()
        self.submit(Path(path), partial(write_state, snapshot(checkpoint), Path(path)))

    def submit(self, path: Path, write: Callable[[], None]) -> None:
        """Queues the writing of a file or folder."""
        self.pending.append((path, self.thread.submit(retry_while_full, write)))

    def wait(self) -> None:
        """Waits until everything queued is written or has failed."""
        while self.pending:
            path, written = self.pending.pop(0)
            try:
                written.result()
            except OSError as error:
                self.failed[path] = error
                kept = "the older file is kept" if path.exists() else "there is no older file"
                log.warning(
                    "could not write %s: %s; %s, the run continues and tries again when the next one is due",
                    *(path, cause_of(error), kept),
                )
            else:
                self.failed.pop(path, None)

    def check_written(self) -> None:
        """Call at the end.

        Raises:
            RunError: naming what could not be written.
        """
        self.wait()
        for path, error in self.failed.items():
            raise RunError(
                f"could not write {path}: {cause_of(error)}; make room (or the folder writable), then resume from the "
                "checkpoint before it: resume=RUN"
            )

    def teardown(self) -> None:
        """Called by Lightning at the end, also after an exception."""
        self.wait()


def cause_of(error: OSError) -> str:
    """The reason alone: ``No space left on device``, not ``[Errno 28] ...: '/a/path'``."""
    return error.strerror or str(error)


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples with tensors in main memory. Shared tensors stay shared."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            view = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if view not in copies:
                copies[view] = value.detach().to("cpu", copy=True)
            return copies[view]
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copied(item) for item in value)
        return value

    return copied(state)


def write_state(state: Any, path: Path) -> None:
    """Writes to a temporary file, flushes it to disk, and renames it to ``path``, so that this file is always whole.

    The previous state is kept as well, in case the disk loses the last one.

    Raises:
        OSError: when it cannot be written; the existing files are then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            link_atomically(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(state: Any, file: BinaryIO) -> None:
    """Saves in torch's format. Raises the disk's OSError, not torch's later error about its archive."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
