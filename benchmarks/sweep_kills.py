"""Does a sweep lose or change anything when the process that runs it is killed?

    python benchmarks/sweep_kills.py --out benchmarks/results/sweep_kills.csv      a quarter of an hour on two cores

Runs a sweep of 12 jobs without interruption. Then starts the same sweep in another folder, kills its parent process
twice with ``kill -9`` at moments drawn from a seed, and restarts it each time at once with ``sweep=FOLDER``, while jobs
of the killed session may still run. Each job must exist once, and equal that of the undisturbed sweep bit for bit: each
tensor and number of the checkpoints, the exported models, ``metrics.csv``, ``samples.jsonl`` and ``summary.json``,
except times. The exit code is 1 if a job is lost or differs. The last line is JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from kills.attempt import Attempt, Hangs
from kills.records import differences
from kills.settings import COMMON
from kills.victim import tail
from policylab.runs.environment import describe_environment
from policylab.runs.status import read_status
from race import figures

ROOT = Path(__file__).parent.parent
AXES = ("algo=ppo,rloo,grpo", "seed=0,1,2,3")
ITERATIONS = 40
#: A sweep of this size that takes more seconds hangs.
PATIENCE = 1800.0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--axes", nargs="+", default=list(AXES), help=f"swept overrides (default {' '.join(AXES)})"
    )
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help=f"iterations of a job (default {ITERATIONS})"
    )
    parser.add_argument("--kills", type=int, default=2, help="kills of the parent (default 2)")
    parser.add_argument("--jobs", type=int, default=2, help="jobs at once (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--folder", type=Path, help="folder in which both sweeps are kept")
    parser.add_argument("--out", type=Path, help="CSV file; a row is added for each job")
    return parser.parse_args(argv)


def jobs_in(sweep: Path) -> list[Path]:
    """The folders of a sweep's jobs."""
    return sorted(path.parent for path in sweep.glob("*/status.json"))


def done(sweep: Path) -> int:
    """The number of finished jobs."""
    return sum(read_status(job)["status"] == "done" for job in jobs_in(sweep))


def undisturbed(words: Sequence[str], sweep: Path, output: Path) -> float:
    """Runs the sweep without interruption; returns its seconds.

    Raises:
        RuntimeError: when the sweep fails.
    """
    attempt = Attempt([*words, f"hydra.sweep.dir={sweep}"], sweep, output)
    try:
        if code := attempt.end(PATIENCE):
            raise RuntimeError(f"the undisturbed sweep ended with {code}: {tail(output)}")
    finally:
        attempt.clear()
    return attempt.seconds


def disturbed(
    words: Sequence[str], sweep: Path, output: Path, moments: Sequence[float]
) -> list[dict[str, Any]]:
    """Runs the same sweep, kills its parent at these seconds after a start, and restarts it each time.

    Returns:
        Exit code, seconds, finished jobs and live processes after each kill, and after the last start.
    """
    sessions, attempts = list[dict[str, Any]](), list[Attempt]()
    try:
        for moment in [*moments, None]:
            place = [f"sweep={sweep}"] if (sweep / "sweep.jsonl").exists() else [f"hydra.sweep.dir={sweep}"]
            attempts.append(attempt := Attempt([*words, *place], sweep, output))
            if moment is not None and attempt.lives_until(moment):
                attempt.signal(signal.SIGKILL)
            code = attempt.end(PATIENCE)
            alive = len(attempt.processes())
            sessions.append({"code": code, "at": attempt.seconds, "done": done(sweep), "alive": alive})
        if left := [command for attempt in attempts for command in attempt.left_behind()]:
            raise Hangs(f"left behind: {'; '.join(left)}")
    finally:
        for attempt in attempts:
            attempt.clear()
    return sessions


def verdict_of(expected: Path, job: Path) -> dict[str, Any]:
    """Whether a job exists and is the same; and its number of starts, without those that ended before it wrote its
    environment."""
    row: dict[str, Any] = {"job": job.name, "starts": 0, "iterations": 0, "verdict": "lost", "why": ""}
    if read_status(job).get("status") != "done":
        return row
    apart = differences(expected, job)
    starts = 1 + len(json.loads((job / "env.json").read_text()).get("earlier_sessions", []))
    return row | {
        "starts": starts,
        "iterations": read_status(job)["iteration"],
        "verdict": "different" if apart else "same",
        "why": "; ".join(apart),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both sweeps, compares them, prints a table."""
    chosen = arguments(argv)
    folder = (chosen.folder or Path(tempfile.mkdtemp(prefix="sweep_kills_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about, draw = describe_environment(ROOT), Random(chosen.seed)
    words = ["-m", *COMMON, *chosen.axes, f"iterations={chosen.iterations}", f"paths.logs={folder}/logs"]
    words.append(f"hydra.launcher.jobs={chosen.jobs}")
    alone, killed = folder / "alone", folder / "killed"
    seconds = undisturbed(words, alone, folder / "alone.txt")
    print(f"by itself: {len(jobs_in(alone))} jobs in {seconds:.0f} s", flush=True)
    parts = [seconds * (n + 0.5 + draw.random()) / (chosen.kills + 1) for n in range(chosen.kills)]
    moments = [part - before for part, before in zip(parts, [0.0, *parts], strict=False)]
    sessions = disturbed(words, killed, folder / "killed.txt", moments)
    for session in sessions:
        print(
            "ended with {code} after {at:.0f} s: {done} jobs done, {alive} processes alive".format(**session)
        )
    code = sessions[-1]["code"]
    if code:
        print(f"the last start ended with {code}: {tail(folder / 'killed.txt')}")
    rows = [
        verdict_of(job, killed / job.name)
        | {
            "killed_at_s": " ".join(f"{session['at']:.1f}" for session in sessions[:-1]),
            "done_at_kills": " ".join(str(session["done"]) for session in sessions[:-1]),
            "alive_after_kills": " ".join(str(session["alive"]) for session in sessions[:-1]),
            "seed": chosen.seed,
            "commit": (about["git"]["commit"] or "")[:10] + ("+" if about["git"]["dirty"] else ""),
            "torch": about["packages"]["torch"],
            "python": about["python"],
            "cpu": about["cpu"],
            "cores": about["cpu_cores"],
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        for job in jobs_in(alone)
    ]
    columns = ("job", "starts", "iterations", "verdict", "why")
    print(figures.table(columns, [[str(row[name]) for name in columns] for row in rows]))
    if chosen.out is not None:
        for row in rows:
            figures.append(chosen.out, row)
    more = {job.name for job in jobs_in(killed)} - {row["job"] for row in rows}
    verdicts = Counter(row["verdict"] for row in rows)
    print(
        json.dumps({"jobs": len(rows), "kills": chosen.kills, **verdicts, "more": sorted(more), "code": code})
    )
    failed = bool(code or more or verdicts["different"] or verdicts["lost"])
    if chosen.folder is None and not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
