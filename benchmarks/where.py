"""Where the seconds of an iteration go, by kind of work.

    python benchmarks/where.py --model gpt2 --algo grpo --lengths fixed --precision fp32

The work is that of vs_trl.py, on our side alone. torch's profiler measures the time inside each kernel; the rest of the
wall time is Python and call overhead. Profiling costs a few microseconds per call, which matters for the tiny model:
vs_trl.py has the seconds without it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from policylab.cli.entry import ENVIRONMENT, prepare

os.environ.update(ENVIRONMENT | os.environ)  # before torch, which reads it

import torch
from lightning import Callback, seed_everything
from torch.profiler import ProfilerActivity, profile

from policylab.cli.logs import silence_noise
from policylab.config.build import build
from policylab.distributed.machine import cpu_name
from race import ours, weights
from race.work import Work

ROOT = Path(__file__).parent.parent
#: Kinds of work by a part of the kernel's name; the first match counts.
KINDS = (
    ("attention", ("scaled_dot_product", "flash_attention", "bmm", "aten::_softmax")),
    ("products", ("mkldnn", "linear", "addmm", "aten::mm", "onednn")),
    ("norms", ("layer_norm", "rms_norm", "rsqrt")),
    ("activation", ("gelu", "silu")),
    ("softmax of the head", ("log_softmax", "logsumexp", "exp", "cumsum", "searchsorted")),
    ("optimizer", ("adam",)),
    ("copies", ("copy", "cat", "index", "gather", "scatter", "clone", "fill", "zero", "select")),
)
OTHER, PYTHON = "other kernels", "Python and calls"
#: Iterations before the two that are profiled; they also fill the allocator.
WARM = 2


def kind_of(kernel: str) -> str:
    """The kind of work of a kernel."""
    return next((kind for kind, words in KINDS if any(word in kernel for word in words)), OTHER)


class Clockless:
    """Replaces the race's lane, without a race."""

    def clock(self, _: str) -> Any:
        return torch.autograd.profiler.record_function("rollout")


class Scope:
    """Profiles the work between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total = 0.0

    def start(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.start()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.total = time.perf_counter() - self._began
        self._profile.stop()
        kinds: dict[str, float] = defaultdict(float)
        for event in self._profile.key_averages():
            if event.key != "rollout":
                kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        kinds[PYTHON] = max(0.0, self.total - sum(kinds.values()))
        self.seconds = dict(kinds)


class Look(Callback):
    """Profiles the rollout of one iteration, and the rest of the next one; then ends the run."""

    def __init__(self, engine: Any) -> None:
        self.rollout, self.rest = Scope(), Scope()
        self.iteration = 0
        self.sample = engine.sample
        engine.sample = self.watched

    def watched(self, *arguments: Any, **named: Any) -> Any:
        """The engine's ``sample``."""
        if self.iteration == WARM:
            self.rollout.start()
        rollout = self.sample(*arguments, **named)
        if self.iteration == WARM:
            self.rollout.stop()
        if self.iteration == WARM + 1:
            self.rest.start()
        return rollout

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.iteration == WARM + 1:
            self.rest.stop()
            trainer.should_stop = True
            trainer.limit_val_batches = 0
        self.iteration += 1


def look(work: Work) -> Look:
    """Profiles two iterations of the work."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights.save(work.model, folder, with_critic=work.algo == "ppo")
        prompts = work.prompt_ids(ours.work.vocabulary_of(folder / "policy"))
        silence_noise()
        seed_everything(0, verbose=False)
        experiment = build(ours.config(work, folder, prompts), folder)
        module: Any = experiment.module
        sampler = module.sampler
        sampler.engine = ours.Scheduled(sampler.engine, Clockless(), work.schedule())  # type: ignore[arg-type]
        seen = Look(sampler.engine)
        experiment.trainer.callbacks.append(seen)  # type: ignore[attr-defined]
        experiment.trainer.fit(module, datamodule=experiment.data)
    return seen


def table(work: Work, seen: Look) -> list[dict[str, Any]]:
    """One row for each part and kind of work."""
    rows = []
    for part, scope in (("rollout", seen.rollout), ("update", seen.rest)):
        for kind, seconds in sorted(scope.seconds.items(), key=lambda item: -item[1]):
            rows.append(
                {
                    "race": work.name,
                    "prompts": work.prompts,
                    "part": part,
                    "kind": kind,
                    "seconds": round(seconds, 4),
                    "share": round(seconds / scope.total, 3),
                }
            )
    return rows


def facts() -> dict[str, str]:
    """Machine, versions and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu_name(), "threads": str(torch.get_num_threads()), "torch": torch.__version__, "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, replacing those of the same race on the same processor."""
    before = list(csv.DictReader(path.open())) if path.is_file() else []
    kept = [row for row in before if any(row[key] != rows[0][key] for key in ("race", "cpu"))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(weights.MODELS), default="tiny")
    parser.add_argument("--algo", choices=["ppo", "grpo", "rloo"], default="grpo")
    parser.add_argument("--lengths", choices=["fixed", "varied"], default="fixed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--critic", choices=["separate", "shared"], default="separate")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    work = Work(
        given.model, given.algo, given.lengths, given.precision, given.critic, given.prompts, 4,
        64 if given.model == "tiny" else 32, 16, "cpu",
    )  # fmt: skip
    prepare(str(ROOT / "train.py"))
    rows = table(work, look(work))
    for row in rows:
        print(f"{row['part']:8} {row['kind']:20} {row['seconds']:8.3f} s  {row['share']:6.1%}")
    if given.out:
        append(given.out, [row | facts() for row in rows])
    print(json.dumps({"race": work.name, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
