"""Golden metrics: the metrics of three iterations of each preset on ``model=tiny``, to the last bit.

A refactor must not change ``tests/golden/``. After a change that is meant to change numbers::

    python tests/golden_metrics.py            # all presets
    python tests/golden_metrics.py ppo grpo   # some

The last bits depend on the machine and on the libraries, so each file names them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.update(
    {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "POLICYLAB_PRODUCTS": "onednn"}
)  # before the import of the libraries that read them

import torch
import transformers

from small_runs import PRESETS, algo, assemble, base, train

FOLDER = Path(__file__).parent / "golden"

#: All settings outside the preset, so that defaults of other groups can change.
SETTING = {
    "iterations": 3,
    "seed": 0,
    "task.source": "default",
    "task.prompt_words": 4,
    "task.held_out": 1700,  # held-out rows are not read
    "rollout.prompts": 4,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 8,
    "rollout.temperature": 1.0,
    "optim.lr": 1e-3,
    "optim.critic_lr": None,
    "optim.betas": [0.9, 0.95],
    "optim.eps": 1e-5,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "optim.schedule": "constant",
    "optim.warmup": 0,
    "optim.micro_batch_tokens": None,
}


def run(preset: str) -> list[dict[str, float]]:
    """Metrics of each iteration; in the last one also the norm of the weights, because no metric shows its update."""
    # Supervised training needs completions, which the embedded openings do not have.
    supervised = preset == "sft"
    task = ["task=random_walks", "model=walker"] if supervised else ["task=reviews", "model=tiny"]
    setting = {k: v for k, v in SETTING.items() if not (supervised and k.startswith("task."))}
    trace = train(assemble(base(*task), algo(preset), setting), reward=None)
    weights = torch.cat([trace.policy, trace.critic]).double()
    return [*trace.metrics[:-1], trace.metrics[-1] | {"weights/norm": float(weights.norm())}]


def fingerprint() -> dict[str, str]:
    """The libraries and the machine that these bits depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """Model of the CPU, by which libraries choose their kernels."""
    info = Path("/proc/cpuinfo")
    fields = dict[str, str]()
    for line in info.read_text().split("\n\n")[0].splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    names = ("vendor_id", "cpu family", "model", "model name")
    return " ".join(fields[name] for name in names if name in fields) or platform.processor()


def file_of(preset: str) -> Path:
    return FOLDER / f"{preset}.json"


def read(preset: str) -> dict[str, Any]:
    """``platform`` and ``metrics``, a list with a dict for each iteration."""
    return json.loads(file_of(preset).read_text())


def write(preset: str, metrics: list[dict[str, float]], platform: Mapping[str, str]) -> None:
    """Writes JSON, from which floats are read back exactly."""
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"platform": platform, "metrics": metrics}, indent=1, sort_keys=True, allow_nan=False)
    file_of(preset).write_text(text + "\n")


def main(presets: list[str]) -> None:
    torch.set_num_threads(1)
    for preset in presets or PRESETS:
        metrics = run(preset)
        same = file_of(preset).exists() and read(preset)["metrics"] == metrics
        write(preset, metrics, fingerprint())
        print(f"{preset}: {'unchanged' if same else 'written'}")
    for stale in set(FOLDER.glob("*.json")) - set(map(file_of, PRESETS)):
        stale.unlink()
        print(f"{stale.stem}: deleted")


if __name__ == "__main__":
    main(sys.argv[1:])
