"""Folders of runs that never began: a refused command, or a start that failed before the first result."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from policylab.errors import UserError
from policylab.runs.find import LATEST, LATEST_SWEEP, SWEEP_FILE, is_run
from policylab.runs.status import FAILED, INTERRUPTED, KILLED, read_status, state_of
from policylab.sweeps.process import is_alive

#: All that a run writes before its first result. A folder with any other file is never removed.
OF_A_START = {"train.log", "config.yaml", "env.json", "status.json"}
#: The name of a run's folder, unless the command gave another.
DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_s")
#: A command that still starts has no status yet; its folder is left alone for so many seconds.
STARTING = 3600


def leftovers(where: Path) -> Iterator[tuple[Path, str, int]]:
    """The folders that may be removed, why, and the bytes of their files.

    Links are not followed, so `latest` is none of them; nor is the run that it points at.

    Raises:
        UserError: when there is no such folder.
    """
    if not where.is_dir():
        raise UserError(f"there is no folder {where.absolute()}; give the folder that holds the runs")
    where = where.resolve()
    links = [place / name for place in (where, *where.parents) for name in (LATEST, LATEST_SWEEP)]
    kept = {link.resolve() for link in links if link.is_symlink()}
    for place, inner, _ in os.walk(where):
        folder = Path(place)
        reason = "" if folder in kept else never_began(folder)
        if reason:
            yield folder, reason, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if reason or is_run(folder):
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]


def never_began(folder: Path) -> str:
    """Why a folder may be removed; empty for any that is no run's, is in use, or holds more than a start leaves."""
    run = is_run(folder)
    begun = run or (folder / "status.json").is_file() or DATED.match(folder.name) is not None
    if not (begun or (folder.parent / SWEEP_FILE).is_file()):
        return ""
    entries = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if {path.relative_to(folder).as_posix() for path in entries} - OF_A_START or is_alive(folder):
        return ""
    if run:
        state, exception = state_of(folder), read_status(folder).get("exception")
        if state not in (FAILED, INTERRUPTED, KILLED):
            return ""
        return f"{state} at its start" + (f" ({exception.partition(':')[0]})" if exception else "")
    newest = max(path.stat().st_mtime for path in (folder, *entries))
    return "" if time.time() - newest < STARTING else "refused" if entries else "empty"


def remove(folder: Path, where: Path) -> None:
    """Removes a folder, and its parents below ``where`` that are then empty.

    Raises:
        UserError: when it cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"could not remove {error.filename or folder}: {error.strerror}") from None
    with suppress(OSError):  # the parent is not empty
        for parent in folder.parents:
            if where.resolve() not in parent.parents:
                break
            parent.rmdir()
