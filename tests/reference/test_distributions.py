"""Densities and entropies of the mlp policy's actions against numerical integration and closed forms."""

import math

import pytest
import torch
from scipy.stats import norm

from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import mlp, spec

F64 = torch.float64


def policy_of(kind="continuous", size=2, **config):
    """A small shaken policy in float64 and one observation that its outputs depend on."""
    env = spec({"x": TensorSpec((3,))}, ActionSpec(kind, size))
    policy = mlp(env, hidden=(8,), shake=0.3, normalize_obs=False, **config).double()
    return policy, {"x": torch.tensor([[0.3, -0.7, 1.1]], dtype=F64)}


def evaluate(policy, obs, units):
    n = len(units)
    with torch.no_grad():
        return policy.evaluate({"x": obs["x"].expand(n, -1)}, units)


def mean_and_std(policy, obs, dim):
    """Read the Gaussian off its own log-density: a parabola through three points."""
    u = torch.zeros(3, policy.num_units, dtype=F64)
    u[:, dim] = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    a, b, c = evaluate(policy, obs, u).logp[:, dim].tolist()
    std = (1 / (2 * b - a - c)) ** 0.5
    return (c - a) / 2 * std**2, std


@pytest.mark.parametrize("std", ["free", "state"])
def test_log_probabilities_are_those_of_a_normal_distribution_per_unit(std):
    policy, obs = policy_of(std=std, init_std=0.7)
    units = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    logp = evaluate(policy, obs, units).logp
    for dim in range(2):
        mean, deviation = mean_and_std(policy, obs, dim)
        torch.testing.assert_close(logp[:, dim], torch.from_numpy(norm.logpdf(units[:, dim], mean, deviation)))


@pytest.mark.parametrize("std", ["free", "state"])
def test_entropy_of_a_gaussian_unit(std):
    policy, obs = policy_of(std=std, init_std=0.7)
    entropy = evaluate(policy, obs, torch.zeros(1, 2, dtype=F64)).entropy[0]
    for dim in range(2):
        _, deviation = mean_and_std(policy, obs, dim)
        assert float(entropy[dim]) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * deviation**2), rel=1e-9)


def squashed_grid(policy, obs, points=20_001):
    """Actions in (-1, 1), their log-density under the policy (first unit), and the spacing of the grid."""
    a = torch.linspace(-1, 1, points + 2, dtype=F64)[1:-1]
    logp = evaluate(policy, obs, torch.atanh(a).unsqueeze(-1)).logp[:, 0]
    return a, logp, float(a[1] - a[0])


