"""Critic losses: squared error, clipped, and classification over bins against the normal distribution."""

import pytest
import torch
from scipy.stats import norm

from embodied_rl.loss import Loss, LossFunction
from embodied_rl.value_loss import ValueLoss, hl_gauss_targets, value_loss
from tests.kit import batch_of, evaluation_of, number

F64 = torch.float64


def per_row(kind, value, target, old=None, clip=0.2, **given):
    function = LossFunction(Loss(), 1)
    n = len(target)
    to = lambda x: None if x is None else torch.tensor(x, dtype=F64)  # noqa: E731
    batch = batch_of(torch.zeros(n, 1, dtype=F64), function, target=to(target), value=to(old))
    evaluation = evaluation_of(batch.logp, value=to(value), value_logits=given.get("logits"))
    return value_loss(evaluation, batch, ValueLoss(kind=kind, clip=clip), given.get("value_range"))


def test_squared_error_has_no_factor_of_its_own():
    assert per_row("mse", [1.0, 2.0], [3.0, 1.0]).tolist() == [4.0, 1.0]


def test_the_clipped_loss_is_the_larger_of_two_errors():
    # value moved from 0 to 1, clip 0.2, so the clipped value is 0.2:
    # target 2: (1 - 2)^2 = 1 < (0.2 - 2)^2 = 3.24;   target -1: 4 > 1.44;   a move within the clip: the plain error
    out = per_row("clipped", [1.0, 1.0, 0.1], [2.0, -1.0, 1.0], old=[0.0, 0.0, 0.0])
    assert out.tolist() == pytest.approx([3.24, 4.0, 0.81])


def test_a_value_that_was_clipped_on_its_way_to_the_target_has_no_gradient():
    value = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    function = LossFunction(Loss(), 1)
    target, old = torch.tensor([2.0, -1.0], dtype=F64), torch.zeros(2, dtype=F64)
    batch = batch_of(torch.zeros(2, 1, dtype=F64), function, target=target, value=old)
    value_loss(evaluation_of(batch.logp, value=value), batch, ValueLoss(kind="clipped"), None).sum().backward()
    assert value.grad.tolist() == [0.0, 4.0]  # 2 (1 - -1)


def histogram(y, low, high, bins, sigma_bins=0.75):
    """Mass of N(y, sigma) in every bin, normalised over the support, by scipy."""
    width = (high - low) / bins
    cdf = norm.cdf([low + i * width for i in range(bins + 1)], loc=min(max(y, low), high), scale=sigma_bins * width)
    return [(b - a) / (cdf[-1] - cdf[0]) for a, b in zip(cdf[:-1], cdf[1:], strict=True)]


@pytest.mark.parametrize("y", [-3.0, -1.0, -0.2, 0.0, 0.777, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("support", [(-1.0, 2.0, 7), (-10.0, 10.0, 51)])
def test_hl_gauss_labels_are_the_normal_distribution_over_the_bins(y, support):
    low, high, bins = support
    labels = hl_gauss_targets(torch.tensor([y], dtype=F64), low, high, bins)
    torch.testing.assert_close(labels[0], torch.tensor(histogram(y, low, high, bins), dtype=F64), rtol=0, atol=1e-12)
    assert float(labels.sum()) == pytest.approx(1.0)


def test_the_mean_of_the_labels_is_the_target_in_the_middle_of_the_support():
    target = torch.linspace(-4, 4, 33, dtype=F64)
    labels = hl_gauss_targets(target, -10.0, 10.0, 101)
    centres = -10.0 + 20.0 / 101 * (torch.arange(101, dtype=F64) + 0.5)
    torch.testing.assert_close(labels @ centres, target, rtol=0, atol=1e-3)


def test_hl_gauss_is_the_cross_entropy_of_the_labels():
    # Three bins over [0, 3], target 1.5: labels from scipy; logits log(0.2), log(0.5), log(0.3)
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64)
    expected = -sum(a * float(b) for a, b in zip(histogram(1.5, 0.0, 3.0, 3), p[0].log(), strict=True))
    out = per_row("hl_gauss", [1.6], [1.5], logits=p.log() + 7.0, value_range=(0.0, 3.0))
    assert float(out) == pytest.approx(expected, abs=1e-12)


def test_the_gradient_of_hl_gauss_is_softmax_minus_labels():
    logits = torch.tensor([[0.3, -1.0, 0.7, 0.0]], dtype=F64, requires_grad=True)
    per_row("hl_gauss", [0.0], [0.4], logits=logits, value_range=(-1.0, 1.0)).sum().backward()
    labels = torch.tensor([histogram(0.4, -1.0, 1.0, 4)], dtype=F64)
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1) - labels, rtol=0, atol=1e-12)


def test_the_value_loss_enters_the_total_with_its_coefficient_as_a_mean_over_decisions():
    function = LossFunction(Loss(value=ValueLoss(coef=0.25)), 1)
    logp = torch.zeros(2, 1, dtype=F64)
    target = torch.tensor([3.0, 1.0], dtype=F64)
    batch = batch_of(logp, function, target=target, advantage=torch.zeros(2, dtype=F64))
    value = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    result = function(evaluation_of(logp, value=value), batch, diagnose=True)
    result.total.backward()
    # errors 4 and 1: 0.25 x 2.5; slopes 0.25 x 2 (v - y) / 2
    assert number(result.total) == pytest.approx(0.625)
    assert value.grad.tolist() == pytest.approx([-0.5, 0.25])
    total, count = result.metrics["critic/loss"]
    assert number(total) / float(count) == pytest.approx(2.5)
