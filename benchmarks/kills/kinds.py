"""Ways to kill a run, or to fill its disk: each kind draws its moment, and knows which ends are right afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from kills.attempt import Attempt

#: Seconds in which a run must end after a signal or the loss of a process.
SOON = 60.0
#: Moments are drawn up to this share of the run's duration, so some come too late.
LATEST = 1.03


@dataclass(frozen=True)
class Course:
    """The progress of an undisturbed run: seconds since its start."""

    built: float  #: models, data and environment are there
    saved: float  #: the first checkpoint is
    end: float
    iterations: int
    done: int = 0  #: iterations, at the start

    @property
    def left(self) -> int:
        """Iterations still to do."""
        return self.iterations - self.done

    def rest(self, done: int) -> Course:
        """The progress of a run that resumes after this many iterations."""
        return replace(self, end=self.end - self.pace * done, done=done)

    @property
    def pace(self) -> float:
        """Seconds an iteration."""
        return (self.end - self.saved) / self.left

    def reached(self, attempt: Attempt, draw: Random) -> bool:
        """Waits for a moment drawn evenly from all that it takes; whether the run is still there then.

        Seconds count until all is built, and then iterations: another program that takes the processor's time does
        not move them.
        """
        moment = draw.uniform(0.0, LATEST * self.end)
        if moment < self.built:
            return attempt.lives_until(moment)
        place = self.left * (moment - self.built) / (self.end - self.built)
        whole = min(int(place), self.left)
        return (
            attempt.lives_to_see(attempt.built)
            and attempt.lives_to_see(lambda: attempt.rows > self.done + whole)
            and attempt.lives_until(attempt.seconds + (place - whole) * self.pace)
        )


@dataclass(frozen=True)
class Hit:
    """A disturbance of a run, and the ends that are right after it."""

    seconds: float  #: since the start
    codes: frozenset[int] | None = None  #: exit codes that are right; None: any
    within: float = SOON  #: seconds to the end


#: Does it; None for a run that ended before.
Strike = Callable[[Attempt, Course, Random], Hit | None]


@dataclass(frozen=True)
class Kind:
    """A way to disturb a run."""

    name: str
    strike: Strike
    processes: int = 1  #: at least
    overrides: tuple[str, ...] = ()
    small_disk: bool = False  #: whether the run wants a disk of its own


def kill(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9``, of all processes at once or of the first, at any moment."""
    group = draw.random() < 0.5
    return killed(attempt, group=group) if course.reached(attempt, draw) else None


def killed(attempt: Attempt, *, group: bool = True) -> Hit:
    attempt.signal(signal.SIGKILL, group=group)
    return Hit(attempt.seconds, frozenset({-signal.SIGKILL}))


def terminate(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """SIGTERM at any moment: the run exits with 75 ("run the same command again"), or it was done."""
    if not course.reached(attempt, draw):
        return None
    # Before Python has read the first lines, there is no signal handler.
    deaf = set() if attempt.listens_to(signal.SIGTERM) else {-signal.SIGTERM}
    attempt.signal(signal.SIGTERM)
    return Hit(attempt.seconds, frozenset({0, os.EX_TEMPFAIL} | deaf))


def kill_early(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9`` between the start of the first validation and the first checkpoint."""
    if not attempt.lives_to_see(attempt.built):
        return None
    moment = attempt.seconds + draw.uniform(0.0, course.saved - course.built)
    return killed(attempt) if attempt.lives_until(moment) else None


def kill_writing(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9`` while a checkpoint is being written."""
    checkpoints = attempt.folder / "checkpoints"

    def writes() -> bool:
        try:
            return any(name.startswith(".") for name in os.listdir(checkpoints))
        except FileNotFoundError:
            return False

    in_time = course.reached(attempt, draw) and attempt.lives_to_see(writes, look=0.0005)
    return killed(attempt) if in_time else None


def damage(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9``; then the newest checkpoint is truncated, or one bit of it is flipped."""
    newest, previous = (attempt.folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    if not (course.reached(attempt, draw) and attempt.lives_to_see(previous.exists)):
        return None
    hit = killed(attempt)
    attempt.process.wait()
    size = newest.stat().st_size
    place = draw.randrange(size)
    damaged = newest.with_name("damaged")  # the file may be a hard link, whose other name must stay intact
    content = bytearray(newest.read_bytes())
    if draw.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    damaged.write_bytes(content)
    damaged.rename(newest)
    return hit


def kill_rank(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9`` of one of several processes: the others must not wait for it forever."""
    return one_killed(attempt, course, draw, Hit(0.0, frozenset({0, 1})))


def kill_rank_restarting(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """``kill -9`` of one of several processes, if the run restarts them by itself."""
    return one_killed(attempt, course, draw, Hit(0.0, frozenset({0}), within=SOON + 5 * course.end))


def one_killed(attempt: Attempt, course: Course, draw: Random, right: Hit) -> Hit | None:
    if not (course.reached(attempt, draw) and attempt.lives_to_see(lambda: len(attempt.ranks()) > 1)):
        return None
    ranks = attempt.ranks()
    if not ranks:
        return None
    os.kill(draw.choice(ranks).pid, signal.SIGKILL)
    return Hit(attempt.seconds, right.codes, right.within)


def fill_disk(attempt: Attempt, course: Course, draw: Random) -> Hit | None:
    """The disk is full for a while. The run may end or continue."""
    hold = draw.uniform(0.5, 4.0)
    if not course.reached(attempt, draw):
        return None
    hit = Hit(attempt.seconds, within=SOON + 5 * course.end)
    with Ballast(attempt.folder.parent / "ballast"):
        attempt.lives_until(hit.seconds + hold)
    return hit


class Ballast:
    """A file that fills the rest of a disk, repeatedly, until it is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        with self.path.open("wb", buffering=0) as file:
            block = bytes(2**20)
            while block:
                try:
                    file.write(block)
                except OSError:
                    block = block[: len(block) // 2]  # fills the last bytes as well

    def __exit__(self, *_: object) -> None:
        self.path.unlink()


class SmallDisk:
    """A disk in memory, mounted at a folder. Needs root.

    Raises:
        PermissionError: when mounting is not allowed.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self.megabytes = megabytes

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        size = f"size={self.megabytes}m"
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.folder], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise PermissionError("mounting is not allowed here") from error

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=False)


def may_mount(folder: Path) -> bool:
    """Whether small disks can be mounted."""
    try:
        with SmallDisk(folder, 1):
            return True
    except PermissionError:
        return False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill -9", kill),
        Kind("SIGTERM", terminate),
        Kind("before the first checkpoint", kill_early),
        Kind("while writing", kill_writing),
        Kind("newest damaged", damage),
        Kind("disk full", fill_disk, small_disk=True),
        Kind("one rank", kill_rank, processes=2),
        Kind(
            "one rank, restarts",
            kill_rank_restarting,
            processes=2,
            overrides=("hardware.max_restarts=3",),
        ),
    )
}
