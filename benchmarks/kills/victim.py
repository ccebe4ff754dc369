"""A run that is disturbed and restarted until it is done; and an undisturbed one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kills.attempt import Attempt, Hangs
from kills.kinds import Course, Kind
from kills.records import differences, done, kept, whole
from kills.settings import Setting

#: Seconds after which a run of this size counts as hanging.
PATIENCE = 600.0
#: Number of starts after which a run counts as lost.
STARTS = 10


@dataclass
class Fate:
    """The outcome of a run."""

    hits: list[float] = field(default_factory=list)  #: seconds since the start that was hit
    codes: list[int] = field(default_factory=list)  #: exit codes, one a start
    again: int = 0  #: iterations that were done twice
    fallbacks: int = 0  #: starts from the checkpoint before the newest
    seconds: float = 0.0
    lost: str = ""  #: why the run is lost; empty: it is done
    apart: list[str] = field(default_factory=list)  #: how it differs from the uninterrupted run

    @property
    def verdict(self) -> str:
        """One of same, different, lost."""
        return "lost" if self.lost else "different" if self.apart else "same"

    @property
    def why(self) -> str:
        """The reason, if the run was lost or is different."""
        return self.lost or "; ".join(self.apart)


def undisturbed(setting: Setting, folder: Path) -> Course:
    """An undisturbed run.

    Raises:
        RuntimeError: when it fails.
    """
    output = folder.with_suffix(".txt")
    attempt = Attempt(in_folder(setting.command(), folder), folder, output)
    built, saved = (
        attempt.seconds if attempt.lives_to_see((folder / name).exists) else 0.0
        for name in ("env.json", "checkpoints/last.ckpt")
    )
    code = attempt.end(PATIENCE)
    if code or not whole(folder):
        raise RuntimeError(f"{setting.name} ended with {code}:\n{tail(output)}")
    return Course(built, saved, attempt.seconds, done(folder))


def disturbed(
    setting: Setting, kind: Kind, folder: Path, output: Path, course: Course, hits: int, draw: Random
) -> Fate:
    """A run that is hit several times, unless it is done earlier, and then finishes undisturbed."""
    fate, began = Fate(), time.monotonic()
    words = [*setting.command(), *kind.overrides]
    try:
        while not fate.codes or fate.codes[-1] != 0:
            if len(fate.codes) == STARTS:
                raise Lost(f"not done after {STARTS} starts")
            attempt = Attempt(in_folder(words, folder), folder, output)
            try:
                one_attempt(attempt, kind, course.rest(kept(folder)), hits, draw, fate)
            finally:
                attempt.clear()
    except (Lost, Hangs) as error:
        fate.lost = f"{error}; {tail(output)}"
    fate.fallbacks = output.read_text(errors="replace").count("the one before it")
    fate.seconds = time.monotonic() - began
    return fate


def in_folder(words: Sequence[str], folder: Path) -> list[str]:
    """The arguments of a run that resumes in its folder, or starts there."""
    return [*words, f"hydra.run.dir={folder}", "resume=auto"]


class Lost(Exception):
    """A run that did not end correctly."""


def one_attempt(attempt: Attempt, kind: Kind, course: Course, hits: int, draw: Random, fate: Fate) -> None:
    """One start, hit or not, to its end.

    Raises:
        Lost: when it does not end correctly.
        Hangs: when it does not end.
    """
    hit = kind.strike(attempt, course, draw) if len(fate.hits) < hits else None
    if hit:
        fate.hits.append(hit.seconds)
        now = done(attempt.folder) - kept(attempt.folder)  # of a run that starts again by itself
    code = attempt.end(hit.within if hit else PATIENCE)
    fate.codes.append(code)
    if left := attempt.left_behind():
        raise Lost(f"left behind: {'; '.join(left)}")
    right = {0} if hit is None else hit.codes
    if right is not None and code not in right:
        raise Lost(f"exit code {code}, not one of {sorted(right)}")
    if hit:
        fate.again += max(0, now if code == 0 else done(attempt.folder) - kept(attempt.folder))


def compare(reference: Path, victim: Path, fate: Fate) -> None:
    """Compares a finished run with the undisturbed one."""
    if not fate.lost:
        fate.apart = differences(reference, victim)


def tail(output: Path, count: int = 3) -> str:
    """The last lines of a run's output."""
    lines: Sequence[str] = [line.strip() for line in output.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-count:])
