"""Intervals and tests for evaluations: how far a measured number can be trusted. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Literal["mean", "median", "iqm"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that covers the truth with the stated confidence.

    Example: `Interval(0.94, 0.907, 0.962)`, 282 successes in 300 episodes at 95 %.
    """

    value: float
    low: float
    high: float


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Success rate with Wilson's score interval, which stays inside [0, 1] and is right for rates near 0 and 1.

    center = (p + z^2 / 2n) / (1 + z^2 / n);  half = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2)

    Args:
        successes: 0 to episodes.
        episodes: n >= 1.
        confidence: In (0, 1).

    Returns:
        rate: p = successes / n with its interval.

    Raises:
        ValueError: No episodes, or successes outside 0 to episodes.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927),
    209-212.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"wilson: {successes} successes in {episodes} episodes; expected 0 to episodes, at least one")
    n, p, z = episodes, successes / episodes, _quantile(confidence)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding must not put it beside the rate.
    return Interval(p, 0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: could two policies that were tried on the same starts be equally good?

    Under that hypothesis each start that only one of them solves is a fair coin:
    p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)).

    Args:
        only_a: b, starts solved by the first alone.
        only_b: c, starts solved by the second alone.

    Returns:
        p: Probability of a split at least as uneven; 1 when they never differ.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947), 153-157; in its exact binomial form.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"mcnemar: counts must not be negative, got {only_a} and {only_b}")
    n, term, total = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def paired_difference(both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95) -> Interval:
    """Difference of two success rates measured on the same starts, rate_a - rate_b, with Newcombe's interval.

    The Wilson intervals (l, u) of the two rates are joined by square-and-add, with phi, the correlation of the two
    outcomes (shrunk by a continuity correction when positive):

    low = d - sqrt((p_a - l_a)^2 - 2 phi (p_a - l_a) (u_b - p_b) + (u_b - p_b)^2), and high with a and b exchanged.

    Args:
        both: Starts solved by both.
        only_a: Starts solved by the first alone.
        only_b: Starts solved by the second alone.
        neither: Starts solved by none.
        confidence: In (0, 1).

    Returns:
        difference: d with its interval, all in [-1, 1].

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998), 2635-2650, method 10.
    """
    n = both + only_a + only_b + neither
    a, b = wilson(both + only_a, n, confidence), wilson(both + only_b, n, confidence)
    covariance = float(both * neither - only_a * only_b)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    difference = (only_a - only_b) / n
    return Interval(
        difference,
        difference - _square_and_add(a.value - a.low, b.high - b.value, phi),
        difference + _square_and_add(a.high - a.value, b.value - b.low, phi),
    )


def independent_difference(a: Interval, b: Interval) -> Interval:
    """Difference a - b of two estimates that were measured independently, from their intervals.

    low = d - sqrt((a - l_a)^2 + (u_b - b)^2), and high with a and b exchanged: `paired_difference` without a
    correlation where the two are Wilson's.

    Example: wilson(56, 70) and wilson(48, 80) give 0.2, 0.0524 to 0.3339.

    Args:
        a: With its interval, of some confidence.
        b: With its interval, of the same confidence.

    Source: R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of
    eleven methods", Statistics in Medicine 17 (1998), 873-890, method 10; for any estimates G. Y. Zou and A. Donner,
    "Construction of confidence limits about effect measures: a general approach", the same 27 (2008), 1693-1702.
    """
    difference = a.value - b.value
    return Interval(
        difference,
        difference - math.hypot(a.value - a.low, b.high - b.value),
        difference + math.hypot(a.high - a.value, b.value - b.low),
    )


def bootstrap(
    values: ArrayLike, statistic: Statistic = "mean", *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """A statistic of returns with its percentile bootstrap interval.

    Args:
        values: [E] finite numbers.
        statistic: mean, median or iqm (`interquartile_mean`).
        confidence: In (0, 1).
        resamples: Draws of E values with replacement.
        seed: The same seed gives the same interval.

    Returns:
        estimate: The statistic of the values themselves, and the quantiles of the resampled ones.

    Raises:
        ValueError: No values, or one that is not finite.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979), 1-26.
    """
    x = _checked(values)
    function = _STATISTICS[statistic]
    rng = np.random.default_rng(seed)
    # In blocks: all index arrays at once would take resamples * E * 8 bytes.
    block = max(1, 2_000_000 // len(x))
    parts = [
        function(x[rng.integers(len(x), size=(min(block, resamples - start), len(x)))])
        for start in range(0, resamples, block)
    ]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.concatenate(parts), [tail, 100 - tail])
    return Interval(float(function(x[None])[0]), float(low), float(high))


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half: a quarter of the values (rounded down) is dropped at each end.

    Args:
        values: [E] finite numbers.

    Returns:
        iqm: Less moved by outliers than the mean, less noisy than the median.

    Source: R. Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021,
    arXiv:2108.13264, section 4.3.
    """
    return float(_iqm(_checked(values)[None])[0])


def _iqm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    cut = x.shape[1] // 4
    return np.asarray(np.sort(x, axis=1)[:, cut : x.shape[1] - cut].mean(axis=1))


_STATISTICS = {"mean": lambda x: x.mean(axis=1), "median": lambda x: np.median(x, axis=1), "iqm": _iqm}


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if x.size == 0 or not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise ValueError(f"expected at least one value and only finite ones, got {x.size} with {bad} non-finite")
    return x


def _quantile(confidence: float) -> float:
    """The z with P(|N(0, 1)| < z) = confidence."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _square_and_add(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))
