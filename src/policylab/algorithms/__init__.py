"""The parts of an algorithm: one frozen dataclass for each axis."""

from policylab.algorithms.advantage import Advantage, Estimate
from policylab.algorithms.algorithm import Algorithm, LossTerms
from policylab.algorithms.baselines import (
    BestOfGroup,
    GreedyBaseline,
    GroupBaseline,
    LeaveOneOut,
    ReturnToGo,
)
from policylab.algorithms.critic import Critic
from policylab.algorithms.critic_advantages import GAE, NStep, VTrace
from policylab.algorithms.importance import TruncatedImportance
from policylab.algorithms.kl import AdaptiveCoefficient, FixedCoefficient, KLPenalty, NoPenalty
from policylab.algorithms.q_learning import (
    Boltzmann,
    Dueling,
    EpsilonGreedy,
    HardBackup,
    QLearning,
    Replay,
    SoftBackup,
    TargetNetwork,
)
from policylab.algorithms.reduction import SequenceMean, SequenceSum, TokenMean
from policylab.algorithms.reference import FrozenReference, MovingReference
from policylab.algorithms.sampling import DynamicSampling
from policylab.algorithms.supervised import Supervised
from policylab.algorithms.surrogate import CISPO, ClippedRatio, LogProb, Ratio, SequenceRatio, Surrogate
from policylab.algorithms.truncation import MaskTruncated, OverlongPenalty
from policylab.algorithms.trust_region import LineSearch, TrustRegion
from policylab.algorithms.update import MinibatchEpochs, SingleStep
