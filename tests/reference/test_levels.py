"""Ratios at four levels and four ways to average, with unequal numbers of units, by hand."""

import pytest
import torch

from embodied_rl import loss
from embodied_rl.loss import Loss
from tests.kit import batch_of, evaluation_of, number

F64 = torch.float64
# Two decisions of one trajectory; chunk 2, two units per action. Unit ratios are small primes.
RATIOS = torch.tensor([[2.0, 3.0, 5.0, 7.0], [11.0, 13.0, 1.0, 1.0]], dtype=F64)
SAME = torch.zeros(2, dtype=torch.int64)


def ratios(level, reduce="sum", mask=None, trajectory=SAME):
    return loss.by_cell(RATIOS.log(), mask, level, reduce, 2, trajectory).exp()


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=0)


def test_a_unit_has_its_own_ratio():
    close(ratios("unit"), RATIOS.tolist())
    close(ratios("unit", "mean"), RATIOS.tolist())


def test_an_action_multiplies_the_units_of_one_control_step():
    close(ratios("action"), [[6.0, 35.0], [143.0, 1.0]])
    close(ratios("action", "mean"), [[6**0.5, 35**0.5], [143**0.5, 1.0]])


def test_units_are_ordered_control_step_by_control_step():
    logs = torch.tensor([[2.0, 3.0, 5.0, 7.0, 11.0, 13.0]], dtype=F64).log()
    close(loss.by_cell(logs, None, "action", "sum", 2, SAME[:1]).exp(), [[30.0, 1001.0]])


def test_a_decision_multiplies_all_its_units():
    close(ratios("decision"), [[210.0], [143.0]])
    close(ratios("decision", "mean"), [[210**0.25], [143**0.25]])


def test_a_trajectory_multiplies_all_its_decisions_and_every_row_carries_it():
    close(ratios("trajectory"), [[30030.0], [30030.0]])
    apart = torch.tensor([4, 1])
    close(ratios("trajectory", trajectory=apart), [[210.0], [143.0]])


def test_gspo_takes_the_geometric_mean_over_the_units_of_the_trajectory():
    close(ratios("trajectory", "mean"), [[30030**0.125]] * 2)


def test_masked_units_neither_multiply_nor_count():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    close(ratios("unit", mask=mask), [[2.0, 3.0, 1.0, 7.0], [11.0, 1.0, 1.0, 1.0]])
    close(ratios("action", mask=mask), [[6.0, 7.0], [11.0, 1.0]])
    close(ratios("action", "mean", mask), [[6**0.5, 7.0], [11.0, 1.0]])
    close(ratios("decision", "mean", mask), [[42 ** (1 / 3)], [11.0]])
    close(ratios("trajectory", "mean", mask), [[462**0.25]] * 2)


def test_trajectories_may_be_interleaved_and_numbered_in_any_way():
    logs = torch.tensor([[2.0], [3.0], [5.0], [7.0]], dtype=F64).log()
    close(loss.by_cell(logs, None, "trajectory", "sum", 1, torch.tensor([9, 4, 9, 4])).exp(), [[10.0], [21.0], [10.0], [21.0]])


# Four decisions with 2, 1, 3 and 0 counting units; the first is one trajectory, the others a second one.
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])
TRAJECTORY = torch.tensor([0, 1, 1, 1])
UNIT_WEIGHTS = {
    # 6 units in all
    "unit_mean": [[1 / 6, 1 / 6, 0], [1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6], [0, 0, 0]],
    # 3 decisions with units of 2, 1 and 3 units
    "decision_mean": [[1 / 6, 1 / 6, 0], [1 / 3, 0, 0], [1 / 9, 1 / 9, 1 / 9], [0, 0, 0]],
    # 2 trajectories of 2 and 4 units
    "trajectory_mean": [[1 / 4, 1 / 4, 0], [1 / 8, 0, 0], [1 / 8, 1 / 8, 1 / 8], [0, 0, 0]],
    # 2 trajectories, each divided by 10 units
    "constant": [[1 / 20, 1 / 20, 0], [1 / 20, 0, 0], [1 / 20, 1 / 20, 1 / 20], [0, 0, 0]],
}


def weights(level, aggregate, mask=MASK, trajectory=TRAJECTORY, chunk=1):
    constant = 10 if aggregate == "constant" else None
    return loss.cell_weights(mask, trajectory, mask.shape[1], chunk, level, aggregate, constant)


@pytest.mark.parametrize("aggregate", UNIT_WEIGHTS)
def test_the_weight_of_a_unit(aggregate):
    torch.testing.assert_close(weights("unit", aggregate), torch.tensor(UNIT_WEIGHTS[aggregate]))


@pytest.mark.parametrize("level", ["decision", "trajectory"])
@pytest.mark.parametrize("aggregate", UNIT_WEIGHTS)
def test_a_decision_weighs_as_much_as_its_units(aggregate, level):
    expected = torch.tensor(UNIT_WEIGHTS[aggregate]).sum(-1, keepdim=True)
    torch.testing.assert_close(weights(level, aggregate), expected)


def test_an_action_weighs_as_much_as_its_units():
    mask = torch.tensor([[True, True, True, False], [False, False, True, False]])
    found = weights("action", "unit_mean", mask, torch.tensor([0, 1]), chunk=2)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25], [0.0, 0.25]]))


def test_no_mask_means_every_unit():
    for aggregate in UNIT_WEIGHTS:
        for level in ("unit", "action", "decision", "trajectory"):
            everything = torch.ones(4, 6, dtype=torch.bool)
            expected = weights(level, aggregate, everything, chunk=3)
            constant = 10 if aggregate == "constant" else None
            torch.testing.assert_close(loss.cell_weights(None, TRAJECTORY, 6, 3, level, aggregate, constant), expected)


def test_the_loss_of_a_whole_step_by_hand():
    # Ratios 2 where units count (trust none), advantages 1, 2, 3, 4: unit_mean of A r over 6 units is
    # (2 + 2 + 4 + 6 + 6 + 6) / 6 = 26 / 6; trajectory_mean (4 / 2 + (4 + 18) / 4) / 2 = 3.75;
    # at decision level ratios are 4, 2, 8, and decision_mean is (4 + 4 + 24) / 3
    cases = {("unit", "unit_mean"): 26 / 6, ("unit", "trajectory_mean"): 3.75, ("decision", "decision_mean"): 32 / 3}
    for (level, aggregate), expected in cases.items():
        function = loss.LossFunction(Loss(ratio=level, aggregate=aggregate, trust="none"), chunk=1)
        old = torch.zeros(4, 3, dtype=F64)
        new = torch.where(MASK, 2.0, float("nan")).double().log()
        advantage = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
        batch = batch_of(old, function, mask=MASK, trajectory=TRAJECTORY, advantage=advantage)
        assert number(function(evaluation_of(new), batch).total) == pytest.approx(-expected, rel=1e-6)


def test_huge_log_ratios_stay_finite():
    function = loss.LossFunction(Loss(trust="none"), chunk=1)
    old = torch.zeros(2, 1)
    new = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    total = function(evaluation_of(new), batch_of(old, function), diagnose=True).total
    total.backward()
    assert bool(torch.isfinite(total)) and bool(torch.isfinite(new.grad).all())
