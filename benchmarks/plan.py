"""Compares the memory in ``plan=true`` with the measured memory of runs.

    python benchmarks/plan.py                       all configs, some twenty minutes on two cores
    python benchmarks/plan.py --only tiny-ppo       one of them
    python benchmarks/plan.py --out benchmarks/results/plan.csv
    python benchmarks/plan.py --out benchmarks/results/plan.csv --replan      new plans, earlier measurements

Each config is planned without weights and then run for some iterations by ``train.py`` in a separate process, with a
checkpoint after every iteration. The peak of that process's resident memory, libraries included, is compared with the
plan's largest moment. The plan's figure for libraries is a measured constant, a large part of a small model's sum, so a
second column excludes it. The exit code is 1 when a sum is off by more than ``--bound``. Times are planned and measured
too, but not checked, because other programs may run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from policylab.config import resolvers
from policylab.distributed.machine import cpu_name
from policylab.runs.environment import git_state, package_versions

ROOT = Path(__file__).parent.parent
MIB = 2**20
COMMON = (
    "hardware=cpu", "callbacks=none", "callbacks.checkpoint.every=1", "validation.prompts=8",
    "validation.every=1000000",
)  # fmt: skip
MODELS = {
    "tiny": ("model=tiny", "iterations=40"),
    "gpt2": ("model=gpt2_scratch", "model.vocab_size=50257", "iterations=4"),
    "smollm2": ("model=smollm2", "iterations=4"),
}
#: Other settings that differ between configs, so that plans are not fitted to one.
CASES: dict[str, tuple[str, ...]] = {
    "tiny-ppo": ("algo=ppo",),
    "tiny-grpo-8": ("algo=grpo", "rollout.prompts=8"),
    "tiny-ppo-separate": ("algo=ppo", "algo/critic=separate", "rollout.max_new_tokens=48"),
    "tiny-reinforce-large": ("algo=reinforce", "rollout.prompts=128", "rollout.group_size=8"),
    "tiny-trpo": ("algo=trpo",),
    "tiny-dqn": ("algo=dqn",),
    "gpt2-reinforce": ("algo=reinforce", "rollout.prompts=8"),
    "gpt2-ppo": ("algo=ppo", "rollout.prompts=16"),
    "gpt2-ppo-separate": ("algo=ppo", "algo/critic=separate", "rollout.prompts=8"),
    "gpt2-grpo-long": ("algo=grpo", "rollout.prompts=4", "rollout.max_new_tokens=256"),
    "gpt2-grpo-checkpointing": (
        "algo=grpo", "rollout.prompts=4", "rollout.max_new_tokens=256", "hardware.gradient_checkpointing=true",
    ),
    "gpt2-grpo-bf16": ("algo=grpo", "rollout.prompts=16", "hardware.precision=bf16-mixed"),
    "gpt2-grpo-lora": ("algo=grpo", "rollout.prompts=16", "model/adapter=lora"),
    "smollm2-grpo": ("algo=grpo", "rollout.prompts=8"),
    "smollm2-ppo-separate": ("algo=ppo", "algo/critic=separate", "rollout.prompts=8"),
    "smollm2-grpo-small-passes": ("algo=grpo", "rollout.prompts=16", "optim.micro_batch_tokens=400"),
    "smollm2-grpo-bf16-true": ("algo=grpo", "rollout.prompts=8", "hardware.precision=bf16-true"),
    "smollm2-reinforce-frozen": ("algo=reinforce", "rollout.prompts=8", "optim.frozen_layers=20"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A config's plan and measurement. Memory in MiB."""

    case: str
    planned: int
    measured: int
    off: float  #: planned over measured, less 1
    planned_without_libraries: int
    measured_without_libraries: int
    off_without_libraries: float
    moment: str  #: that takes most, by the plan
    planned_s: float  #: an iteration
    measured_s: float
    command: str
    machine: str
    memory: int  #: of the machine
    python: str
    torch: str
    transformers: str
    commit: str
    date: str


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), help="some of the configs")
    parser.add_argument("--bound", type=float, default=0.25, help="share that a plan may be off by (0.25)")
    parser.add_argument("--out", type=Path, help="a CSV to write; rows of other configs are kept")
    parser.add_argument(
        "--replan", action="store_true", help="run nothing: compare new plans with the CSV's runs"
    )
    chosen = parser.parse_args(argv)
    if chosen.replan and not (chosen.out and chosen.out.is_file()):
        parser.error("--replan needs --out, and a CSV there")
    return chosen


