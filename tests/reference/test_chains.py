"""Denoising chains against data whose marginals are known exactly, hand-worked numbers, and the DDIM and DDPM papers.

Data are one number from N(0.6, 0.35^2), so at every time x is normal too, and the answer of a perfect network is known.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from embodied_rl.policies._chains import LATEST, gaussian_logp, ode_step, sde_step, times, training_pair

F64 = torch.float64
MEAN, STD = 0.6, 0.35
PROCESSES = ["flow", "diffusion"]
CASES = [("flow", 0.0), ("flow", 0.3), ("flow", 0.7), ("diffusion", 0.0), ("diffusion", 0.5), ("diffusion", 1.0)]
"""Flow: strength of the noise, 0 is the ODE; diffusion: 0 is DDIM, 1 is DDPM."""


def mix(process, t):
    """x_t = alpha a + sigma e."""
    return (1 - t, t) if process == "flow" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))


def marginal(process, t):
    """Mean and standard deviation of x at time t."""
    alpha, sigma = mix(process, t)
    return alpha * MEAN, math.hypot(alpha * STD, sigma)


def perfect(process, x, t):
    """What a network with no error answers: E[e - a | x] or E[e | x], by regression of two normal numbers."""
    alpha, sigma = mix(process, t)
    mean, std = marginal(process, t)
    away = (x - mean) / std**2
    e, a = sigma * away, MEAN + alpha * STD**2 * away
    return e - a if process == "flow" else e


def grid(process, steps):
    return [(now.to(F64), after.to(F64)) for now, after in zip(*times(process, steps), strict=True)]


# ---- marginals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "noise"), CASES)
def test_sampled_chains_have_the_marginals_of_the_data(process, noise):
    """40 000 chains of 200 steps; a mean is off by less than 4 standard errors, a deviation by those and 3 % (the steps
    are finite: 2.4 % with DDPM)."""
    n, steps = 40_000, 200
    g = torch.Generator().manual_seed(0)
    mean, std = marginal(process, 1.0 if process == "flow" else LATEST)
    x = mean + std * torch.randn(n, generator=g, dtype=F64)
    seen = []
    for k, (now, after) in enumerate(grid(process, steps)):
        middle, deviation = sde_step(process, x, perfect(process, x, float(now)), now, after, noise)
        x = middle + deviation * torch.randn(n, generator=g, dtype=F64)
        if (k + 1) % 50 == 0:
            mean, std = marginal(process, float(after))
            seen.append(float(after))
            assert float(x.mean()) == pytest.approx(mean, abs=4 * std / n**0.5), float(after)
            assert float(x.std()) == pytest.approx(std, rel=4 / (2 * n) ** 0.5 + 0.03), float(after)
    start = 1.0 if process == "flow" else LATEST
    assert seen == pytest.approx([0.75 * start, 0.5 * start, 0.25 * start, 0.0], abs=1e-6)


def moments(process, noise, steps):
    """Exact mean and deviation after each step: with a perfect network the steps are affine, so two points tell all."""
    steps = grid(process, steps)
    mean, std = marginal(process, float(steps[0][0]))
    for now, after in steps:
        x = torch.tensor([0.0, 1.0], dtype=F64)
        out, deviation = sde_step(process, x, perfect(process, x, float(now)), now, after, noise)
        slope = float(out[1] - out[0])
        mean, std = float(out[0]) + slope * mean, math.hypot(slope * std, float(deviation))
        yield float(after), mean, std


@pytest.mark.parametrize(("process", "noise"), CASES)
def test_with_many_steps_the_marginals_are_exact(process, noise):
    """Noise keeps them: what it adds, the drift takes away. Deviations to 0.4 % of themselves with 2000 steps."""
    for t, mean, std in moments(process, noise, 2000):
        wanted = marginal(process, t)
        assert mean == pytest.approx(wanted[0], abs=1e-6), t
        if t <= 0.6 or process == "diffusion":
            assert std == pytest.approx(wanted[1], rel=4e-3), t


@pytest.mark.parametrize("noise", [0.3, 0.7])
def test_the_first_step_of_the_flow_is_too_wide_however_many_there_are(noise):
    """Its variance is noise^2 for any K, so no number of steps makes it small; later steps forget it.

    With x from N(0, 1) the step is x (1 - noise^2 / 2) + noise z for small d: a variance of 1 + noise^4 / 4.
    """
    _, _, std = next(moments("flow", noise, 20_000))
    assert std == pytest.approx((1 + noise**4 / 4) ** 0.5, rel=1e-3)
    worst = max(std / marginal("flow", t)[1] for t, _, std in moments("flow", noise, 2000))
    assert worst < 1.05


# ---- one step --------------------------------------------------------------------------------------------------------

HAND = [
    # t, strength s, std, weight of x - v t, weight of x + v (1 - t); noise 0.5, K = 4, d = 0.25
    (1.00, 1.0, 0.5, 0.25, 0.625),  # s = .5 sqrt(1 / .25); .75 - 1 * .25 / 2
    (0.75, 0.75**0.5, 0.1875**0.5, 0.5, 0.375),  # s = .5 sqrt(3); .5 - .75 * .25 / 1.5
    (0.50, 0.5, 0.25, 0.75, 0.1875),  # s = .5; .25 - .25 * .25 / 1
    (0.25, (1 / 12) ** 0.5, (1 / 48) ** 0.5, 1.0, -1 / 24),  # s = .5 sqrt(1 / 3); 0 - (1 / 12) * .25 / .5
]


def test_flow_steps_worked_by_hand():
    for (now, after), (t, s, std, w0, w1) in zip(grid("flow", 4), HAND, strict=True):
        assert (float(now), float(after)) == (t, t - 0.25)
        assert std == pytest.approx(s * 0.5)
        for x, v in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
            mean, deviation = sde_step("flow", torch.tensor(x, dtype=F64), torch.tensor(v, dtype=F64), now, after, 0.5)
            assert float(mean) == pytest.approx(w0 * (x - v * t) + w1 * (x + v * (1 - t)), abs=1e-12)
            assert float(deviation) == pytest.approx(std, abs=1e-12)


def test_diffusion_steps_are_those_of_the_ddim_paper():
    """Song et al. 2021, equations 12 and 16, with their alpha = cos^2(pi t / 2)."""
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 5))
    for noise in (0.0, 0.4, 1.0):
        for now, after in grid("diffusion", 5):
            a_now, a_after = np.cos(np.pi * float(now) / 2) ** 2, np.cos(np.pi * float(after) / 2) ** 2
            std = noise * np.sqrt((1 - a_after) / (1 - a_now)) * np.sqrt(1 - a_now / a_after)
            predicted = (x - np.sqrt(1 - a_now) * e) / np.sqrt(a_now)
            expected = np.sqrt(a_after) * predicted + np.sqrt(1 - a_after - std**2) * e
            mean, deviation = sde_step("diffusion", torch.from_numpy(x), torch.from_numpy(e), now, after, noise)
            np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-9, atol=1e-9)
            assert float(deviation) == pytest.approx(std, abs=1e-9)


def test_diffusion_steps_with_noise_1_are_the_posterior_of_ddpm():
    """Ho et al. 2020, equation 7: q(x' | x, a) of the Markov chain that adds beta at each step."""
    x, e = np.random.default_rng(1).normal(size=(2, 5))
    for now, after in grid("diffusion", 5):
        bar, bar_after = np.cos(np.pi * float(now) / 2) ** 2, np.cos(np.pi * float(after) / 2) ** 2
        alpha = bar / bar_after
        action = (x - np.sqrt(1 - bar) * e) / np.sqrt(bar)
        expected = (np.sqrt(bar_after) * (1 - alpha) * action + np.sqrt(alpha) * (1 - bar_after) * x) / (1 - bar)
        mean, std = sde_step("diffusion", torch.from_numpy(x), torch.from_numpy(e), now, after, 1.0)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-8, atol=1e-8)
        assert float(std) == pytest.approx(np.sqrt((1 - bar_after) / (1 - bar) * (1 - alpha)), abs=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_without_noise_a_step_is_the_deterministic_one(process):
    g = torch.Generator().manual_seed(0)
    x, answer = torch.randn(2, 3, 2, 4, generator=g, dtype=F64)
    for now, after in grid(process, 6):
        mean, std = sde_step(process, x, answer, now, after, 0.0)
        assert float(std) == 0.0
        torch.testing.assert_close(mean, ode_step(process, x, answer, now, after), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_rows_may_be_at_different_times(process):
    g = torch.Generator().manual_seed(0)
    x, answer = torch.randn(2, 4, 3, 2, generator=g)
    now, after = times(process, 4)
    mean, std = sde_step(process, x, answer, now.view(4, 1, 1), after.view(4, 1, 1), 0.6)
    for k in range(4):
        one, deviation = sde_step(process, x[k], answer[k], now[k], after[k], 0.6)
        torch.testing.assert_close(mean[k], one)
        assert float(std[k]) == float(deviation)


@pytest.mark.parametrize(("process", "first"), [("flow", 1.0), ("diffusion", 0.98)])
def test_the_grid_has_equal_steps_and_ends_at_0(process, first):
    now, after = times(process, 5)
    assert now.tolist() == pytest.approx([first * (1 - k / 5) for k in range(5)])
    assert torch.equal(now[1:], after[:-1]) and float(after[-1]) == 0.0


def test_the_density_of_a_step():
    x, mean, std = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    std = std.abs() + 0.1
    np.testing.assert_allclose(gaussian_logp(x, mean, std).numpy(), norm.logpdf(x, mean, std), rtol=1e-12)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_network_that_answers_the_target_finds_the_action_in_any_number_of_steps(process, steps):
    """For one known action the target stays the same along the whole path."""
    g = torch.Generator().manual_seed(0)
    action, noise = torch.randn(2, 6, 2, 3, generator=g, dtype=F64)
    x, target = training_pair(process, action, noise, torch.full((6,), 1.0 if process == "flow" else LATEST, dtype=F64))
    for now, after in grid(process, steps):
        t = now.expand(6)
        there, again = training_pair(process, action, noise, t)
        # The grid is made in float32, and at 0.98 the action weighs 0.03.
        torch.testing.assert_close(x, there, rtol=0, atol=1e-5)
        torch.testing.assert_close(again, target)
        x = ode_step(process, x, target, now, after)
    torch.testing.assert_close(x, action, rtol=0, atol=1e-5)


def test_the_target_of_a_flow_is_the_velocity_of_its_path():
    action, noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=F64), 1e-6
    (ahead, target), (behind, _) = (training_pair("flow", action, noise, t + s) for s in (h, -h))
    torch.testing.assert_close((ahead - behind) / (2 * h), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_best_guess_of_the_target_is_the_perfect_answer(process):
    """A line fitted to 100 000 training pairs per time, within 5 standard errors of its two coefficients."""
    n = 100_000
    g = torch.Generator().manual_seed(0)
    for t in (0.2, 0.6, 0.95):
        action = MEAN + STD * torch.randn(n, generator=g, dtype=F64)
        noise = torch.randn(n, generator=g, dtype=F64)
        x, target = training_pair(process, action, noise, torch.full((n,), t, dtype=F64))
        slope, height = np.polyfit(x.numpy(), target.numpy(), 1)
        spread = float((target - slope * x - height).std())
        line = torch.tensor([0.0, 1.0], dtype=F64)
        wanted = perfect(process, line, t)
        error = 5 * spread / n**0.5
        assert slope == pytest.approx(float(wanted[1] - wanted[0]), abs=error / float(x.std()))
        assert height == pytest.approx(float(wanted[0]), abs=error * math.hypot(1, float(x.mean() / x.std())))


@pytest.mark.parametrize("process", PROCESSES)
def test_the_perfect_answer_leads_from_noise_to_the_action_the_path_belongs_to(process):
    """Without noise the chain is a map that keeps the order: quantile q of the noise ends at quantile q of the data."""
    q = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.5], dtype=F64)
    mean, std = marginal(process, 1.0 if process == "flow" else LATEST)
    x = mean + std * q
    for now, after in grid(process, 2000):
        x = ode_step(process, x, perfect(process, x, float(now)), now, after)
    torch.testing.assert_close(x, MEAN + STD * q, rtol=0, atol=3e-3)
