"""The truncation axis: how completions at or near the length limit are treated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import UserError, check_range


@runtime_checkable
class Truncation(Protocol):
    """Which sequences are trained on, and the amount added to the reward of each."""

    def keeps(self, rollout: Rollout) -> Bool[Tensor, " B"]: ...

    def penalty(self, rollout: Rollout) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True)
class MaskTruncated:
    """Completions cut at the limit are left out of the update, because their reward is of an unfinished text.

    Overlong filtering, arXiv:2503.14476, section 3.4.
    """

    def keeps(self, rollout: Rollout) -> Bool[Tensor, " B"]:
        return rollout.ended

    def penalty(self, rollout: Rollout) -> Float[Tensor, " B"]:
        return torch.zeros_like(rollout.logprobs[:, 0])


@dataclass(frozen=True)
class OverlongPenalty:
    """Soft overlong punishment, arXiv:2503.14476, eq. 13: zero up to ``limit - buffer`` tokens, then falling
    linearly to ``-scale`` at the limit.

    Args:
        limit: tokens of the policy after which a completion is cut.
        buffer: the penalty begins this many tokens before the limit.
        scale: reward lost by a completion that reaches the limit.
    """

    limit: int
    buffer: int
    scale: float

    def __post_init__(self) -> None:
        check_range("algo.truncation.buffer", self.buffer, 1)
        check_range("algo.truncation.scale", self.scale, 0, above=True)
        if self.buffer > self.limit:
            raise UserError(
                f"algo.truncation.buffer is {self.buffer}, more than the {self.limit} tokens of a completion; "
                f"take at most {self.limit}"
            )

    def keeps(self, rollout: Rollout) -> Bool[Tensor, " B"]:
        return torch.ones_like(rollout.ended)

    def penalty(self, rollout: Rollout) -> Float[Tensor, " B"]:
        # only the policy's tokens, without an environment's words
        over = rollout.action_mask.sum(-1) - (self.limit - self.buffer)
        return -self.scale * over.clamp(min=0).to(rollout.logprobs.dtype) / self.buffer
