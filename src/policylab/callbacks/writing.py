"""Large files are written beside the training, by one thread, one after another."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


class BackgroundWriter(TorchCheckpointIO):
    """Lightning's checkpoints, and other files that training need not wait for.

    A state is copied to main memory first, so that training may go on at once; there is never more than one such copy.
    Lightning waits for the last file when it is done, in whatever way.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.pending: list[tuple[Path, Future[None]]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Lightning's call: the whole state of training.

        Raises:
            RuntimeError: when an earlier file could not be written.
        """
        self.wait()
        self.submit(Path(path), partial(write_state, snapshot(checkpoint), Path(path)))

    def submit(self, path: Path, write: Callable[[], None]) -> None:
        """Has a file (or folder) written after those that are waiting."""
        self.pending.append((path, self.thread.submit(write)))

    def wait(self) -> None:
        """Returns when all is written.

        Raises:
            RuntimeError: naming the file that could not be written.
        """
        while self.pending:
            path, written = self.pending.pop(0)
            try:
                written.result()
            except Exception as error:
                raise RuntimeError(f"could not write {path}: {error}") from error

    def teardown(self) -> None:
        """Lightning's call at the end, also after an exception."""
        self.wait()


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
    """Writes beside the place, flushes to disk, and renames onto it: what stands there is whole, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
