"""On a GPU: every preset, precision and adapter trains, a resumed run equals an uninterrupted one, and FSDP works."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_device import ACCELERATOR, CUDA, MARKS, needs_cuda
from policylab.config import build
from policylab.distributed.sharded_strategy import ShardedStrategy
from small_runs import PRESETS, algo, small, train

pytestmark = MARKS

ROOT = Path(__file__).parents[2]
HERE = {"hardware.accelerator": ACCELERATOR}
#: Metrics of one iteration against the CPU's; what later iterations make of rounding is larger.
CLOSE = {"rel": 1e-3, "abs": 1e-3}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_do_what_they_do_on_the_cpu(preset):
    changes = {"iterations": 1}
    there = train(small(algo(preset), changes | HERE))
    here = train(small(algo(preset), changes))
    for name, value in here.metrics[0].items():
        assert there.metrics[0][name] == pytest.approx(value, **CLOSE), name
    assert there.distance(here) < 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware.precision": "bf16-mixed"},
        {"hardware.precision": "bf16-true"},
        {"hardware.gradient_checkpointing": True},
        {"hardware.deterministic": True},
        {"optim.micro_batch_tokens": 45},
    ],
    ids=lambda changes: next(iter(changes)).split(".")[-1] + "=" + str(next(iter(changes.values()))),
)
@pytest.mark.parametrize("preset", ["ppo", "grpo", "trpo", "dqn"])
def test_settings(preset, changes):
    if preset == "trpo" and str(changes.get("hardware.precision", "")).startswith("bf16"):
        pytest.skip("a trust region is computed in fp32")
    trace = train(small(algo(preset), changes | HERE))
    assert all(math.isfinite(value) for value in trace.metrics[-1].values())
    untrained = train(small(algo(preset), {"iterations": 1, "optim.lr": 1e-12} | HERE))
    assert trace.distance(untrained) > 1e-4


@pytest.mark.parametrize("preset", ["ppo", "grpo", "dqn"])
def test_deterministic_runs_repeat_to_the_bit(preset):
    config = small(algo(preset), {"hardware.deterministic": True} | HERE)
    assert train(config).distance(train(config)) == 0


def run(*words: str) -> None:
    command = [sys.executable, "train.py", f"hardware={ACCELERATOR}", *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("words", [(), ("model/adapter=lora",)], ids=["full", "lora"])
def test_a_resumed_run_equals_an_undisturbed_one(words, tmp_path):
    common = [*words, "debug=fast", "algo=ppo", "hardware.deterministic=true"]
    run(*common, "iterations=4", f"hydra.run.dir={tmp_path}/whole")
    run(*common, "iterations=2", f"hydra.run.dir={tmp_path}/parts")
    run(f"resume={tmp_path}/parts", "iterations=4")
    whole, parts = (
        load_file(tmp_path / name / "model/final/model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_fsdp_of_one_process_equals_none(monkeypatch):
    """With NCCL's collectives and weights sharded over one process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    plain = train(small(algo("grpo"), HERE))

    def sharded(hardware):
        backend = "nccl" if CUDA else "gloo"
        return ShardedStrategy(
            cpu_offload=False, process_group_backend=backend, timeout=timedelta(seconds=60)
        )

    monkeypatch.setattr(build, "strategy", sharded)
    try:
        trace = train(small(algo("grpo"), HERE))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert trace.distance(plain) < 1e-3


@needs_cuda
def test_memory_that_runs_out_halves_the_micro_batches(monkeypatch):
    """With the error of a real GPU."""
    from policylab.training.passes import Passes

    cut = Passes.cut
    hungry = []

    def greedy(self, rollout, rows, units=None):
        parts = cut(self, rollout, rows, units)
        if max(map(len, parts), default=0) > 4:
            hungry.append(len(parts))
            torch.empty(
                2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda"
            )
        return parts

    monkeypatch.setattr(Passes, "cut", greedy)
    with pytest.warns(UserWarning, match="out of memory"):
        trace = train(small(algo("ppo"), HERE))
    assert hungry
    assert all(math.isfinite(value) for value in trace.metrics[-1].values())
