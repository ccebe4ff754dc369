"""``status.json``: whether a run is running, done, failed or interrupted, and its progress."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from policylab.runs.folder import write_json
from policylab.runs.redaction import redact_text
from policylab.runs.retry import RetryLater

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
#: The state of a run that says "running", but whose process no longer exists.
KILLED = "killed"
STATES = (RUNNING, DONE, FAILED, INTERRUPTED, KILLED)


def now() -> str:
    """The time, as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_status(run_folder: Path) -> dict[str, Any]:
    """Content of a run's ``status.json``; empty when it has none."""
    path = run_folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def state_of(run_folder: Path) -> str:
    """One of ``STATES``. A run of another machine counts as running as long as its file says so."""
    status = read_status(run_folder)
    state = str(status.get("status"))
    elsewhere = status.get("host") != platform.node() or status.get("process") == os.getpid()
    return KILLED if state == RUNNING and not elsewhere and running_process(run_folder) is None else state


def running_process(run_folder: Path) -> int | None:
    """The process on this machine that trains in a run folder; None without one. Cannot see other machines."""
    status = read_status(run_folder)
    if status.get("status") != RUNNING or status.get("host") != platform.node():
        return None
    process = int(status["process"])
    try:
        os.kill(process, 0)  # only checks whether it exists
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's, but alive
    if process == os.getpid() or began_after(process, status.get("updated")):
        return None
    return process


def began_after(process: int, moment: str | None) -> bool:
    """Whether a process started after a moment, so that it is another process with a reused id.

    Also true for a zombie process. False where there is no /proc.
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    if state in ("Z", "X"):
        return True
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    slack = 2.0  # the moment is rounded to a second
    return moment is not None and began > datetime.fromisoformat(moment).timestamp() + slack


def finish_status(run_folder: Path, began: str, status: str, exception: str | None = None) -> None:
    """Writes how a run ended, for processes that no longer can or that do not know the first error.

    Args:
        began: when the processes were started. A status from before belongs to an earlier session and is kept.
    """
    with suppress(OSError):  # the first error matters more than a full disk
        content = read_status(run_folder)
        ours = content.get("updated", "") >= began and content["status"] != DONE
        if ours and running_process(run_folder) is None:
            reason = redact_text(exception or "") or None
            content |= {"status": status, "exception": reason, "finished": now(), "updated": now()}
            write_json(run_folder / "status.json", content)


class RunStatus:
    """Keeps ``status.json`` up to date, however the run ends: a context manager around the whole job.

    After ``kill -9`` the status stays "running", with the id of a process that no longer exists.

    Args:
        writes: whether this is the process that writes the file.
    """

    def __init__(
        self, run_folder: Path, iterations: int, max_tokens: int | None, *, writes: bool = True
    ) -> None:
        self.writes = writes
        before = read_status(run_folder)
        self.path = run_folder / "status.json"
        self.retry_later = RetryLater(self.path, "the file is out of date until it can be written")
        self.clock = time.monotonic()
        self.seconds_before = float(before.get("wall_seconds", 0.0))
        self.content: dict[str, Any] = {
            "status": RUNNING,
            "iteration": int(before.get("iteration", 0)),
            "iterations": iterations,
            "tokens_sampled": int(before.get("tokens_sampled", 0)),
            "max_tokens": max_tokens,
            "exception": None,
            "started": before.get("started") or now(),
            "finished": None,
            "process": os.getpid(),
            "host": platform.node(),
        }

    @property
    def wall_seconds(self) -> float:
        """Total seconds of all sessions of this run."""
        return self.seconds_before + time.monotonic() - self.clock

    @property
    def state(self) -> str:
        """One of running, done, failed, interrupted."""
        return str(self.content["status"])

    def write(self, **changes: Any) -> None:
        """Changes some fields and writes the file."""
        self.content |= changes | {"updated": now(), "wall_seconds": round(self.wall_seconds, 1)}
        if self.writes:
            with self.retry_later:
                write_json(self.path, self.content)

    def interrupted(self) -> None:
        """Records that the run was stopped by a signal."""
        self.write(status=INTERRUPTED, finished=now())

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            if self.state == RUNNING:
                self.write(status=DONE, finished=now())
        elif isinstance(error, KeyboardInterrupt):
            self.interrupted()
        else:
            self.write(
                status=FAILED,
                finished=now(),
                exception=redact_text(f"{type(error).__name__}: {error}"),
            )
