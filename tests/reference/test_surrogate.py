"""The trust region on both signs of the advantage and both sides of the clip, number by number."""

import math

import pytest
import torch

from embodied_rl import loss
from embodied_rl.loss import Loss
from tests.kit import batch_of, evaluation_of, number

F64 = torch.float64
RATIOS = [0.5, 0.9, 1.0, 1.1, 1.5]


def objective_and_slope(ratio, advantage, **switches):
    """The objective of one cell and its derivative by the ratio."""
    r = torch.tensor([[ratio]], dtype=F64, requires_grad=True)
    value, clipped = loss.surrogate(r, torch.tensor([[advantage]], dtype=F64), Loss(**switches))
    value.sum().backward()
    return number(value), float(r.grad), bool(clipped)


def check(table, **switches):
    for ratio, advantage, value, slope in table:
        found = objective_and_slope(ratio, advantage, **switches)
        assert found == (pytest.approx(value), pytest.approx(slope), slope == 0.0), (ratio, advantage, found)


def test_clip_of_good_and_bad_actions_on_both_sides():
    # A = 2: min(2 r, 2 clip(r, 0.8, 1.2));   A = -2: min(-2 r, -2 clip(r)), so only a shrunk ratio is cut
    check(
        [
            (0.5, 2.0, 1.0, 2.0), (0.9, 2.0, 1.8, 2.0), (1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.0), (1.5, 2.0, 2.4, 0.0),
            (0.5, -2.0, -1.6, 0.0), (0.9, -2.0, -1.8, -2.0), (1.0, -2.0, -2.0, -2.0), (1.1, -2.0, -2.2, -2.0), (1.5, -2.0, -3.0, -2.0),
        ]
    )  # fmt: skip


def test_a_higher_upper_clip_lets_good_actions_grow_further():
    # clip to [0.8, 1.28]
    check(
        [(1.25, 1.0, 1.25, 1.0), (1.3, 1.0, 1.28, 0.0), (0.7, -1.0, -0.8, 0.0), (0.7, 1.0, 0.7, 1.0), (1.3, -1.0, -1.3, -1.0)],
        clip_high=0.28,
    )


def test_a_lower_lower_clip_lets_bad_actions_shrink_further():
    check([(0.65, -1.0, -0.65, -1.0), (0.55, -1.0, -0.6, 0.0), (1.3, 1.0, 1.2, 0.0)], clip_low=0.4)


def test_the_dual_clip_bounds_the_loss_of_bad_actions_only():
    # c = 3: for A = -1 the objective never falls below -3; for A = 1 nothing changes
    check([(2.9, -1.0, -2.9, -1.0), (5.0, -1.0, -3.0, 0.0), (5.0, 1.0, 1.2, 0.0), (0.5, -1.0, -0.8, 0.0)], dual_clip=3.0)


def test_without_a_trust_region_the_objective_is_the_ratio_times_the_advantage():
    for ratio in RATIOS:
        for advantage in (2.0, -2.0):
            assert objective_and_slope(ratio, advantage, trust="none") == (pytest.approx(ratio * advantage), advantage, False)


def test_the_quadratic_trust_region_peaks_at_its_edge_and_pulls_back_beyond_it():
    # r A - |A| (r - 1)^2 / (2 e): the slope A - |A| (r - 1) / e is 0 at r = 1 + e sign(A)
    for advantage, edge in ((1.0, 1.1), (-1.0, 0.9)):
        value, slope, _ = objective_and_slope(edge, advantage, trust="quadratic", clip_low=0.1)
        assert value == pytest.approx(advantage * edge - 0.05) and slope == pytest.approx(0.0, abs=1e-12)
    assert objective_and_slope(1.3, 2.0, trust="quadratic", clip_low=0.2) == (pytest.approx(2.15), pytest.approx(-1.0), True)
    assert objective_and_slope(0.7, -2.0, trust="quadratic", clip_low=0.2) == (pytest.approx(-1.85), pytest.approx(1.0), True)
    assert objective_and_slope(1.3, -1.0, trust="quadratic") == (pytest.approx(-1.525), pytest.approx(-2.5), False)


