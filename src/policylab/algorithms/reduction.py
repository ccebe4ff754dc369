"""The reduction axis: the weight of each token in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from policylab.errors import check_range
from policylab.functional.reduction import sequence_mean_sum, token_sum

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Scalar = Float[Tensor, ""]


@runtime_checkable
class Reduction(Protocol):
    """``denominator`` is summed over micro-batches and processes, then ``__call__`` divides by the sum."""

    def denominator(self, mask: Mask) -> Scalar: ...

    def __call__(self, x: PerToken, mask: Mask, denominator: Scalar) -> Scalar: ...


def _sequences(mask: Mask) -> Scalar:
    return mask.any(-1).sum().float()


@dataclass(frozen=True)
class TokenMean:
    """Every token of the minibatch has the same weight."""

    def denominator(self, mask: Mask) -> Scalar:
        return mask.sum().float()

    def __call__(self, x: PerToken, mask: Mask, denominator: Scalar) -> Scalar:
        return token_sum(x, mask, denominator)


@dataclass(frozen=True)
class SequenceMean:
    """Every sequence has the same weight; a token of a long sequence has less (GRPO, arXiv:2402.03300)."""

    def denominator(self, mask: Mask) -> Scalar:
        return _sequences(mask)

    def __call__(self, x: PerToken, mask: Mask, denominator: Scalar) -> Scalar:
        return sequence_mean_sum(x, mask, denominator)


@dataclass(frozen=True)
class SequenceSum:
    """Sum over the tokens of a sequence, divided by a constant; mean over sequences (Dr. GRPO, arXiv:2503.20783).

    With ``constant: 1`` it is the gradient of the expected reward itself.
    """

    constant: float

    def __post_init__(self) -> None:
        check_range("algo.reduction.constant", self.constant, 0, above=True)

    def denominator(self, mask: Mask) -> Scalar:
        return _sequences(mask) * self.constant

    def __call__(self, x: PerToken, mask: Mask, denominator: Scalar) -> Scalar:
        return token_sum(x, mask, denominator)
