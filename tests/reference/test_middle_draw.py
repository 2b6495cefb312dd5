"""The middle one of some draws: its distribution against every combination of draws, and against draws."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import beta, chisquare

from embodied_rl.policies._ordered import MiddleDraw, median_class

F64 = torch.float64


def every(logits, n):
    """[K] chance of each class to be the middle one of n draws: all K ** n combinations added up."""
    p = torch.softmax(logits, -1).tolist()
    q = np.zeros(len(p))
    for draws in product(range(len(p)), repeat=n):
        q[sorted(draws)[n // 2]] += np.prod([p[k] for k in draws])
    return q


def log_probs_of_all(middle, logits):
    """[..., K] log q."""
    k = logits.shape[-1]
    table, chosen = torch.log_softmax(logits, -1), torch.arange(k).expand(logits.shape)
    return torch.stack([middle.log_prob(table, chosen[..., i]) for i in range(k)], dim=-1)


def test_the_worked_example():
    q = log_probs_of_all(MiddleDraw(3), torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()).exp()
    torch.testing.assert_close(q, torch.tensor([0.5, 0.34375, 0.15625], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 3, 5, 7])
def test_every_combination_of_draws(n):
    logits = 2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(n), dtype=F64)
    middle = MiddleDraw(n)
    found = log_probs_of_all(middle, logits)
    expected = np.stack([every(row, n) for row in logits])
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-10)
    entropy = -(expected * np.log(expected)).sum(-1)
    np.testing.assert_allclose(middle.entropy(torch.log_softmax(logits, -1)).numpy(), entropy, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 5, 33])
def test_256_classes_in_float32_against_the_beta_distribution(n):
    """Also far in the tails, where differences of the distribution function would be nothing but rounding."""
    logits = 4 * torch.randn(5, 256, generator=torch.Generator().manual_seed(n), dtype=F64)
    p = torch.softmax(logits, -1).numpy()
    upto = p.cumsum(-1)
    half = (n + 1) / 2
    lower, upper = beta.cdf(upto, half, half), beta.sf(upto, half, half)
    zero, one = np.zeros((5, 1)), np.ones((5, 1))
    from_below = np.diff(lower, axis=-1, prepend=zero)
    from_above = -np.diff(upper, axis=-1, prepend=one)
    expected = np.where(upto < 0.5, from_below, from_above)
    found = log_probs_of_all(MiddleDraw(n), logits.float()).double().numpy()
    likely = expected > 1e-6
    assert likely.sum() > 50
    np.testing.assert_allclose(np.exp(found[likely]), expected[likely], rtol=2e-3)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("n", [1, 3, 9])
def test_draws_follow_it(n):
    """20,000 draws; chi-square, one in a thousand."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0])
    middle, times = MiddleDraw(n), 20_000
    drawn = middle.sample(logits.expand(times, 5), torch.Generator().manual_seed(0))
    q = log_probs_of_all(middle, logits.double()).exp().numpy()
    assert chisquare(np.bincount(drawn.numpy(), minlength=5), times * q).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 5])
def test_the_gradient_is_that_of_finite_differences(n):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    middle, chosen = MiddleDraw(n), torch.tensor(2)
    for of in (lambda x: middle.log_prob(torch.log_softmax(x, -1), chosen), lambda x: middle.entropy(torch.log_softmax(x, -1))):
        assert torch.autograd.gradcheck(of, (logits,))


def test_many_draws_take_the_median():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    share = log_probs_of_all(MiddleDraw(99), logits).exp().gather(-1, median_class(logits).unsqueeze(-1))
    alone = torch.softmax(logits, -1).gather(-1, median_class(logits).unsqueeze(-1))
    assert float(share.mean()) > 0.65 > 0.4 > float(alone.mean())


def test_what_can_hardly_be_drawn_has_a_finite_log_probability_and_gradient():
    logits = torch.tensor([0.0, -200.0, 0.0, -80.0], requires_grad=True)
    found = log_probs_of_all(MiddleDraw(9), logits)
    assert bool(found.isfinite().all())
    found.sum().backward()
    assert bool(logits.grad.isfinite().all())
