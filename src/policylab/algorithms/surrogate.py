"""The surrogate axis: the loss whose gradient moves the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.errors import check_range
from policylab.functional.ratios import sequence_log_ratio
from policylab.functional.surrogates import (
    at_bound,
    clipped,
    clipped_ratio_loss,
    logprob_loss,
    ratio_loss,
    weighted_logprob_loss,
)

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


@runtime_checkable
class Surrogate(Protocol):
    """Per-token loss, and 1 where its bounds take effect."""

    on_policy: ClassVar[bool]  #: right for only one update of a rollout

    def loss(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken: ...

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken: ...


@dataclass(frozen=True)
class LogProb:
    """REINFORCE: ``-A log pi``. Right for one update of a rollout; more would be off-policy without correction."""

    on_policy: ClassVar[bool] = True

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return logprob_loss(logprobs, advantages)

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken:
        return torch.zeros_like(logprobs)


@dataclass(frozen=True)
class Ratio:
    """TRPO's ``-ratio A``, arXiv:1502.05477, eq. 14, without bounds: for an update that bounds the step itself."""

    on_policy: ClassVar[bool] = False

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        return ratio_loss(logprobs - old_logprobs, advantages)

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken:
        return torch.zeros_like(logprobs)


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped ratio, arXiv:1707.06347, eq. 7, with the dual clip of arXiv:1912.09729, eq. 5.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low`` ...
        clip_high: ... and rise to ``1 + clip_high`` before a token loses its gradient.
        dual_clip: with a negative advantage a token also loses its gradient once its ratio is above this. None: never;
            one token that became likely can then outweigh all others.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    on_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("algo.surrogate.clip_low", self.clip_low, 0, 1)
        check_range("algo.surrogate.clip_high", self.clip_high, 0)
        check_range("algo.surrogate.dual_clip", self.dual_clip, 1 + self.clip_high, above=True)

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        log_ratio = logprobs - old_logprobs
        return clipped_ratio_loss(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken:
        log_ratio = logprobs - old_logprobs
        return clipped(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True)
class SequenceRatio:
    """GSPO: one clipped ratio a sequence, the geometric mean of its tokens'. arXiv:2507.18071, eq. 5 to 7.

    Each token has its sequence's loss, so that the mean over the sequence is that of the paper. If the advantage varies
    within a sequence, its mean over the tokens within their bounds counts.

    Args:
        clip_low: the sequence's ratio may fall to ``1 - clip_low`` ...
        clip_high: ... and rise to ``1 + clip_high`` before the sequence loses its gradient. A mean over many tokens
            changes little, so these bounds are a hundred times smaller than PPO's.
    """

    clip_low: float
    clip_high: float
    on_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("algo.surrogate.clip_low", self.clip_low, 0, 1)
        check_range("algo.surrogate.clip_high", self.clip_high, 0)

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
        return clipped_ratio_loss(log_ratio, advantages, self.clip_low, self.clip_high, None)

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken:
        log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
        return clipped(log_ratio, advantages, self.clip_low, self.clip_high, None)


@dataclass(frozen=True)
class CISPO:
    """``-w A log pi`` with a clipped ratio as constant weight ``w``: arXiv:2506.13585, eq. 4 and 5.

    ``clipped`` marks where the weight was clipped; the token keeps its gradient.

    Args:
        clip_low: the weight is at least ``1 - clip_low``; None: no lower bound.
        clip_high: the weight is at most ``1 + clip_high``.
    """

    clip_low: float | None
    clip_high: float
    on_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("algo.surrogate.clip_low", self.clip_low, 0, 1)
        check_range("algo.surrogate.clip_high", self.clip_high, 0)

    def loss(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> PerToken:
        log_ratio = logprobs - old_logprobs
        return weighted_logprob_loss(logprobs, log_ratio, advantages, self.clip_low, self.clip_high)

    def clipped(
        self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask
    ) -> PerToken:
        return at_bound(logprobs - old_logprobs, self.clip_low, self.clip_high)
