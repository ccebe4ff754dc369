"""What may be said about a method from a handful of seeds.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(arXiv 2108.13264) for the interquartile mean; Student, "The Probable Error of a Mean" (1908).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """One quantity over the seeds of a group, in the unit of that quantity."""

    count: int
    mean: float
    iqm: float  #: mean of the middle half: what one lucky or broken seed cannot move
    low: float | None  #: bounds of the 95 % interval of the mean; None for a single seed
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, interquartile mean and 95 % interval of the mean over seeds.

    The interval is Student's t, not a bootstrap: of 5 seeds a bootstrap knows 126 distinct resamples, none of
    which reaches beyond the worst and best seed, and its "95 %" interval covers the true mean in about 83 %
    of cases. Student's is exact for normally distributed seeds and errs little otherwise.

    Args:
        values: one finite number a seed, at least one.

    Raises:
        ValueError: without values, or when one is not finite.
    """
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"an estimate needs at least one finite value a seed; got {list(values)}")
    mean = float(np.mean(values))
    iqm = float(stats.trim_mean(values, proportiontocut=0.25))
    if len(values) == 1:
        return Estimate(1, mean, iqm, None, None)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values))
    return Estimate(len(values), mean, iqm, mean - half, mean + half)
