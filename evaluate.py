"""Evaluate a run: ``python evaluate.py run=latest``. All options: ``python evaluate.py --help``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.launch.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(config: DictConfig) -> float | None:
    from policylab.launch.evaluate import evaluate_job  # here, so that --help need not import torch

    return as_job(lambda: evaluate_job(config))


if __name__ == "__main__":
    guarded(main)
