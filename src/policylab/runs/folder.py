"""The folder of a run: making it, and writing files in it atomically."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from policylab.errors import UserError

#: Files in the folder of a run that the run writes.
RECORDS = (
    "config.yaml",
    "env.json",
    "status.json",
    "train.log",
    "metrics.csv",
    "samples.jsonl",
    "summary.json",
)


def claim(path: Path) -> Path:
    """Makes a new folder: ``path``, or if that exists ``path_2``, ``path_3``, ...

    ``mkdir`` is atomic, so jobs that start in the same second never share one.

    Raises:
        UserError: when the folder cannot be made.
    """
    try:
        for number in count(1):
            candidate = path if number == 1 else path.with_name(f"{path.name}_{number}")
            try:
                candidate.mkdir(parents=True)
            except FileExistsError:
                continue
            return candidate
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {path}: {error.strerror}; set hydra.run.dir=PATH, with -m hydra.sweep.dir=PATH"
        ) from None
    raise AssertionError("unreachable")


@contextmanager
def removed_if_empty(folder: Path, logs: Path) -> Iterator[None]:
    """At the end, removes a folder that holds only Hydra's log of the job, and its empty parents below ``logs``."""
    try:
        yield
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == ["train.log"]:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # the parent is not empty
                for parent in folder.parents:
                    if logs not in parent.parents:
                        break
                    parent.rmdir()


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[Callable[[], None]]:
    """Removes the files of a run if a UserError comes before it is accepted.

    Yields:
        The function that accepts it; call it when everything is built.
    """
    accepted = False

    def accept() -> None:
        nonlocal accepted
        accepted = True

    try:
        yield accept
    except UserError:
        if not accepted:
            for name in ("config.yaml", "env.json", "status.json"):
                (folder / name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file atomically: to a temporary file, which is flushed to disk and renamed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_whole(path: Path, text: str) -> None:
    """Appends to a text file; if that fails, the file is unchanged.

    Raises:
        OSError: when there is no room.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(text.encode()) < len(text.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, with a newline at the end."""
    write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")


def check_link(latest: Path) -> None:
    """Refuses to start if a link such as ``logs/latest`` exists and is not a link.

    Raises:
        UserError: naming it.
    """
    if latest.exists() and not latest.is_symlink():
        raise UserError(
            f"{latest} is used as a link to the newest one, but it is a folder or file; move it away"
        )


def point_latest(folder: Path, logs: Path, name: str = "latest") -> None:
    """Points the link ``logs/NAME`` at a folder, atomically."""
    logs.mkdir(parents=True, exist_ok=True)
    temporary = logs / f".{name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(folder, logs), target_is_directory=True)
    os.replace(temporary, logs / name)
