"""Copies per start (Knapsack RL): numbers worked by hand, and the best of all ways to divide them."""

import itertools

import pytest
import torch

from embodied_rl.budget import Budget, share_out


def value(n, p):
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def share(rates, total, low=2, high=32):
    return share_out(torch.tensor(rates, dtype=torch.float64), total, Budget(low=low, high=high)).tolist()


def test_three_starts_by_hand():
    # A third copy is worth p (1 - p) (p (1-p)^2) x (p^(n-1) + (1-p)^(n-1)) with n = 2, that is p^2 (1-p)^3:
    #   p = 1/2: 0.03125, p = 1/4: 0.02637, p = 9/10: 0.00081.
    # A fourth, p^2 (1-p)^3 (p^2 + (1-p)^2): 0.015625 and 0.01648. A fifth at p = 1/4: p^2 (1-p)^3 (p^3 + (1-p)^3) = 0.01154.
    # So copies 7, 8, 9, 10, 11 of the three starts go to 1/2, 1/4, 1/4, 1/2, 1/4.
    rates = [0.5, 0.25, 0.9]
    assert [share(rates, n) for n in range(6, 12)] == [[2, 2, 2], [3, 2, 2], [3, 3, 2], [3, 4, 2], [4, 4, 2], [4, 5, 2]]


@pytest.mark.parametrize(("low", "high", "total"), [(2, 8, 14), (3, 6, 17), (2, 20, 20)])
def test_no_other_division_is_worth_more(low, high, total):
    g = torch.Generator().manual_seed(low)
    for _ in range(6):
        rates = torch.rand(4, generator=g).tolist()
        ways = [w for w in itertools.product(range(low, high + 1), repeat=4) if sum(w) == total]
        best = max(sum(map(value, w, rates)) for w in ways)
        found = share(rates, total, low, high)
        assert sum(found) == total and low <= min(found) and max(found) <= high
        assert sum(map(value, found, rates)) == pytest.approx(best, rel=1e-12)


def test_what_is_worth_nothing_goes_to_the_unsolved():
    assert share([1.0, 0.0, 1.0], 12, high=5) == [5, 5, 2] and share([1.0, 0.0], 9) == [2, 7]
    assert share([0.3, 0.3], 4) == [2, 2]
