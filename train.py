"""Train a policy. Choose one option of each group; override any value.

python train.py                            PPO on the embedded model: a minute on a laptop
python train.py algo=reinforce seed=1      another algorithm, another seed
python train.py experiments=NAME           a recipe from experiments/
python train.py -m algo=ppo,reinforce seed=0,1,2                   a sweep: several jobs at once
python train.py -m algo=ppo,reinforce seed=0,1,2 sweep=latest      resumes it
python train.py plan=true                  prints memory and time of the run, and does not start it
python train.py debug=fast                 two iterations, to check that everything works
python train.py algo=grpo init=latest      starts from the policy of the newest run
python train.py resume=latest              resumes the newest run
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.cli.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    from policylab.launch.run import train_job  # here, so that --help need not import torch

    return as_job(lambda: train_job(config))


if __name__ == "__main__":
    guarded(main, __doc__)
