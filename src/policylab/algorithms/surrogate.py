"""The surrogate axis: the loss whose gradient moves the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.functional.surrogates import clipped, clipped_ratio_loss, logprob_loss


@runtime_checkable
class Surrogate(Protocol):
    """Per-token loss, and which tokens its bounds have silenced."""

    def loss(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]: ...

    def clipped(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]: ...


@dataclass(frozen=True)
class LogProb:
    """REINFORCE: ``-A log pi``. Right for one update a rollout; more would be off-policy without correction."""

    def loss(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        return logprob_loss(logprobs, advantages)

    def clipped(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
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

    def loss(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        return clipped_ratio_loss(logprobs, old_logprobs, advantages, self.clip_low, self.clip_high)

    def clipped(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        return clipped(logprobs, old_logprobs, advantages, self.clip_low, self.clip_high)
