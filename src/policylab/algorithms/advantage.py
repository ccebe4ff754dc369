"""The advantage axis: from token rewards to the credit of each action."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.functional.masks import AllSum


@dataclass(frozen=True)
class Estimate:
    """Credit of each action, and the critic's target. Zero outside the action mask."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]  #: the critic's target


class Advantage(ABC):
    """Maps a rollout with token rewards to an :class:`Estimate`.

    Class attributes state what a method needs in addition to token rewards.
    """

    needs_values: ClassVar[bool] = False  #: ``rollout.values``: a critic is built and trained
    needs_greedy: ClassVar[bool] = False  #: ``rollout.greedy_rewards``: one more completion a prompt
    needs_policy_logprobs: ClassVar[bool] = False  #: ``rollout.policy_logprobs``: one more forward pass
    min_group_size: ClassVar[int] = 1  #: smallest number of completions of each prompt
    per_sequence: ClassVar[bool] = False  #: credits all actions of a sequence with its whole reward

    @abstractmethod
    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        """Credit of the actions in ``rollout.loss_mask``. Sequences outside it have no effect."""