def overrides(case: str) -> list[str]:
    """The overrides of a case's command line."""
    return [*COMMON, *MODELS[case.partition("-")[0]], *CASES[case]]


def planned(words: list[str]) -> tuple[str, float, float, float]:
    """The largest moment, its bytes, those of the libraries in it, and seconds of an iteration."""
    from policylab.planning.memory import peak
    from policylab.planning.plan import rates_for
    from policylab.planning.read import describe
    from policylab.planning.work import work

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [*words, "paths.run=nowhere"])
    job = describe(config)
    most = peak(job)
    return most.name, most.total, most.parts["libraries"], work(job, rates_for(config, job)).total_seconds


def measured(words: list[str]) -> tuple[float, float]:
    """Peak bytes of the process that trains, and seconds of its fastest iteration.

    Raises:
        RuntimeError: when it fails, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *words, f"hydra.run.dir={folder}/run"]
        said = Path(folder) / "said"
        with said.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(
                f"{shlex.join(command)} ended with {process.returncode}:\n{said.read_text()[-2000:]}"
            )
        table = csv.DictReader((Path(folder) / "run/metrics.csv").open())
        times = [float(row["perf/iteration_s"]) for row in table if row["perf/iteration_s"]]
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), min(times)


def plan_of(case: str, run: float) -> dict[str, Any]:
    """The columns of a plan, compared with the measured bytes."""
    moment, plan, libraries, plan_s = planned(overrides(case))
    return {
        "case": case,
        "planned": round(plan / MIB),
        "off": round(plan / run - 1, 3),
        "planned_without_libraries": round((plan - libraries) / MIB),
        "measured_without_libraries": round((run - libraries) / MIB),
        "off_without_libraries": round((plan - libraries) / (run - libraries) - 1, 3),
        "moment": moment,
        "planned_s": round(plan_s, 2),
    }


def replanned(file: Path) -> list[Row]:
    """Rows of a CSV with new plans."""
    columns = {field.name: field.type for field in fields(Row)}
    kinds: dict[Any, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    rows = [{n: kinds[columns[n]](v) for n, v in row.items()} for row in csv.DictReader(file.open())]
    return [Row(**row | plan_of(row["case"], row["measured"] * MIB)) for row in rows if row["case"] in CASES]


def compare(case: str) -> Row:
    """Plans a case and runs it."""
    words = overrides(case)
    run, run_s = measured(words)
    versions = package_versions()
    return Row(
        **plan_of(case, run),
        measured=round(run / MIB),
        measured_s=round(run_s, 2),
        command=shlex.join(["python", "train.py", *words]),
        machine=f"{cpu_name()}, {os.cpu_count()} cores",
        memory=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB),
        python=platform.python_version(),
        torch=versions["torch"],
        transformers=versions["transformers"],
        commit=str(git_state(ROOT)["commit"])[:10],
        date=datetime.date.today().isoformat(),
    )


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| config | planned | measured | off | off without libraries | largest moment |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.case} | {row.planned:,} | {row.measured:,} | {row.off:+.0%} | {row.off_without_libraries:+.0%} | "
            f"{row.moment} |"
        )
    return "\n".join(lines)


def write(file: Path, found: Sequence[Row]) -> None:
    """Writes one row per config; rows of configs that were not run are kept."""
    names = [field.name for field in fields(Row)]
    kept = list(csv.DictReader(file.open())) if file.is_file() else []
    new = {row.case: {name: getattr(row, name) for name in names} for row in found}
    known = {row["case"]: row for row in kept} | new
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[case] for case in CASES if case in known)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    resolvers.register(ROOT)
    found = replanned(chosen.out) if chosen.replan else []
    if chosen.replan:
        write(chosen.out, found)
    for case in [] if chosen.replan else chosen.only or CASES:
        found.append(compare(case))
        print(table(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if chosen.out:
            write(chosen.out, found)
    print(table(found))
    worst = max((abs(row.off) for row in found), default=0.0)
    print(
        json.dumps(
            {"configs": len(found), "worst": worst, "bound": chosen.bound, "holds": worst <= chosen.bound}
        )
    )
    return 0 if worst <= chosen.bound else 1


if __name__ == "__main__":
    sys.exit(main())
