"""Kills runs, and checks that they lose and change nothing.

    python benchmarks/chaos.py --runs 36 --out benchmarks/results/chaos.csv      half an hour on two cores
    python benchmarks/chaos.py --runs 3 --settings ppo --kinds "kill -9"         a minute and a half

Each setting is run once without a kill. Then small runs of the same command are killed at moments drawn by a seed,
between the start of the process and a little after its end, and restarted with the same command until they are done;
the last start is not killed. Their files are compared with those of the uninterrupted run: every tensor and number of
the checkpoints, the exported models, ``metrics.csv``, ``samples.jsonl``, ``summary.json``, bit for bit, without times.
The exit code is 1 when a run is lost or different. The last line is JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from kills.kinds import KINDS, Course, Kind, SmallDisk, may_mount
from kills.settings import SETTINGS, Setting
from kills.victim import Fate, compare, disturbed, undisturbed
from policylab.runs.environment import describe_environment
from race import figures

ROOT = Path(__file__).parent.parent
#: Largest number of hits of a run.
HITS = 2
#: Megabytes of a small disk: enough for a run, and soon full.
DISK = 96


@dataclass(frozen=True)
class Run:
    """One of the runs to kill."""

    number: int
    setting: Setting
    kind: Kind

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.number:02}_{self.setting.name}_{self.kind.name.replace(' ', '-').replace(',', '')}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=36, help="runs to kill (default 36)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of kinds and times of the kills (default 0)"
    )
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
        help=f"of {', '.join(SETTINGS)} (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME",
        help=f"of {', '.join(KINDS)} (default all that work here)",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, help="of a run (default: by setting)")
    parser.add_argument("--hits", type=int, default=HITS, help=f"of a run, at most (default {HITS})")
    parser.add_argument("--folder", type=Path, help="keeps all runs; without it only those that went wrong")
    parser.add_argument("--out", type=Path, help="a CSV to add rows to")
    chosen = parser.parse_args(argv)
    for name in ("runs", "hits"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return chosen


def planned(settings: Sequence[Setting], kinds: Sequence[Kind], runs: int, draw: Random) -> list[Run]:
    """The runs and their kinds of kill: all settings and kinds equally often, as far as possible."""
    pairs = [(s, k) for s in settings for k in kinds if s.processes >= k.processes]
    used, plan = Counter[str](), list[Run]()
    for number in range(1, runs + 1):
        draw.shuffle(pairs)
        setting, kind = min(
            pairs, key=lambda p: (used[f"{p[0].name} {p[1].name}"], used[p[0].name] + used[p[1].name])
        )
        used.update([setting.name, kind.name, f"{setting.name} {kind.name}"])
        plan.append(Run(number, setting, kind))
    return plan


def kill_one(run: Run, folder: Path, course: Course, hits: int, seed: int) -> Fate:
    """One run, from its first start to the comparison."""
    place, draw = folder / run.name, Random(f"{seed} {run.name}")
    place.mkdir()
    disk = SmallDisk(place, DISK) if run.kind.small_disk else nullcontext()
    with disk:
        fate = disturbed(
            run.setting, run.kind, place / "run", folder / f"{run.name}.txt", course, draw.randint(1, hits), draw
        )  # fmt: skip
        compare(folder / run.setting.name / "run", place / "run", fate)
        if fate.verdict != "same" and run.kind.small_disk:
            shutil.copytree(place, folder / f"{run.name}_kept", dirs_exist_ok=True)
    return fate


def record(run: Run, fate: Fate, course: Course, seed: int, about: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV."""
    return {
        "run": run.number,
        "setting": run.setting.name,
        "kind": run.kind.name,
        "hits": len(fate.hits),
        "hit_at_s": " ".join(f"{seconds:.2f}" for seconds in fate.hits),
        "exit_codes": " ".join(map(str, fate.codes)),
        "resumes": len(fate.codes) - 1,
        "iterations": run.setting.iterations,
        "iterations_again": fate.again,
        "fallbacks": fate.fallbacks,
        "seconds": round(fate.seconds, 1),
        "uninterrupted_seconds": round(course.end, 1),
        "verdict": fate.verdict,
        "why": fate.why,
        "seed": seed,
        "commit": (about["git"]["commit"] or "")[:10] + ("+" if about["git"]["dirty"] else ""),
        "torch": about["packages"]["torch"],
        "lightning": about["packages"]["lightning"],
        "python": about["python"],
        "cpu": about["cpu"],
        "cores": about["cpu_cores"],
        "system": about["platform"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    columns = ("setting", "kind", "hits", "resumes", "iterations_again", "fallbacks", "seconds", "verdict")
    return figures.table(columns, [[str(row[name]) for name in columns] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Hides the package's warnings of damage, which the table reports, and runs."""
    package = logging.getLogger("policylab")
    before = package.level
    package.setLevel(logging.ERROR)
    try:
        return run_all(arguments(argv))
    finally:
        package.setLevel(before)


def run_all(chosen: argparse.Namespace) -> int:
    """Kills the runs, compares them, and prints the table."""
    folder = (chosen.folder or Path(tempfile.mkdtemp(prefix="chaos_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started, about = time.perf_counter(), describe_environment(ROOT)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", flush=True)

    settings, not_run = [SETTINGS[name] for name in chosen.settings], list[str]()
    if chosen.iterations:
        settings = [replace(setting, iterations=chosen.iterations) for setting in settings]
    kinds = [KINDS[name] for name in chosen.kinds]
    if not may_mount(folder / "disk"):
        not_run = [kind.name for kind in kinds if kind.small_disk]
        kinds = [kind for kind in kinds if not kind.small_disk]
    plan = planned(settings, kinds, chosen.runs, Random(chosen.seed))
    courses = dict[str, Course]()
    for setting in dict.fromkeys(run.setting for run in plan):
        (folder / setting.name).mkdir()
        course = courses[setting.name] = undisturbed(setting, folder / setting.name / "run")
        say(f"{setting.name} by itself: {course.end:.1f} s, the first checkpoint after {course.saved:.1f} s")
    rows, began = list[dict[str, Any]](), time.perf_counter()
    for run in plan:
        course = courses[run.setting.name]
        fate = kill_one(run, folder, course, chosen.hits, chosen.seed)
        rows.append(record(run, fate, course, chosen.seed, about))
        left = (time.perf_counter() - began) / run.number * (len(plan) - run.number)
        hit = " ".join(f"{seconds:.1f}" for seconds in fate.hits) or "never"
        say(
            f"{run.number}/{len(plan)} {run.setting.name}, {run.kind.name}: hit at {hit} s, {len(fate.codes) - 1} "
            f"resumes, {fate.verdict} {fate.why}; about {left / 60:.0f} min left"
        )
        if fate.verdict == "same" and chosen.folder is None:
            shutil.rmtree(folder / run.name)
        if chosen.out is not None:
            figures.append(chosen.out, rows[-1])
    print(table(rows))
    if not_run:
        print(f"not run, since mounting is not allowed here: {', '.join(not_run)}")
    verdicts = Counter(row["verdict"] for row in rows)
    failed = verdicts["lost"] + verdicts["different"]
    if chosen.folder is None and not failed:
        shutil.rmtree(folder)
    elif failed:
        print(f"the runs that went wrong are in {folder}")
    print(
        json.dumps(
            {
                "runs": len(rows),
                "hit": sum(row["hits"] > 0 for row in rows),
                "hits": sum(row["hits"] for row in rows),
                "resumes": sum(row["resumes"] for row in rows),
                "iterations_again": sum(row["iterations_again"] for row in rows),
                "lost": verdicts["lost"],
                "different": verdicts["different"],
                "not_run": not_run,
            }
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
