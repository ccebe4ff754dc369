"""The sampling axis: which groups of completions are trained on."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import check_range


@dataclass(frozen=True)
class DynamicSampling:
    """Groups whose rewards are all equal give no gradient: they are dropped, and other prompts are sampled instead.

    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, section 3.2.

    Args:
        rounds: largest number of times that dropped groups are replaced. Groups whose rewards are still all equal are
            left out of the update.
    """

    rounds: int

    def __post_init__(self) -> None:
        check_range("algo.sampling.rounds", self.rounds, 1)

    def spread(self, rollout: Rollout) -> Bool[Tensor, " B"]:
        """True for the sequences of groups (rows of equal ``group_ids``) whose rewards are not all equal."""
        assert rollout.rewards is not None
        ids, group = rollout.group_ids.unique(return_inverse=True)
        groups = rollout.rewards.new_zeros(len(ids))
        least = groups.scatter_reduce(0, group, rollout.rewards, "amin", include_self=False)
        most = groups.scatter_reduce(0, group, rollout.rewards, "amax", include_self=False)
        return (most > least)[group]
