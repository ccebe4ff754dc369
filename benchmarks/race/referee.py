"""Starts the two workers, compares their first update, and lets them run in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policylab.cli.entry import ENVIRONMENT
from race import work
from race.agreement import Agreement, compare
from race.figures import Lap
from race.work import Work

BENCHMARKS = Path(__file__).parents[1]
#: Seconds between two turns, in which the idle side's threads go to sleep.
BREATH = 0.3

Say = Callable[[str], None]


class RaceError(Exception):
    """A side failed, or the sides did different work."""


@dataclass(frozen=True)
class Result:
    """The result of a race. ``ours`` and ``theirs`` hold the workers' own facts."""

    race: Work
    laps: list[tuple[Lap, Lap]]  #: ours and TRL's, of each pair
    agreement: Agreement | None  #: None where the two train different networks
    ours: dict[str, Any]
    theirs: dict[str, Any]


class Worker:
    """A process that waits for its turn."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self._log = name, log
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**environment, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def answer(self) -> dict[str, Any]:
        """The worker's next answer.

        Raises:
            RaceError: when the worker has exited, with the end of its output.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RaceError(f"{self.name} exited:\n" + "\n".join(self._log.read_text().splitlines()[-12:]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, do: str, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.answer()  # raises, with its reason

    def run(self, **command: Any) -> dict[str, Any]:
        """One iteration."""
        time.sleep(BREATH)
        self.send("iterate", **command)
        return self.answer()

    def evaluate(self) -> float:
        """The held-out reward of its current weights."""
        self.send("evaluate")
        return float(self.answer()["reward"])

    def stop(self) -> dict[str, Any]:
        """Stops the worker and returns its last answer."""
        self.send("stop")
        last = self.answer()
        self._process.wait()
        return last

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def workers(
    modules: tuple[str, str], arguments: list[str], folder: Path, trl_python: str
) -> Iterator[tuple[Worker, Worker]]:
    """Our worker and TRL's, which load their models at the same time; both end with the block.

    Args:
        modules: of race/, ours and TRL's.
        folder: for their output.
    """
    sides = [
        Worker(
            "our side",
            [sys.executable, "-m", f"race.{modules[0]}", *arguments],
            folder / "ours.log",
            ENVIRONMENT,  # as train.py sets it
        ),
        Worker(
            "TRL's side",
            [trl_python, "-m", f"race.{modules[1]}", *arguments],
            folder / "theirs.log",
            {"TRL_EXPERIMENTAL_SILENCE": "1"},
        ),
    ]
    try:
        yield sides[0], sides[1]
    finally:
        for side in sides:
            side.kill()


def make_model(race: Work, folder: Path) -> None:
    """Writes the weights that both sides load.

    Raises:
        RaceError: when they cannot be made.
    """
    prepare = [sys.executable, "-m", "race.weights", race.model, str(folder), race.algo]
    made = subprocess.run(prepare, cwd=BENCHMARKS, capture_output=True, text=True)
    if made.returncode:
        raise RaceError(f"the model {race.model} cannot be made:\n{made.stderr[-2000:]}")


def run(race: Work, runs: int, folder: Path, trl_python: str, say: Say) -> Result:
    """Runs the whole race, in an empty folder.

    Raises:
        RaceError: when a side fails, or when prompts, lengths or the first update differ.
    """
    prompts = race.prompt_ids
    make_model(race, folder)
    with workers(("ours", "theirs"), [race.to_json(), str(folder)], folder, trl_python) as (ours, theirs):
        facts = [ours.answer(), theirs.answer()]
        if len({fact["threads"] for fact in facts}) > 1:
            raise RaceError(f"the sides have {facts[0]['threads']} and {facts[1]['threads']} threads")
        fingerprint = work.digest(
            ids for ids in prompts(work.vocabulary_of(folder / "policy")) for _ in range(race.group_size)
        )

        def lap(side: Worker, **command: Any) -> dict[str, Any]:
            answer = side.run(**command)
            if answer["prompts"] != fingerprint:
                raise RaceError(f"{side.name} read other prompts than the given ones")
            if sorted(answer["lengths"]) != sorted(race.schedule()):
                raise RaceError(f"{side.name} sampled completions of other lengths than scheduled")
            return answer

        agreement = first_update(race, folder, ours, theirs, lap)
        say(str(agreement or "the networks differ, so the updates are not compared"))
        laps = []
        for side in (ours, theirs) if runs else ():
            lap(side)  # the first iteration was no typical one
        for number in range(runs):
            first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            timed = {side.name: Lap.of(lap(side)) for side in (first, second)}
            laps.append((timed[ours.name], timed[theirs.name]))
            mine, other = (pair.seconds for pair in laps[-1])
            say(f"pair {number + 1}/{runs}: ours {mine:.2f} s, TRL {other:.2f} s, {other / mine:.2f}x")
        return Result(race, laps, agreement, facts[0] | ours.stop(), facts[1] | theirs.stop())


def first_update(
    race: Work, folder: Path, ours: Worker, theirs: Worker, lap: Callable[..., dict[str, Any]]
) -> Agreement | None:
    """Our side samples and makes an update; TRL's side makes one with the same tokens."""
    gradients = [folder / "gradients" / side for side in ("ours", "theirs")]
    for side in gradients:
        side.mkdir(parents=True)
    mine = lap(ours, gradients=str(gradients[0]))
    other = lap(theirs, gradients=str(gradients[1]), sequences=mine["sequences"])
    if race.algo == "ppo" and race.critic == "shared":
        return None
    agreement = compare(race, (mine["loss"], other["loss"]), *gradients)
    shutil.rmtree(folder / "gradients")
    if agreement.refused:
        raise RaceError(f"the sides make different updates of the same batch: {agreement}")
    return agreement
