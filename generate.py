"""Generate completions with trained policies.

python generate.py run=latest prompt="the film was"
python generate.py run=sft-tiny,grpo-tiny prompt="the film was" temperature=0
python generate.py run=latest              asks for one prompt after another
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.cli.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="generate")
def main(config: DictConfig) -> float | None:
    from policylab.launch.generate import generate_job  # here, so that --help need not import torch

    return as_job(lambda: generate_job(config))


if __name__ == "__main__":
    guarded(main, __doc__, free_text=["prompt"])
