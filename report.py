"""Sum up runs over seeds: ``python report.py runs="logs/reviews/*/*" out=experiments/results/NAME``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.launch.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
def main(config: DictConfig) -> None:
    from policylab.report.evidence import report_job  # here, so that --help need not import matplotlib

    as_job(lambda: report_job(config))


if __name__ == "__main__":
    guarded(main)
