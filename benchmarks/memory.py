"""Memory of a run after each iteration: does it stay flat?

    python benchmarks/memory.py algo=grpo hardware.products=onednn --iterations 60 --out benchmarks/results/memory.csv

The run is ``python train.py`` with the same arguments (tiny, reviews, all callbacks). The last line is JSON: resident
GiB after loading, after the first, fifth and last iteration, after each, and the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from policylab.distributed.machine import cpu_name
from race.figures import append
from race.lane import memory, peak_memory

ROOT = Path(__file__).parent.parent


class Note(Callback):
    """Writes the memory of the process, in GiB, before the first iteration and after each; at the end its peak."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def on_train_start(self, *_: Any) -> None:
        self._add(memory())

    def on_train_batch_end(self, *_: Any) -> None:
        self._add(memory())

    def on_train_end(self, *_: Any) -> None:
        self._add(peak_memory())

    def _add(self, gib: float | None) -> None:
        with self._file.open("a") as file:
            file.write(f"{gib}\n")


def noted(words: Sequence[str], iterations: int) -> list[float]:
    """GiB of a run before the first iteration, after each, and the peak."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "memory")
        own = [
            f"paths.logs={folder}", f"iterations={iterations}", "hardware=cpu", "logger=csv",
            "+callbacks.memory._target_=memory.Note", f"+callbacks.memory.file={file}",
        ]  # fmt: skip
        paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run(
            [sys.executable, "train.py", *own, *words],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=sys.stderr,
        )
        return [float(line) for line in file.read_text().split()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="for train.py")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a CSV to add a row to")
    given = parser.parse_intermixed_args(argv)
    *gib, peak = noted(given.words, given.iterations)
    at = {"start": 0, "first": 1, "fifth": min(5, given.iterations), "last": given.iterations}
    row = {
        "run": " ".join(given.words),
        "iterations": given.iterations,
        **{name: round(gib[number], 3) for name, number in at.items()},
        "peak": round(peak, 3),
        "each": " ".join(f"{value:.3f}" for value in gib),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if given.out:
        append(given.out, row)
    print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
