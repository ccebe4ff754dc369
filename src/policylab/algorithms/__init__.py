"""What an algorithm is made of: one frozen part for each axis."""

from policylab.algorithms.advantage import GAE, Estimate, ReturnToGo
from policylab.algorithms.algorithm import Algorithm, LossTerms
from policylab.algorithms.critic import Critic
from policylab.algorithms.kl import AdaptiveCoefficient, FixedCoefficient, KLPenalty
from policylab.algorithms.reduction import SequenceMean, SequenceSum, TokenMean
from policylab.algorithms.supervised import Supervised
from policylab.algorithms.surrogate import ClippedRatio, LogProb
from policylab.algorithms.update import MinibatchEpochs

__all__ = [
    "GAE",
    "AdaptiveCoefficient",
    "Algorithm",
    "ClippedRatio",
    "Critic",
    "Estimate",
    "FixedCoefficient",
    "KLPenalty",
    "LogProb",
    "LossTerms",
    "MinibatchEpochs",
    "ReturnToGo",
    "SequenceMean",
    "SequenceSum",
    "Supervised",
    "TokenMean",
]
