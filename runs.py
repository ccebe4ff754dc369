"""List runs, compare two, and remove the folders of runs that never began.

python runs.py                             all runs in logs/, the newest first
python runs.py algo=ppo,grpo state=done sort=reward
python runs.py compare latest ppo-tiny     where two configs differ, and both results
python runs.py clean                       shows the folders of refused and failed starts
python runs.py clean remove=true           removes them
python runs.py paths.logs=FOLDER           another folder than logs/
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.cli.commands import as_overrides
from policylab.cli.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="runs")
def main(config: DictConfig) -> None:
    from policylab.launch.runs import runs_job  # here, so that --help imports little

    as_job(lambda: runs_job(config))


if __name__ == "__main__":
    guarded(main, __doc__, overrides=as_overrides)
