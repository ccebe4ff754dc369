"""LightningModules: policy gradient, by minibatches or trust region, Q-learning and supervised training."""

from policylab.training.policy_gradient import PolicyGradient
from policylab.training.q_learning import QTraining
from policylab.training.supervised import SupervisedTraining
from policylab.training.trust_region import TrustRegionPolicyGradient

__all__ = ["PolicyGradient", "QTraining", "SupervisedTraining", "TrustRegionPolicyGradient"]
