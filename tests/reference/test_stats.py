"""Intervals and tests against SciPy, published tables and hand-worked numbers."""

import math

import numpy as np
import pytest
import scipy.stats

from embodied_rl.stats import (
    Interval,
    bootstrap,
    independent_difference,
    interquartile_mean,
    mcnemar,
    paired_difference,
    wilson,
)


def test_wilson_by_hand():
    # n = 4, 2 successes, z = 1.959964: center 0.5, half = z / (1 + z^2 / 4) * sqrt(1/16 + z^2 / 64)
    z = 1.959963984540054
    half = z / (1 + z * z / 4) * math.sqrt(0.0625 + z * z / 64)
    got = wilson(2, 4)
    assert got.value == 0.5
    assert got.low == pytest.approx(0.5 - half, abs=1e-12) and got.high == pytest.approx(0.5 + half, abs=1e-12)
    assert (round(got.low, 4), round(got.high, 4)) == (0.1500, 0.8500)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (282, 300), (1, 1000)])
def test_wilson_equals_scipy(k, n, confidence):
    reference = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    got = wilson(k, n, confidence)
    assert (got.low, got.high) == (pytest.approx(reference.low, abs=1e-12), pytest.approx(reference.high, abs=1e-12))
    assert 0 <= got.low <= got.value <= got.high <= 1


def test_wilson_needs_episodes():
    for k, n in ((0, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="successes in"):
            wilson(k, n)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 6) == 2 * (1 + 7) / 128
    assert mcnemar(1, 7) == 2 * (1 + 8) / 256


@pytest.mark.parametrize(("b", "c"), [(0, 3), (2, 9), (10, 11), (40, 25), (1500, 1400)])
def test_mcnemar_equals_the_binomial_test(b, c):
    assert mcnemar(b, c) == pytest.approx(scipy.stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("table", "difference", "low", "high"),
    [
        # Published by Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014) for two clinical studies; the
        # second to four digits in the tests of their R package contingencytables.
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
        ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046),
    ],
)
def test_the_paired_difference_equals_published_intervals(table, difference, low, high):
    digits = len(str(low).split(".")[1])
    got = paired_difference(*table)
    assert (round(got.value, digits), round(got.low, digits), round(got.high, digits)) == (difference, low, high)


def test_the_paired_difference_changes_sign_with_the_order_and_is_exact_at_the_ends():
    a, b = paired_difference(40, 12, 5, 30), paired_difference(40, 5, 12, 30)
    assert (a.value, a.low, a.high) == (-b.value, pytest.approx(-b.high), pytest.approx(-b.low))
    equal = paired_difference(10, 0, 0, 10)
    assert equal.value == 0 and equal.low == pytest.approx(-equal.high) and equal.high < 0.2
    sure = paired_difference(0, 50, 0, 0)
    assert sure.value == 1.0 and sure.high == 1.0 and 0.85 < sure.low < 1.0


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.55, 0.2, 0.1, 0.15])
    tables = rng.multinomial(80, probabilities, size=1000)
    hits = [(i := paired_difference(*map(int, t))).low <= 0.1 <= i.high for t in tables]
    assert 0.93 <= np.mean(hits) <= 0.975


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        # Newcombe (Statistics in Medicine 17, 1998), table II, method 10.
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_the_difference_of_independent_rates_equals_published_intervals(a, b, low, high):
    got = independent_difference(wilson(*a), wilson(*b))
    assert got.value == pytest.approx(a[0] / a[1] - b[0] / b[1])
    assert (round(got.low, 4), round(got.high, 4)) == (low, high)
    back = independent_difference(wilson(*b), wilson(*a))
    assert (back.value, back.low, back.high) == (-got.value, -got.high, -got.low)


def test_the_difference_of_independent_means_has_the_ends_of_both_by_hand():
    assert independent_difference(Interval(5, 2, 6), Interval(1, 0, 5)) == Interval(4, -1, 4 + math.sqrt(2))


def test_the_interquartile_mean_by_hand_and_by_scipy():
    assert interquartile_mean([1, 2, 3, 100]) == 2.5
    assert interquartile_mean([9]) == 9
    x = np.random.default_rng(0).normal(size=37)
    assert interquartile_mean(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25), abs=1e-12)


@pytest.mark.parametrize(("name", "function"), [("mean", np.mean), ("median", np.median)])
def test_the_bootstrap_interval_agrees_with_scipy(name, function):
    x = np.random.default_rng(1).exponential(size=200)
    got = bootstrap(x, name, resamples=8000)
    reference = scipy.stats.bootstrap((x,), function, n_resamples=8000, method="percentile", rng=2).confidence_interval
    assert got.value == pytest.approx(function(x))
    width = reference.high - reference.low
    assert abs(got.low - reference.low) < 0.06 * width and abs(got.high - reference.high) < 0.06 * width


def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    x = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    got, half = bootstrap(x, "mean"), 1.96 * x.std() / 20
    assert got.low == pytest.approx(x.mean() - half, abs=0.1 * half) and got.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_the_bootstrap_repeats_for_its_seed_and_knows_equal_values():
    x = np.arange(30.0)
    assert bootstrap(x, "iqm", seed=4) == bootstrap(x, "iqm", seed=4) != bootstrap(x, "iqm", seed=5)
    same = bootstrap([2.0, 2.0, 2.0], "median")
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)


def test_statistics_refuse_nothing_and_nan():
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="expected at least one value and only finite ones"):
            bootstrap(values)