def test_as_a_weight_the_ratio_is_bounded_and_no_gradient_is_cut_off():
    # A = 2: value 2 clip(r, 0.8, 1.2), slope by log r the same, so by r it is divided by r
    for ratio, advantage, bounded in ((0.5, 2.0, 0.8), (1.1, 2.0, 1.1), (1.5, 2.0, 1.2), (0.5, -2.0, 0.8), (1.5, -2.0, 1.2)):
        found = objective_and_slope(ratio, advantage, trust="weight")
        assert found == (pytest.approx(bounded * advantage), pytest.approx(bounded * advantage / ratio), bounded != ratio)
    assert objective_and_slope(0.01, 1.0, trust="weight", clip_low=1.0)[0] == pytest.approx(0.01)


def test_at_ratio_1_every_trust_region_has_the_slope_of_the_policy_gradient():
    for switches in ({}, {"trust": "none"}, {"dual_clip": 2.0}, {"clip_low": 0.01, "clip_high": 0.01}, {"trust": "quadratic"}, {"trust": "weight"}):
        for advantage in (1.5, -0.5):
            assert objective_and_slope(1.0, advantage, **switches)[1] == pytest.approx(advantage)


def whole_loss(log_ratio, advantage, **switches):
    """Total loss, gradient by logp and metrics of rows with one unit each."""
    function = loss.LossFunction(Loss(**switches), chunk=1)
    old = torch.full((len(log_ratio), 1), -1.3, dtype=F64)
    new = (old + torch.tensor(log_ratio, dtype=F64).unsqueeze(-1)).requires_grad_()
    batch = batch_of(old, function, advantage=torch.tensor(advantage, dtype=F64))
    result = function(evaluation_of(new), batch, diagnose=True)
    result.total.backward()
    return number(result.total), new.grad.flatten().tolist(), {k: float(s) / float(n) for k, (s, n) in result.metrics.items()}


def test_the_loss_is_the_negative_mean_and_its_gradient_points_uphill():
    # ratios 1.5, 0.5, 1: objectives 1.2 (cut), -0.8 (cut), 2: loss -(2.4) / 3; slope by logp is -r A / 3 = -2/3
    total, grad, metrics = whole_loss([math.log(1.5), math.log(0.5), 0.0], [1.0, -1.0, 2.0])
    assert total == pytest.approx(-0.8, abs=1e-7)
    assert grad == [0.0, 0.0, pytest.approx(-2 / 3, abs=1e-7)]
    assert metrics["actor/policy_loss"] == pytest.approx(-0.8, abs=1e-7)
    assert metrics["actor/clip_fraction"] == pytest.approx(2 / 3, abs=1e-7)


def test_the_largest_ratio_is_reported_once():
    function = loss.LossFunction(Loss(), chunk=1)
    old = torch.zeros(2, 1, dtype=F64)
    batch = batch_of(old, function)
    metrics = function(evaluation_of(old + math.log(3.0)), batch, diagnose=True).metrics
    value, count = metrics["actor/ratio_max"]
    assert number(value) == pytest.approx(3.0) and math.isnan(float(count))


def test_the_entropy_bonus_is_subtracted_with_the_weight_of_its_cell():
    function = loss.LossFunction(Loss(entropy_coef=0.5), chunk=1)
    logp = torch.zeros(2, 3, dtype=F64)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=F64, requires_grad=True)
    batch = batch_of(logp, function, advantage=torch.zeros(2, dtype=F64))
    total = function(evaluation_of(logp, entropy=entropy), batch).total
    total.backward()
    # decisions have entropies 6 and 15, mean 10.5
    assert number(total) == pytest.approx(-5.25)
    torch.testing.assert_close(entropy.grad, torch.full((2, 3), -0.25, dtype=F64))


def test_zero_weights_of_regularisers_build_no_gradient():
    function = loss.LossFunction(Loss(), chunk=1)
    logp = torch.zeros(2, 3, dtype=F64)
    entropy = torch.ones(2, 3, dtype=F64, requires_grad=True)
    batch = batch_of(logp, function, logp_ref=torch.ones(2, 3, dtype=F64), advantage=torch.zeros(2, dtype=F64))
    total = function(evaluation_of(logp.requires_grad_(), entropy=entropy), batch, diagnose=True).total
    total.backward()
    assert entropy.grad is None
    assert number(total) == 0.0
