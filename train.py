"""Train a policy: ``python train.py algo=ppo model=gpt2 seed=1``. All options: ``python train.py --help``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.launch.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    from policylab.launch.run import train_job  # here, so that --help need not import torch

    return as_job(lambda: train_job(config))


if __name__ == "__main__":
    guarded(main)
