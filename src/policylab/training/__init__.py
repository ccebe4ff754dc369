"""Training: LightningModules, and the parts that they are made of, which do not know Lightning.

`PolicyGradient` samples, and moves the policy by a `MinibatchUpdater` or a `TrustRegionUpdater`; `QTraining` learns
from a replay memory, `SupervisedTraining` from completions in the data.
"""

from policylab.training.policy_gradient import PolicyGradient
from policylab.training.q_learning import QTraining
from policylab.training.supervised import SupervisedTraining
from policylab.training.trust_region import TrustRegionUpdater

__all__ = ["PolicyGradient", "QTraining", "SupervisedTraining", "TrustRegionUpdater"]
