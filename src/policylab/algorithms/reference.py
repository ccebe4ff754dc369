"""The reference: the policy that the KL is measured to."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.errors import check_range


@dataclass(frozen=True)
class FrozenReference:
    """The policy before the first iteration."""


@dataclass(frozen=True)
class MovingReference:
    """An exponential moving average of the policy's weights, moved after each iteration.

    The penalty then limits the pace rather than the distance: "WARP: On the Benefits of Weight Averaged Rewarded
    Policies", arXiv:2406.16768, section 3.1.

    Args:
        decay: share of the old reference that is kept in an iteration; 1 would be frozen, 0 the last policy.
    """

    decay: float

    def __post_init__(self) -> None:
        check_range("algo.kl.reference.decay", self.decay, 0, 1)


Reference = FrozenReference | MovingReference
