"""One start of ``train.py``, observed from outside. Linux only, because it reads /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Environment variable of a run's processes, by which they are recognized.
MARK = "POLICYLAB_CHAOS"
#: Seconds between two checks.
LOOK = 0.02
#: Seconds in which the processes of a run that has ended must be gone.
GONE = 15.0


class Hangs(Exception):
    """A run that should have ended has not."""


@dataclass(frozen=True)
class Process:
    """A process of a run."""

    pid: int
    parent: int
    command: str


class Attempt:
    """A start of ``train.py``.

    Args:
        words: arguments of ``train.py``.
        folder: of the run or the sweep.
        output: file to which the output is appended.
    """

    def __init__(self, words: Sequence[str], folder: Path, output: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.began, self.since = time.monotonic(), time.time()
        with output.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *words],
                cwd=ROOT,
                env={**os.environ, MARK: self.mark},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def alive(self) -> bool:
        """Whether the started process is running."""
        return self.process.poll() is None

    def lives_until(self, seconds: float) -> bool:
        """Waits until a moment; returns whether the run is still alive."""
        return self.lives_to_see(lambda: self.seconds >= seconds)

    def lives_to_see(self, happened: Callable[[], bool], look: float = LOOK) -> bool:
        """Waits for an event; returns whether it came before the run ended."""
        while self.alive:
            if happened():
                return True
            time.sleep(look)
        return False

    @property
    def rows(self) -> int:
        """Number of recorded iterations, the first validation included."""
        try:
            return (self.folder / "metrics.csv").read_bytes().count(b"\n") - 1
        except FileNotFoundError:
            return 0

    def built(self) -> bool:
        """Whether this start has built model and data; earlier records in the folder do not count."""
        try:
            return (self.folder / "env.json").stat().st_mtime > self.since
        except FileNotFoundError:
            return False

    def listens_to(self, number: int) -> bool:
        """Whether the started process has a handler for a signal."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return False
        caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
        return bool(int(caught, 16) >> (number - 1) & 1)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the started process, or to its whole group."""
        with suppress(ProcessLookupError):  # it has already ended
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, within: float) -> int:
        """Waits for the end.

        Returns:
            The exit code.

        Raises:
            Hangs: when the run does not end in time; it is then killed.
        """
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.clear()
            raise Hangs(f"still running after {self.seconds:.0f} s") from None

    def processes(self) -> list[Process]:
        """All processes with the mark, whichever process started them."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    command = (entry / "cmdline").read_text().replace("\0", " ")
                    found.append(Process(int(entry.name), int(parent), command))
            except OSError:
                continue  # it has ended, or belongs to another user
        return found

    def ranks(self) -> list[Process]:
        """The processes that train, if there are several."""
        return [p for p in self.processes() if p.parent == self.process.pid and "spawn_main" in p.command]

    def left_behind(self) -> list[str]:
        """Commands of processes that are still alive after the run; kills them."""
        deadline = time.monotonic() + GONE
        while (rest := self.processes()) and time.monotonic() < deadline:
            time.sleep(LOOK)
        self.clear()
        return [process.command for process in rest]

    def clear(self) -> None:
        """Kills the remaining processes."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
