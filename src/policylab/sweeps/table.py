"""The console output of a sweep: a live table in a terminal, and a line for each event."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from policylab.callbacks.tables import PLAIN_TEXT, PLAIN_WIDTH
from policylab.runs import status
from policylab.runs.figures import duration, number
from policylab.sweeps.jobs import Job
from policylab.sweeps.progress import Progress

#: Seconds between two tables.
REFRESH = 1.0
#: Lines of a terminal that are not used for jobs.
AROUND = 6
STYLES = {"running": "bold", status.DONE: "green", status.FAILED: "bold red", status.INTERRUPTED: "yellow"}


class View:
    """Shows jobs. As a context manager, it shows the live table in a terminal."""

    def __init__(self) -> None:
        self.jobs = dict[str, Progress]()
        self.console = Console(**PLAIN_TEXT)
        if not self.console.is_terminal:
            self.console = Console(**PLAIN_TEXT, width=int(os.environ.get("COLUMNS", PLAIN_WIDTH)))
        self.live: Live | None = None
        self.refreshed = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def progress(self, job: Job) -> Progress:
        """The progress of a job, which is added to the table."""
        if job.label not in self.jobs:
            self.jobs[job.label] = Progress(job.folder)
        return self.jobs[job.label]

    def started(self, job: Job, gpus: tuple[str, ...]) -> None:
        """Prints that a job has started."""
        progress = self.jobs[job.label]
        place = f" on GPU {','.join(gpus)}" if gpus else ""
        at = f"resumes after iteration {progress.iteration} of {progress.iterations}"
        self.say(job, (at if progress.iteration else "starts") + place)

    def ended(self, job: Job, state: str, reason: str) -> None:
        """Prints how a job ended."""
        progress = self.jobs[job.label]
        progress.state = state
        progress.look()
        at = f"{progress.iteration} of {progress.iterations} iterations in {duration(progress.seconds)}"
        self.say(
            job, f"{state}: {reason}" if reason else f"{state}: reward {number(progress.reward)}, {at}", state
        )

    def say(self, job: Job | None, text: str, state: str = "") -> None:
        """Prints a line, with the job's label."""
        line = Text.assemble((f"{job.label}  ", STYLES.get(state, "cyan")), text) if job else Text(text)
        self.console.print(line, soft_wrap=True)
        sys.stdout.flush()

    def show(self) -> None:
        """Updates the table once a second."""
        if self.live is not None and time.monotonic() - self.refreshed >= REFRESH:
            self.refreshed = time.monotonic()
            for progress in self.jobs.values():
                if progress.state in ("running", "elsewhere"):
                    progress.look()
            self.live.update(table(self.jobs, self.console.height - AROUND), refresh=True)


def table(jobs: dict[str, Progress], height: int) -> Group:
    """The table of all jobs. If there are too many, it omits waiting and finished ones first.

    Args:
        height: most rows.
    """
    states = Counter(progress.state for progress in jobs.values())
    shown = dict(jobs)
    for state in ("waiting", status.DONE, "started", status.INTERRUPTED, status.FAILED):
        if len(shown) > height:
            shown = {label: progress for label, progress in shown.items() if progress.state != state}
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "state"):
        found.add_column(name, no_wrap=True)
    for name in ("iteration", "reward", "ETA"):
        found.add_column(name, justify="right", no_wrap=True)
    for label, progress in shown.items():
        left = progress.seconds_left
        found.add_row(
            label,
            progress.state,
            f"{progress.iteration}/{progress.iterations}" if progress.iterations else "",
            "" if progress.reward is None else number(progress.reward),
            "" if left is None else duration(left),
            style=STYLES.get(progress.state, "dim"),
        )
    return Group(found, Text(f"{len(jobs)} jobs: {counts}{_left(jobs)}"))


def _left(jobs: dict[str, Progress]) -> str:
    """An estimate of the time left for all jobs; empty before running jobs have made progress."""
    running = [progress for progress in jobs.values() if progress.state == "running"]
    paces = [(p.share - p.share_before) / p.seconds for p in running if p.share > p.share_before]
    if not paces:
        return ""
    work = sum(
        1 - p.share for p in jobs.values() if p.state in ("running", "waiting", "started", "elsewhere")
    )
    return f"; about {duration(work / (sum(paces) / len(paces) * len(running)))} left"
