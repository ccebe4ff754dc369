"""LightningModules: policy gradient, by minibatches or trust region, Q-learning and supervised training."""

from policylab.modules.policy_gradient import PolicyGradient
from policylab.modules.q_learning import QTraining
from policylab.modules.supervised import SupervisedTraining
from policylab.modules.trust_region import TrustRegionPolicyGradient

__all__ = ["PolicyGradient", "QTraining", "SupervisedTraining", "TrustRegionPolicyGradient"]