@pytest.mark.parametrize("init_std", [0.2, 0.6, 1.0])
def test_the_density_of_squashed_actions_integrates_to_1(init_std):
    policy, obs = policy_of(size=1, squash=True, init_std=init_std)
    _, logp, step = squashed_grid(policy, obs)
    assert float(torch.trapezoid(logp.exp(), dx=step)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("init_std", [0.1, 0.3, 0.6, 1.0])
def test_the_entropy_of_squashed_actions_is_the_integral_of_minus_p_log_p(init_std):
    policy, obs = policy_of(size=1, squash=True, init_std=init_std)
    _, logp, step = squashed_grid(policy, obs)
    integral = float(torch.trapezoid(-logp.exp() * logp, dx=step))
    entropy = float(evaluate(policy, obs, torch.zeros(1, 1, dtype=F64)).entropy)
    assert entropy == pytest.approx(integral, abs=5e-3)


def test_the_change_of_density_is_exact_far_out_where_the_plain_formula_overflows():
    from embodied_rl.policies.mlp import log_tanh_derivative

    u = torch.tensor([0.0, 0.5, -2.0], dtype=F64)
    torch.testing.assert_close(log_tanh_derivative(u), torch.log(1 - torch.tanh(u) ** 2))
    # For large |u| the derivative of tanh is 4 exp(-2 |u|).
    for far in (20.0, -20.0, 300.0, -300.0):
        assert float(log_tanh_derivative(torch.tensor(far))) == pytest.approx(math.log(4) - 2 * abs(far), rel=1e-6)


def test_squashed_actions_lie_strictly_inside_and_are_the_tanh_of_the_units():
    policy, obs = policy_of(size=3, squash=True)
    out = policy.act({"x": obs["x"].expand(50, -1)}, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.action[:, 0], torch.tanh(out.units))
    assert float(out.action.abs().max()) < 1


def test_a_category_has_the_softmax_probability_and_the_entropy_of_its_distribution():
    policy, obs = policy_of("discrete", 4)
    answer = evaluate(policy, obs, torch.arange(4).unsqueeze(-1))
    p = answer.logp[:, 0].exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(answer.entropy[0]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-12)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_samples_follow_the_distribution_they_are_scored_with(kind):
    size = 4 if kind == "discrete" else 1
    policy, obs = policy_of(kind, size)
    n = 40_000
    out = policy.act({"x": obs["x"].expand(n, -1)}, generator=torch.Generator().manual_seed(1))
    if kind == "discrete":
        p = evaluate(policy, obs, torch.arange(4).unsqueeze(-1)).logp[:, 0].exp()
        shares = torch.bincount(out.units[:, 0], minlength=4) / n
        # Four standard errors of a share.
        assert bool(((shares - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()), (shares, p)
    else:
        mean, deviation = mean_and_std(policy, obs, 0)
        assert float(out.units.mean()) == pytest.approx(mean, abs=4 * deviation / n**0.5)
        assert float(out.units.std()) == pytest.approx(deviation, rel=4 / (2 * n) ** 0.5)


def test_greedy_takes_the_mode():
    policy, obs = policy_of("discrete", 4)
    p = evaluate(policy, obs, torch.arange(4).unsqueeze(-1)).logp[:, 0]
    assert int(policy.act(obs, generator=None, greedy=True).units) == int(p.argmax())
    policy, obs = policy_of(size=2)
    units = policy.act(obs, generator=None, greedy=True).units[0]
    assert units.tolist() == pytest.approx([mean_and_std(policy, obs, dim)[0] for dim in range(2)])


def test_the_classifying_critic_answers_the_mean_of_its_bins():
    policy, obs = policy_of(size=1, critic={"kind": "hl_gauss", "bins": 5, "low": -1.0, "high": 4.0})
    answer = evaluate(policy, obs, torch.zeros(1, 1, dtype=F64))
    p = torch.softmax(answer.value_logits[0], -1)
    assert float(answer.value) == pytest.approx(float(p @ torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5], dtype=F64)))


def test_the_normaliser_has_the_mean_and_deviation_of_everything_observed():
    env = spec({"x": TensorSpec((3,))}, ActionSpec("continuous", 1))
    policy = mlp(env, hidden=(8,))
    g = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 3, generator=g) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 9.0, -3.0]) for n in (7, 1, 40)]
    for part in parts:
        policy.observe({"x": part})
    everything = torch.cat(parts).double()
    expected = (everything - everything.mean(0)) / everything.std(0, unbiased=False)
    torch.testing.assert_close(policy.norms["x"](parts[2]).double(), expected[8:], rtol=1e-4, atol=1e-4)


def test_held_actions_are_repeated_and_have_one_probability_each():
    policy, obs = policy_of(size=2, chunk=2, hold=3)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert (policy.chunk, policy.actions_per_decision, policy.num_units) == (6, 2, 4)
    first, second = out.units[0, :2], out.units[0, 2:]
    assert torch.equal(out.action[0], torch.stack([first] * 3 + [second] * 3))


@pytest.mark.parametrize(("std", "init_std"), [("free", 0.01), ("state", 0.005), ("state", 8.0)])
def test_a_deviation_that_starts_at_its_bound_is_refused(std, init_std):
    with pytest.raises(ValueError, match="no gradient would ever move it"):
        policy_of(std=std, init_std=init_std)
