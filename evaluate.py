"""Evaluate a run on the validation prompts: metrics, samples, and evaluate.json in its folder.

python evaluate.py run=latest
python evaluate.py run=logs/reviews/ppo-tiny/2026-01-01_12-00-00_s0 checkpoint=last prompts=512
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.cli.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(config: DictConfig) -> float | None:
    from policylab.launch.evaluate import evaluate_job  # here, so that --help need not import torch

    return as_job(lambda: evaluate_job(config))


if __name__ == "__main__":
    guarded(main, __doc__)
