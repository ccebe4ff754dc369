"""Show one run on a page, report.html; or summarize finished runs over their seeds: metrics.csv, curve.png, table.md
and config.yaml in one folder.

python report.py run=latest
python report.py "runs='logs/reviews/ppo-tiny/*'" out=experiments/results/NAME
python report.py runs=[PATH,PATH] out=/tmp/report title="'PPO on reviews'" metrics=[val/reward,val/kl]
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from policylab.cli.entry import as_job, guarded, prepare

prepare(__file__)


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
def main(config: DictConfig) -> None:
    from policylab.report.evidence import report_job  # here, so that --help need not import matplotlib

    as_job(lambda: report_job(config))


if __name__ == "__main__":
    guarded(main, __doc__)
