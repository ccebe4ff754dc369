"""LightningModules: policy gradient and supervised training."""

from policylab.modules.policy_gradient import PolicyGradient
from policylab.modules.supervised import SupervisedTraining

__all__ = ["PolicyGradient", "SupervisedTraining"]
