"""The progress of a job, read from the files in its folder."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from policylab.runs.metrics_file import read_tail
from policylab.runs.status import DONE, INTERRUPTED, RUNNING, read_status

#: Metrics that the table shows: the first one that the job has.
REWARDS = ("val/reward", "train/reward", "val/loss", "train/loss")


@dataclass
class Progress:
    """The progress of a job, and its speed in this session."""

    folder: Path
    state: str = "waiting"  #: or started, elsewhere, running, done, failed, interrupted
    iteration: int = 0
    iterations: int | None = None  #: None until the job has begun
    reward: float | None = None  #: of the last validation, else of training; a loss if there is no reward
    share: float = 0.0  #: finished fraction of the work
    began: float = 0.0
    share_before: float = 0.0

    def __post_init__(self) -> None:
        status = read_status(self.folder).get("status", "waiting")
        self.state = "started" if status in (RUNNING, INTERRUPTED) else status
        self.look()

    def start(self) -> None:
        """Records that the job starts now."""
        self.state, self.began, self.share_before = "running", time.monotonic(), self.share

    def look(self) -> None:
        """Reads the folder again."""
        status = read_status(self.folder)
        before = self.iteration, self.iterations
        self.iteration = int(status.get("iteration", self.iteration))
        self.iterations = status.get("iterations", self.iterations)
        if self.iterations is None or ((self.iteration, self.iterations) == before and self.state != DONE):
            return
        self.share = self.iteration / self.iterations
        if budget := status.get("max_tokens"):
            self.share = max(self.share, status.get("tokens_sampled", 0) / budget)
        with suppress(OSError):  # no file yet
            rows = read_tail(self.folder / "metrics.csv")[::-1]
            self.reward = next((row[name] for name in REWARDS for row in rows if name in row), self.reward)

    @property
    def seconds(self) -> float:
        """Seconds since it was started in this session."""
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the speed in this session; None without progress."""
        done = self.share - self.share_before
        return self.seconds * (1 - self.share) / done if self.state == "running" and done > 0 else None


def is_done(folder: Path) -> bool:
    """Whether the job of a folder is done."""
    return bool(read_status(folder).get("status") == DONE)
