"""Large files are written beside the training, by one thread, one after another."""

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
from policylab.runs.retry import wait_for_room

log = logging.getLogger(__name__)


class BackgroundWriter(TorchCheckpointIO):
    """Lightning's checkpoints, and other files that training need not wait for.

    A state is copied to main memory first, so that training may go on at once; there is never more than one such copy.
    Lightning waits for the last file when it is done, in whatever way. A write waits a while for room on a full disk.
    A file that cannot be written is told, and training goes on without it.

    Attributes:
        failed: what could not be written, and has not been since.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.pending: list[tuple[Path, Future[None]]] = []
        self.failed: dict[Path, OSError] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Lightning's call: the whole state of training."""
        self.wait()
        self.submit(Path(path), partial(write_state, snapshot(checkpoint), Path(path)))

    def submit(self, path: Path, write: Callable[[], None]) -> None:
        """Has a file (or folder) written after those that are waiting."""
        self.pending.append((path, self.thread.submit(wait_for_room, write)))

    def wait(self) -> None:
        """Returns when all is written, or has failed."""
        while self.pending:
            path, written = self.pending.pop(0)
            try:
                written.result()
            except OSError as error:
                self.failed[path] = error
                kept = "what stood there is kept" if path.exists() else "nothing stood there before"
                log.warning(
                    "could not write %s: %s; %s, the run goes on and tries again when the next one is due",
                    *(path, cause_of(error), kept),
                )
            else:
                self.failed.pop(path, None)

    def demand_written(self) -> None:
        """To be called at the end.

        Raises:
            RunError: naming what could not be written.
        """
        self.wait()
        for path, error in self.failed.items():
            raise RunError(
                f"could not write {path}: {cause_of(error)}; make room (or the folder writable), then go on with "
                "resume=RUN from the checkpoint before it"
            )

    def teardown(self) -> None:
        """Lightning's call at the end, also after an exception."""
        self.wait()


def cause_of(error: OSError) -> str:
    """``No space left on device`` rather than ``[Errno 28] ...: '/a/path'``."""
    return error.strerror or str(error)


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples, its tensors in main memory. Those that shared memory share it again."""
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
    """Writes beside the place, flushes to disk, and renames onto it: what stands there is whole, whatever happens.

    The last state but one stays as well, should the disk lose the last.

    Raises:
        OSError: naming why it cannot be written; nothing has changed then.
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
    """Torch's own format; where the disk says no, torch complains of its archive, and the cause lies behind that."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
