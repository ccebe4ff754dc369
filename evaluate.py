"""Evaluate runs on validation prompts: metrics, samples, and evaluate.json in their folders.

python evaluate.py run=latest
python evaluate.py run=logs/reviews/ppo-tiny/2026-01-01_12-00-00_s0 checkpoint=last prompts=512
python evaluate.py run=latest temperature=0            greedy
python evaluate.py run=latest n=8 threshold=0.5        pass@1 to pass@8, and the mean of 8 completions
python evaluate.py run=latest task.source=vader        other prompts; reward=NAME scores with another reward
python evaluate.py "run=logs/reviews/*/*" out=all.json
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
    guarded(main, __doc__, open_groups=["task", "reward"])
