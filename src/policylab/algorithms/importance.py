"""The importance axis: corrects for a sampler that differs slightly from the trained policy."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import check_range


@dataclass(frozen=True)
class TruncatedImportance:
    """Weights each token's loss by ``min(pi / mu, cap)``, with ``pi`` the training policy before the update
    and ``mu`` the sampler's recorded probability.

    Another engine, or lower precision, samples from a slightly different policy. "IMPALA", arXiv:1802.01561,
    section 4.1, truncates in the same way. The surrogate's own ratio is still to the policy at the start of the update
    (the decoupled objective of "Batch size-invariance for policy optimization", arXiv:2110.00641).

    Args:
        cap: largest weight. If it is never reached, actions are fully corrected; the distribution of visited states is
            still the sampler's.
    """

    cap: float

    def __post_init__(self) -> None:
        check_range("algo.importance.cap", self.cap, 0, above=True)

    def weights(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Weights of the actions; zero elsewhere."""
        assert rollout.policy_logprobs is not None
        weights = (rollout.policy_logprobs - rollout.logprobs).exp().clamp(max=self.cap)
        return weights.masked_fill(~rollout.action_mask, 0.0)
