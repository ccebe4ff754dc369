"""Statistics over a few seeds.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(arXiv 2108.13264) for the interquartile mean and its bootstrap interval; Student, "The Probable Error of a
Mean" (1908); Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
#: A bootstrap uses all resamples up to this number (6 seeds have 46,656); if there are more, it draws this many.
RESAMPLES = 50_000


@dataclass(frozen=True)
class Estimate:
    """One quantity over the seeds of a group, in the unit of that quantity."""

    count: int
    mean: float
    iqm: float  #: interquartile mean, the mean of the middle half: one outlier does not change it
    low: float | None  #: bounds of the 95 % interval of the mean; None for a single seed
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, interquartile mean and 95 % interval of the mean over seeds.

    The interval is Student's t, not a bootstrap: 5 seeds have 126 distinct resamples, none with a mean
    beyond the worst or best seed, and a bootstrap's "95 %" interval covers the true mean in about 83 %
    of cases. Student's interval is exact for normally distributed seeds, and close otherwise.

    Args:
        values: one finite number a seed, at least one.

    Raises:
        ValueError: without values, or when one is not finite.
    """
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"an estimate needs at least one finite value a seed; got {list(values)}")
    mean = float(np.mean(values))
    iqm = float(interquartile_mean(np.asarray(values)))
    if len(values) == 1:
        return Estimate(1, mean, iqm, None, None)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values))
    return Estimate(len(values), mean, iqm, mean - half, mean + half)


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without its lowest and highest quarter (rounded down to whole values)."""
    return np.asarray(stats.trim_mean(values, proportiontocut=0.25, axis=-1))


def iqm_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the interquartile mean (arXiv 2108.13264, section 4): percentiles over resamples.

    Seeds are resampled with replacement, within one task, so there is one stratum. Up to 6 seeds, all resamples are
    enumerated; with more, resamples are drawn with a fixed seed. The field reports this interval, but it is too narrow:
    with 5 normally distributed seeds it covers the true value in 90 % of cases.

    Args:
        values: one finite number a seed.

    Returns:
        Both bounds; None for a single seed.
    """
    count = len(values)
    if count < 2:
        return None
    if count**count <= RESAMPLES:
        rows = np.array(list(product(range(count), repeat=count)))
    else:
        rows = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    resampled = interquartile_mean(np.asarray(values)[rows])
    low, high = np.quantile(resampled, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="inverted_cdf")
    return float(low), float(high)


def p_above_zero(values: Sequence[float]) -> float | None:
    """p-value: probability of this mean or a higher one if the true mean were 0, by Student's one-sided t-test.

    None for a single seed.
    """
    if len(values) < 2:
        return None
    error = stats.sem(values)
    if error == 0:
        return 0.0 if np.mean(values) > 0 else 1.0
    return float(stats.t.sf(np.mean(values) / error, len(values) - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values with Holm's correction: if all below 0.05 are rejected, at most 5 % of families have a false rejection.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is lower than the one before. None is kept.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[i] = highest
    return corrected
