"""The surrogate axis: the loss whose gradient moves the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.errors import demand
from policylab.functional.surrogates import clipped, clipped_ratio_loss, logprob_loss

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


@runtime_checkable
class Surrogate(Protocol):
    """Per-token loss, and 1 where its bounds have silenced a token."""

    on_policy: ClassVar[bool]  #: right for one update a rollout only

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken: ...

    def clipped(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken: ...


@dataclass(frozen=True)
class LogProb:
    """REINFORCE: ``-A log pi``. Right for one update a rollout; more would be off-policy without correction."""

    on_policy: ClassVar[bool] = True

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return logprob_loss(logprobs, advantages)

    def clipped(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return torch.zeros_like(logprobs)


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped ratio, arXiv:1707.06347, eq. 7.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low`` ...
        clip_high: ... and rise to ``1 + clip_high`` before a token loses its gradient.
    """

    clip_low: float
    clip_high: float
    on_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        demand("algo.surrogate.clip_low", self.clip_low, 0, 1)
        demand("algo.surrogate.clip_high", self.clip_high, 0)

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return clipped_ratio_loss(logprobs, old_logprobs, advantages, self.clip_low, self.clip_high)

    def clipped(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return clipped(logprobs, old_logprobs, advantages, self.clip_low, self.clip_high)
