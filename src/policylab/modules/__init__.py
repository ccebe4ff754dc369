"""LightningModules: policy gradient, by minibatches or trust region, and supervised training."""

from policylab.modules.policy_gradient import PolicyGradient
from policylab.modules.supervised import SupervisedTraining
from policylab.modules.trust_region import TrustRegionPolicyGradient

__all__ = ["PolicyGradient", "SupervisedTraining", "TrustRegionPolicyGradient"]
